// What libkvpack and libkvpack_cuda agree on: one exported function. The CUDA side is a separate shared library, so
// that a machine without CUDA builds and runs the rest.
#pragma once

#include <cstdint>

#include "dispatch/registry.h"

namespace kvpack {

/// Raised whenever Implementation or an operation's problem structure changes.
inline constexpr std::int32_t kCudaLibraryVersion = 5;

/// What the CUDA library hands over.
struct CudaLibrary {
  std::int32_t version = 0;
  std::int32_t num_devices = 0;
  std::int32_t capability = 0;  // 10 * major + minor of the least capable of them
  const char* status = "";      // for people: the devices, or why there are none
  const Implementation* rows = nullptr;
  std::int64_t num_rows = 0;
};

/// Name and type of the exported function.
inline constexpr const char* kCudaLibrarySymbol = "kvpack_cuda_library";
using CudaLibraryFunction = const CudaLibrary* (*)();

}  // namespace kvpack
