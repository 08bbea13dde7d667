// Copies by Hopper's copy engine and the barriers in shared memory that they report to, as thin wrappers over PTX.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace kvpack::cuda {

/// Makes a barrier (8 bytes of shared memory) for one arriving thread; show_barriers and a barrier of the block must follow before
/// others use it.
__device__ inline void make_copy_barrier(std::uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" : : "r"(barrier) : "memory");
}

/// Shows this thread's new barriers to the copy engine.
__device__ inline void show_barriers() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/// Arrives and says how many bytes of copies this phase of the barrier waits for.
__device__ inline void expect_copies(std::uint32_t barrier, std::uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(barrier), "r"(bytes) : "memory");
#endif
}

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

/// Waits until phase `parity` (0, 1, 0, ...) of the barrier is complete.
__device__ inline void wait_for_copies(std::uint32_t barrier, std::uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  std::uint32_t is_complete = 0;
  while (is_complete == 0) {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
                 : "=r"(is_complete)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  }
#endif
}

}  // namespace kvpack::cuda
