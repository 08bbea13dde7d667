// Copies of boxes of a tensor by Hopper's copy engine, as thin wrappers over PTX. They report to the barriers of bulk_copy.cuh.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/bulk_copy.cuh"

namespace kvpack::cuda {

/// Starts to copy the box whose first number is [matrix, row, column] to `shared`; the barrier counts its bytes.
__device__ inline void copy_box_async(std::uint32_t shared, const CUtensorMap& map, int column, int row, int matrix,
                                      std::uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
      :
      : "r"(shared), "l"(&map), "r"(column), "r"(row), "r"(matrix), "r"(barrier)
      : "memory");
#endif
}

/// Starts to fetch a map, before the first copy needs it.
__device__ inline void prefetch_map(const CUtensorMap& map) {
#if __CUDA_ARCH__ >= 900
  asm volatile("prefetch.tensormap [%0];" : : "l"(&map) : "memory");
#endif
}

}  // namespace kvpack::cuda
