# What `cmake --install` and `pip install` put where.

if(kvpack_has_cuda)
  set(kvpack_installed_libraries kvpack_cuda)
endif()

if(SKBUILD)
  # Beside kvpack/_native.py: a wheel holds the package and its libraries, no headers and no CMake files.
  install(TARGETS kvpack ${kvpack_installed_libraries} LIBRARY DESTINATION kvpack/lib)
  return()
endif()

include(CMakePackageConfigHelpers)
set(kvpack_config_dir "${CMAKE_INSTALL_LIBDIR}/cmake/kvpack")

install(TARGETS kvpack EXPORT kvpack_targets LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}")
if(kvpack_has_cuda)
  # Not exported: nobody links it, libkvpack finds it in its own folder at run time.
  install(TARGETS kvpack_cuda LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}")
endif()
install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/kvpack" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(EXPORT kvpack_targets FILE kvpack-targets.cmake NAMESPACE kvpack:: DESTINATION "${kvpack_config_dir}")

configure_package_config_file("${PROJECT_SOURCE_DIR}/cmake/kvpack-config.cmake.in"
  "${PROJECT_BINARY_DIR}/kvpack-config.cmake" INSTALL_DESTINATION "${kvpack_config_dir}")
# Before 1.0 a minor version may change the interface.
write_basic_package_version_file("${PROJECT_BINARY_DIR}/kvpack-config-version.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/kvpack-config.cmake" "${PROJECT_BINARY_DIR}/kvpack-config-version.cmake"
  DESTINATION "${kvpack_config_dir}")
