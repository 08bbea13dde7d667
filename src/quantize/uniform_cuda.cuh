// What the kernels of simulated quantisation share: how vectors lie in a sequence, and what is known of each.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/element.cuh"
#include "cuda/launch.h"
#include "cuda/ordered_key.cuh"
#include "cuda/reduce.cuh"
#include "quantize/codebook.h"
#include "quantize/implementations.h"
#include "quantize/uniform.h"

namespace kvpack::cuda {

using Counter = unsigned long long;  // the type that 64-bit atomics know

/// A sequence and how it is cut into vectors, by value to every kernel. Tokens [first_token, end_token) are quantised,
/// the others exact.
///   group of 2 tokens or channels, 1 protected token   per channel          per token
///   vectors of tokens 0 ... 4, channels 0 ... 2         -  -  -              -  -  -
///   (the causal mode leaves token 4 exact)              0  1  2              0  0  1
///                                                       3  4  5              2  2  3
///                                                       3  4  5              4  4  5
///                                                       -  -  -              6  6  7
template <typename T>
struct VectorPlan {
  const T* x;  // [tokens, channels]
  T* out;      // [tokens, channels], may be x
  std::int64_t tokens;
  std::int64_t channels;
  std::int64_t x_token_stride;
  std::int64_t x_channel_stride;
  std::int64_t out_token_stride;
  std::int64_t out_channel_stride;
  std::int64_t first_token;
  std::int64_t end_token;    // first_token where nothing is quantised
  std::int64_t group;        // tokens (per channel) or channels (per token) of a vector
  std::int64_t first_group;  // per channel: the group that holds first_token
  std::int64_t num_groups;   // groups of tokens (per channel), or of channels in each token (per token)
  std::int64_t num_vectors;
  QuantizeOptions options;        // its pointers are the host's
  const CodebookTable* codebook;  // in device memory; null: a uniform grid
  bool is_static;                 // calibrated grids: one per channel, or one per token

  /// Tokens of a per-channel group, counted from first_group: only the first can be cut by protected tokens, only the
  /// last by the end.
  __device__ TokenRange token_range(std::int64_t index) const {
    const std::int64_t first = (first_group + index) * group;
    return {max(first, first_token), min(first + group, end_token)};
  }

  /// Where the grid of a quantised element stands.
  template <Axis kAxis>
  __device__ std::int64_t grid_index(std::int64_t token, std::int64_t channel) const {
    if constexpr (kAxis == Axis::kPerToken) {
      return is_static ? token : (token - first_token) * num_groups + channel / group;
    } else {
      return is_static ? channel : (token / group - first_group) * channels + channel;
    }
  }
};

/// What comes back to the host. All ones at the start, so that one fill serves both.
struct Findings {
  Counter first_bad;  // smallest token * channels + channel of a value that is not finite, or all ones
  Counter outliers;   // less 1
};

/// Adds what the threads of a warp have counted. Every lane must call.
__device__ inline void count_outliers(std::uint32_t own, Findings* findings) {
  const std::uint32_t of_warp = warp_sum(own);
  if (threadIdx.x % kWarpLanes == 0 && of_warp > 0) atomicAdd(&findings->outliers, Counter{of_warp});
}

/// The value of an element that will be quantised, after a look whether it is finite.
template <typename T>
__device__ float checked_value(T element, std::int64_t place, Findings* findings) {
  const float value = element_value(element);
  if (!isfinite(value)) atomicMin(&findings->first_bad, static_cast<Counter>(place));
  return value;
}

}  // namespace kvpack::cuda
