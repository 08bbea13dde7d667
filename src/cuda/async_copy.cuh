// Copies from global to shared memory that run while the thread goes on (cp.async, sm_80 and later). Code for older GPUs
// holds a trap: the registry (dispatch/cuda_registry.cu) starts no such kernel there.
#pragma once

#include <cstdint>

namespace kvpack::cuda {

/// Starts a copy of one aligned word.
__device__ inline void copy_word_async(std::uint32_t shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
#else
  __trap();
#endif
}

/// Starts a copy of 16 aligned bytes, past the first-level cache.
__device__ inline void copy_quad_async(std::uint32_t shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
#else
  __trap();
#endif
}

/// Ends this thread's current group of copies.
__device__ inline void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  __trap();
#endif
}

/// Waits until at most kPending of this thread's groups are still on their way.
template <int kPending>
__device__ inline void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  __trap();
#endif
}

}  // namespace kvpack::cuda
