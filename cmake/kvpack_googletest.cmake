# GoogleTest: the system's package, or sources named in KVPACK_GOOGLETEST_SOURCE (machines without a package, such as a
# borrowed GPU node). Nothing is downloaded.

set(KVPACK_GOOGLETEST_SOURCE "" CACHE PATH "Folder of GoogleTest's sources, used where the system has no package")

find_package(GTest QUIET)
if(NOT GTest_FOUND AND EXISTS "${KVPACK_GOOGLETEST_SOURCE}/CMakeLists.txt")
  set(INSTALL_GTEST OFF)
  set(BUILD_GMOCK OFF)
  add_subdirectory("${KVPACK_GOOGLETEST_SOURCE}" "${PROJECT_BINARY_DIR}/googletest" EXCLUDE_FROM_ALL SYSTEM)
  if(NOT TARGET GTest::gtest_main)
    add_library(GTest::gtest_main ALIAS gtest_main)
  endif()
elseif(NOT GTest_FOUND)
  message(FATAL_ERROR "GoogleTest not found, which KVPACK_BUILD_TESTS=ON needs. Debian and Ubuntu: "
    "apt-get install libgtest-dev. Elsewhere: -DKVPACK_GOOGLETEST_SOURCE=<folder of its sources>.")
endif()
