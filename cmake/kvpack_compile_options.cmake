# Compiler flags of every target of this project: kvpack_set_compile_options(TARGET).

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Debug, Release, RelWithDebInfo or MinSizeRel" FORCE)
endif()

# Hidden is the default; the headers of include/kvpack open their namespace with visibility "default", so that exactly the
# public interface leaves libkvpack.
function(kvpack_set_compile_options target)
  set_target_properties(${target} PROPERTIES
    CXX_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON
    POSITION_INDEPENDENT_CODE ON)
  # As a flag, not as a target property: CMake 3.25 does not know C++20 for nvcc 13.
  target_compile_options(${target} PRIVATE -std=c++20)
  # -ffp-contract=off: GCC would otherwise fuse a*b+c where the instruction set has FMA, and the AVX2 and AVX-512
  # implementations would no longer equal the reference bit for bit (docs/numerics.md).
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off;-Wall;-Wextra;-Wpedantic;-Wshadow;-Wconversion;-Werror>)
  # GCC 12 warns falsely inside its own headers: AVX-512 intrinsics (GCC bug 105593), std::string's + (105651).
  target_compile_options(${target} PRIVATE
    $<$<AND:$<COMPILE_LANG_AND_ID:CXX,GNU>,$<VERSION_LESS:$<CXX_COMPILER_VERSION>,13>>:-Wno-maybe-uninitialized;-Wno-restrict>)
  # -O3 also in dev: tests run the loops that are shipped. RelWithDebInfo alone would say -O2.
  target_compile_options(${target} PRIVATE
    $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<CONFIG:Release,RelWithDebInfo>,$<NOT:$<BOOL:${KVPACK_SANITIZE}>>>:-O3>)
  if(KVPACK_SANITIZE)
    target_compile_options(${target} PRIVATE
      -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer)
    target_link_options(${target} PRIVATE -fsanitize=address,undefined)
  endif()
endfunction()
