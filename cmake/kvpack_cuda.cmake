# libkvpack_cuda: the GPU side, a shared library of its own that libkvpack loads when a GPU is there. It links neither
# libkvpack nor a shared CUDA runtime, so a missing or other CUDA installation never stops the CPU side.

set(kvpack_has_cuda OFF)
file(GLOB_RECURSE kvpack_cuda_sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/src/*.cu")

if(NOT KVPACK_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "KVPACK_CUDA is \"${KVPACK_CUDA}\"; it must be AUTO, ON or OFF")
endif()
if(KVPACK_CUDA STREQUAL "OFF")
  return()
endif()
if(NOT kvpack_cuda_sources)
  if(KVPACK_CUDA STREQUAL "ON")
    message(FATAL_ERROR "KVPACK_CUDA=ON, but there is no .cu file under ${PROJECT_SOURCE_DIR}/src")
  endif()
  return()
endif()

# enable_language(CUDA) reads this variable; set before it, so that CMake does not ask the GPU of this machine.
set(CMAKE_CUDA_ARCHITECTURES ${KVPACK_CUDA_ARCHITECTURES})
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(KVPACK_CUDA STREQUAL "ON")
    message(FATAL_ERROR "KVPACK_CUDA=ON, but no CUDA compiler was found; put nvcc on PATH or set CUDACXX")
  endif()
  message(STATUS "kvpack: no CUDA compiler found, building the CPU side alone")
  return()
endif()
enable_language(CUDA)

add_library(kvpack_cuda SHARED ${kvpack_cuda_sources})
kvpack_set_compile_options(kvpack_cuda)
target_include_directories(kvpack_cuda PRIVATE "${PROJECT_SOURCE_DIR}/include" "${PROJECT_SOURCE_DIR}/src")
# --fmad=false is -ffp-contract=off for the device: results equal the CPU reference bit for bit.
target_compile_options(kvpack_cuda PRIVATE
  "$<$<COMPILE_LANGUAGE:CUDA>:-std=c++20;--fmad=false;--Werror=all-warnings>"
  "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-ffp-contract=off,-Wall,-Wextra,-Wshadow>")
if(KVPACK_CUDA_LINEINFO)
  target_compile_options(kvpack_cuda PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-lineinfo>")
endif()
# Hopper's own instructions exist in code for 9.0a alone; kernels that use them are only started where there is such code.
if("${KVPACK_CUDA_ARCHITECTURES}" MATCHES "(^|;)90a")
  target_compile_definitions(kvpack_cuda PRIVATE KVPACK_COMPILES_FOR_SM90A)
endif()
target_link_options(kvpack_cuda PRIVATE -Wl,--no-undefined)
set_target_properties(kvpack_cuda PROPERTIES
  CUDA_RUNTIME_LIBRARY Static
  CUDA_VISIBILITY_PRESET hidden
  LIBRARY_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}"
  INSTALL_RPATH "$ORIGIN")
set(kvpack_has_cuda ON)
message(STATUS "kvpack: libkvpack_cuda for ${KVPACK_CUDA_ARCHITECTURES}")
