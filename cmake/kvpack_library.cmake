# libkvpack: the CPU side and everything public.

find_package(OpenMP REQUIRED COMPONENTS CXX)

file(GLOB_RECURSE kvpack_sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/src/*.cpp")
if(NOT kvpack_sources)
  message(FATAL_ERROR "no sources under ${PROJECT_SOURCE_DIR}/src")
endif()

# Compiled once, linked twice: into libkvpack, where only the public names stay visible, and into the C++ tests, which
# also look at private ones.
add_library(kvpack_objects OBJECT ${kvpack_sources})
kvpack_set_compile_options(kvpack_objects)
target_include_directories(kvpack_objects
  PUBLIC "${PROJECT_SOURCE_DIR}/include"
  PRIVATE "${PROJECT_SOURCE_DIR}/src")
target_link_libraries(kvpack_objects PUBLIC OpenMP::OpenMP_CXX ${CMAKE_DL_LIBS})

add_library(kvpack SHARED $<TARGET_OBJECTS:kvpack_objects>)
add_library(kvpack::kvpack ALIAS kvpack)
kvpack_set_compile_options(kvpack)
target_compile_features(kvpack INTERFACE cxx_std_20)
target_include_directories(kvpack INTERFACE
  $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>
  $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
target_link_libraries(kvpack PRIVATE OpenMP::OpenMP_CXX ${CMAKE_DL_LIBS})
target_link_options(kvpack PRIVATE -Wl,--no-undefined)
set_target_properties(kvpack PROPERTIES
  LIBRARY_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}"
  INSTALL_RPATH "$ORIGIN")
if(NOT SKBUILD)
  # A wheel holds no symbolic links: there the file is libkvpack.so itself.
  set_target_properties(kvpack PROPERTIES
    VERSION ${PROJECT_VERSION}
    SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR})
endif()
