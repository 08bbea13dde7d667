// Reductions over a block whose result every thread gets, in an order that depends on the block's size alone: the same
// numbers give the same bits in every run.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/launch.h"

namespace kvpack::cuda {

inline constexpr std::uint32_t kAllLanes = 0xffffffffu;

/// The value of the lane `distance` above, any trivially copyable type.
template <typename T>
__device__ T shuffle_down(T value, int distance) {
  static_assert(sizeof(T) % sizeof(int) == 0);
  int words[sizeof(T) / sizeof(int)];
  memcpy(words, &value, sizeof(T));
  for (int& word : words) word = __shfl_down_sync(kAllLanes, word, distance);
  memcpy(&value, words, sizeof(T));
  return value;
}

/// combine(...) over the numbers of a warp's lanes, for every lane.
template <typename Combine>
__device__ inline std::uint32_t warp_combine(std::uint32_t own, Combine combine) {
  for (int distance = kWarpLanes / 2; distance > 0; distance /= 2) {
    own = combine(own, __shfl_xor_sync(kAllLanes, own, distance));
  }
  return own;
}

/// The sum, the least, the most and the OR of a warp's numbers, in one instruction where the GPU has it. Every lane must call.
__device__ inline std::uint32_t warp_sum(std::uint32_t own) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(kAllLanes, own);
#else
  return warp_combine(own, [](std::uint32_t a, std::uint32_t b) { return a + b; });
#endif
}
__device__ inline std::uint32_t warp_least(std::uint32_t own) {
#if __CUDA_ARCH__ >= 800
  return __reduce_min_sync(kAllLanes, own);
#else
  return warp_combine(own, [](std::uint32_t a, std::uint32_t b) { return a < b ? a : b; });
#endif
}
__device__ inline std::uint32_t warp_most(std::uint32_t own) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(kAllLanes, own);
#else
  return warp_combine(own, [](std::uint32_t a, std::uint32_t b) { return a > b ? a : b; });
#endif
}
__device__ inline std::uint32_t warp_or(std::uint32_t own) {
#if __CUDA_ARCH__ >= 800
  return __reduce_or_sync(kAllLanes, own);
#else
  return warp_combine(own, [](std::uint32_t a, std::uint32_t b) { return a | b; });
#endif
}

/// The smaller one and the larger one; a NaN wins (one instruction since sm_80).
__device__ inline float min_or_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a < b || a != a ? a : b;
#endif
}
__device__ inline float max_or_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a > b || a != a ? a : b;
#endif
}

/// Waits for `threads` threads, whole warps, that call with the same number of a barrier, 1 to 15.
__device__ inline void sync_some_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" : : "r"(barrier), "r"(threads) : "memory");
}

/// combine(...combine(a, b)...) over the values of all kThreads threads. Any trivially copyable T; every thread must call.
template <int kThreads, typename T, typename Combine>
__device__ T block_reduce(T value, Combine combine) {
  static_assert(kThreads % kWarpLanes == 0);
  constexpr int kWarps = kThreads / kWarpLanes;
  __shared__ T of_warps[kWarps];
  for (int distance = kWarpLanes / 2; distance > 0; distance /= 2) {
    value = combine(value, shuffle_down(value, distance));
  }
  if (threadIdx.x % kWarpLanes == 0) of_warps[threadIdx.x / kWarpLanes] = value;
  __syncthreads();
  T total = of_warps[0];
  for (int warp = 1; warp < kWarps; ++warp) total = combine(total, of_warps[warp]);
  __syncthreads();  // the next reduction writes the same memory
  return total;
}

}  // namespace kvpack::cuda
