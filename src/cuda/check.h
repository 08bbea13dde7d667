// CUDA calls whose failure becomes an InternalError. libkvpack catches it: the error classes of kvpack/error.h are
// visible in both libraries.
#pragma once

#include <cuda_runtime.h>

#include "core/check.h"

namespace kvpack::cuda {

/// Throws InternalError when a CUDA call failed; `action` finishes the sentence "CUDA could not ...".
inline void check_cuda(cudaError_t status, const char* action) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // the runtime keeps the error for the next call otherwise
  throw InternalError(text("CUDA could not ", action, ": ", cudaGetErrorString(status)));
}

}  // namespace kvpack::cuda
