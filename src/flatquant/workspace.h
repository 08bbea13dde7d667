// Working memory of FlatQuant's operations on a GPU: shared by the entries and the CUDA side.
#pragma once

#include <cstdint>

#include "kvpack/tensor.h"

namespace kvpack {

/// Bytes that kron_quantize needs on a GPU for X [rows, columns] of each token.
constexpr std::int64_t kron_workspace_bytes(std::int64_t /*tokens*/, std::int64_t /*rows*/, std::int64_t /*columns*/,
                                            DType /*dtype*/) {
  return 0;
}

/// Bytes that linear_w4a4 needs on a GPU.
constexpr std::int64_t linear_w4a4_workspace_bytes(std::int64_t /*tokens*/, std::int64_t /*columns*/,
                                                   std::int64_t /*out_features*/) {
  return 0;
}

}  // namespace kvpack
