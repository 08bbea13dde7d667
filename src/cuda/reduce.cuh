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

/// The smaller one and the larger one; a NaN wins (sm_80 and later).
__device__ inline float min_or_nan(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
__device__ inline float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
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
