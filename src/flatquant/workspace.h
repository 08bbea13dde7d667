// Working memory of FlatQuant's operations on a GPU: shared by the entries and the CUDA side.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kvpack/tensor.h"

namespace kvpack {

/// Thread blocks of the kernels without tensor cores where their rows lie in device memory.
inline constexpr std::int64_t kKronPlainBlocks = 264;

/// What those kernels keep of a token: two rows of float32.
constexpr std::int64_t kron_plain_row_bytes(std::int64_t n) { return 2 * n * static_cast<std::int64_t>(sizeof(float)); }

/// True where that fits the shared memory of every GPU since sm_75, 64 KiB with a rest for reductions; the rows of longer tokens
/// lie in working memory.
constexpr bool kron_rows_fit_shared_memory(std::int64_t n) { return kron_plain_row_bytes(n) <= 63 * 1024; }

/// Bytes that kron_quantize needs on a GPU for X [rows, columns] of each token. The kernels on tensor cores need none, but who
/// runs depends on the GPU.
constexpr std::int64_t kron_workspace_bytes(std::int64_t tokens, std::int64_t rows, std::int64_t columns,
                                            DType /*dtype*/) {
  const std::int64_t n = rows * columns;
  return kron_rows_fit_shared_memory(n) ? 0 : std::min(tokens, kKronPlainBlocks) * kron_plain_row_bytes(n);
}

/// Bytes that linear_w4a4 needs on a GPU.
constexpr std::int64_t linear_w4a4_workspace_bytes(std::int64_t /*tokens*/, std::int64_t /*columns*/,
                                                   std::int64_t /*out_features*/) {
  return 0;
}

}  // namespace kvpack
