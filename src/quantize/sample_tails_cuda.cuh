// Bounds that cut short ends off long per-channel vectors, from a sample of their tokens. They decide nothing: whoever uses
// them counts what lies beyond. split_columns_cuda.cuh does.
#pragma once

#include <type_traits>

#include "quantize/columns_cuda.cuh"
#include "quantize/split_rows_cuda.cuh"

namespace kvpack::cuda {

inline constexpr int kSampleThreads = 512;
inline constexpr int kSampleTokens = 16;  // of a thread
inline constexpr int kSamples = kSampleThreads * kSampleTokens;

/// The two ends of a vector: bounds on its elements' keys, and how many were found at or beyond them.
///   side 0: ordered keys            side 1: ordered keys inverted, so that they grow towards the lower end
struct TailBounds {
  std::uint32_t keys[2];
  std::uint32_t counts[2];
};

/// Which of the sampling threads' extremes bounds an end of which `needed` elements are wanted: all of a vector's tokens
/// are sampled, then the needed-th does; or a share of them, then one far enough inside to be safe by five deviations.
///
/// m elements beyond the bound are expected to be seen as s * m in a sample of share s, give or take sqrt(s * m); m is chosen
/// so that m - 5 * sqrt(m / s) = needed. A thread's extreme of k tokens lies beyond with 1 - exp(-k * m / n).
KVPACK_HOST_DEVICE inline float expected_in_tail(std::int64_t count, int needed) {
  if (count <= kSamples) return static_cast<float>(needed);
  constexpr float kDeviations = 5.0f;
  const float spread = kDeviations * sqrtf(static_cast<float>(count) / kSamples);
  const float root = 0.5f * (spread + sqrtf(spread * spread + 4.0f * static_cast<float>(needed)));
  return root * root;
}
KVPACK_HOST_DEVICE inline int sampled_rank(std::int64_t count, int needed) {
  if (count <= kSamples) return needed;
  const float share = expected_in_tail(count, needed) / static_cast<float>(count);
  return static_cast<int>(kSampleThreads * (1.0f - expf(-kSampleTokens * share))) + 1;
}

/// Elements that each of a vector's two lists has room for.
inline std::int64_t tail_capacity(std::int64_t count, int needed) {
  return static_cast<std::int64_t>(2.0f * expected_in_tail(count, needed)) + 64;
}

/// Keys of numbers of type T differ in bits from here on: rounding to 16 bits leaves the others all 0 or all 1.
template <typename T>
inline constexpr int kLowestBit = sizeof(T) == 4                ? 0
                                  : std::is_same_v<T, BFloat16> ? 16
                                                                : 13;

/// The first bits of the `rank`-th largest of a warp's keys, of which all lie from `least` to `most`: at least `rank` keys lie
/// at or above it. The bits that all have in common cost nothing.
template <typename T, typename CountAtLeast>
__device__ std::uint32_t ranked_prefix(std::uint32_t rank, std::uint32_t least, std::uint32_t most,
                                       CountAtLeast&& count_at_least) {
  if (least == most) return least;
  const int top = 31 - __clz(static_cast<int>(least ^ most));
  std::uint32_t key = top == 31 ? 0u : least >> (top + 1) << (top + 1);
  for (int shift = top; shift >= kLowestBit<T>; --shift) {
    const std::uint32_t candidate = key | 1u << shift;
    if (warp_sum(count_at_least(candidate)) >= rank) key = candidate;
  }
  return key;
}

/// Bounds both ends of each vector.
///
/// Launch  a block of kSampleThreads per kPack neighbouring channels of a group
/// Work    a thread finds the extremes of at most kSampleTokens tokens; a warp per end ranks the threads' extremes
/// Reads   kSamples tokens of each vector at most, spread evenly
/// Writes  bounds [num_vectors], counts 0; key 0 where no bound was found
/// Needs   as column_ranges_kernel
template <typename T>
__global__ void __launch_bounds__(kSampleThreads) sample_tails_kernel(VectorPlan<T> plan, TailBounds* bounds) {
  constexpr int kWarps = kSampleThreads / kWarpLanes;
  __shared__ std::uint32_t extremes[kPack<T>][2][kSampleThreads];
  const std::int64_t packs_across = plan.channels / kPack<T>;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  for (std::int64_t tile = blockIdx.x; tile < packs_across * plan.num_groups; tile += gridDim.x) {
    const std::int64_t group = tile / packs_across;
    const std::int64_t channel = tile % packs_across * kPack<T>;
    const TokenRange tokens = plan.token_range(group);
    const std::int64_t count = tokens.end - tokens.first;
    const std::int64_t samples = min(count, std::int64_t{kSamples});
    PackRange<T> range;
    range.clear();
#pragma unroll
    for (int k = 0; k < kSampleTokens; ++k) {
      const std::int64_t i = k * kSampleThreads + static_cast<std::int64_t>(threadIdx.x);
      if (i >= samples) break;
      range.add(load_pack(plan.x + (tokens.first + i * count / samples) * plan.x_token_stride + channel));
    }
    const bool has_any = static_cast<std::int64_t>(threadIdx.x) < samples;
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      extremes[j][0][threadIdx.x] = has_any ? ordered_key(range.high_at(j)) : 0u;
      extremes[j][1][threadIdx.x] = has_any ? ~ordered_key(range.low_at(j)) : 0u;
    }
    __syncthreads();
    const OutlierPlan places = make_outlier_plan(plan.options.outlier_fraction, count);
    for (int end = static_cast<int>(threadIdx.x) / kWarpLanes; end < 2 * kPack<T>; end += kWarps) {
      const int needed = end % 2 == 0 ? upper_places(places, count).needed() : lower_places(places).needed();
      std::uint32_t own[kWarps];
#pragma unroll
      for (int i = 0; i < kWarps; ++i) own[i] = extremes[end / 2][end % 2][i * kWarpLanes + lane];
      const auto rank = static_cast<std::uint32_t>(sampled_rank(count, needed));
      const std::uint32_t prefix = ranked_prefix<T>(rank, 0u, ~0u, [&](std::uint32_t least) {
        std::uint32_t at_least = 0;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) at_least += own[i] >= least;
        return at_least;
      });
      std::uint32_t key = ~0u;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) key = own[i] >= prefix ? min(key, own[i]) : key;
      key = warp_least(key);
      if (lane == 0) {
        TailBounds& target = bounds[group * plan.channels + channel + end / 2];
        target.keys[end % 2] = key;
        target.counts[end % 2] = 0;
      }
    }
    __syncthreads();  // the next tile writes extremes
  }
}

}  // namespace kvpack::cuda
