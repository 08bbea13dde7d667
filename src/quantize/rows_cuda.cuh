// Per-token quantisation of sequences whose channels lie side by side, aligned: a warp keeps a row in registers, reads it
// once and writes it once. The rules are quantize/uniform.h and quantize/codebook.h.
#pragma once

#include "quantize/packs_cuda.cuh"

namespace kvpack::cuda {

inline constexpr int kRowWarps = 8;
inline constexpr int kRowThreads = kRowWarps * kWarpLanes;

/// Looks for values that are not finite among the tokens that will be quantised.
///
/// Launch  any number of blocks of kRowThreads
/// Work    a warp takes rows, lanes along channels
/// Reads   x of the quantised tokens once
/// Writes  kSomewhere into *findings
/// Needs   channels side by side, all rows aligned to 16 bytes, channels a multiple of kPack
template <typename T>
__global__ void __launch_bounds__(kRowThreads) check_rows_kernel(VectorPlan<T> plan, Findings* findings) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  float finite = 0.0f;
  for (std::int64_t t = plan.first_token + static_cast<std::int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpLanes;
       t < plan.end_token; t += static_cast<std::int64_t>(gridDim.x) * kRowWarps) {
    const T* row = plan.x + t * plan.x_token_stride;
#pragma unroll 4
    for (std::int64_t c = lane * kPack<T>; c < plan.channels; c += kWarpLanes * kPack<T>) {
      finite = finite_sum(load_pack(row + c), finite);
    }
  }
  tell_bad(!(finite == 0.0f), findings);
}

/// The smallest and largest element of a pack, and those met before.
template <typename T>
__device__ void add_whole_pack(const PackRange<T>& range, float& low, float& high) {
#pragma unroll
  for (int j = 0; j < kPack<T>; ++j) {
    low = min_or_nan(low, range.low_at(j));
    high = max_or_nan(high, range.high_at(j));
  }
}

/// Grid of the lanes that share a vector from each one's range; `lanes` is a power of two.
__device__ inline VectorGrid range_grid_of_lanes(float low, float high, int lanes, const QuantizeOptions& options,
                                                 Findings* findings) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    low = min_or_nan(low, __shfl_xor_sync(kAllLanes, low, distance));
    high = max_or_nan(high, __shfl_xor_sync(kAllLanes, high, distance));
  }
  tell_bad(is_bad_range(low, high), findings);
  // + 0 as ordered keys have it: one range for zeros of both signs.
  const UniformGrid grid = make_range_grid(low + 0.0f, high + 0.0f, options);
  return {grid.qs, grid.offset, HUGE_VALF, -HUGE_VALF};
}

/// Grid of `count` elements from `first` from their root mean square; the whole warp, a lane a strand. They come from the
/// caches: the row has just been read.
template <typename T>
__device__ UniformGrid rms_grid_of_warp(const T* first, std::int64_t count, int lane) {
  float sum = 0.0f;
#pragma unroll 8
  for (std::int64_t i = lane; i < count; i += kStrands) {
    const float value = element_value(first[i]);
    sum = sum + value * value;
  }
#pragma unroll
  for (int distance = kStrands / 2; distance > 0; distance /= 2) {
    sum = sum + __shfl_xor_sync(kAllLanes, sum, distance);
  }
  return make_rms_grid(sum, count);
}

/// Grid of each lane's vector where several share kWarpLanes packs from channel `first`.
template <typename T>
__device__ VectorGrid rms_grid_of_lanes(const T* row, std::int64_t first, int lanes, const VectorPlan<T>& plan,
                                        int lane) {
  VectorGrid grid{0.0f, 0.0f, HUGE_VALF, -HUGE_VALF};
  for (int first_lane = 0; first_lane < kWarpLanes; first_lane += lanes) {
    const std::int64_t c = first + first_lane * kPack<T>;
    if (c >= plan.channels) break;
    const UniformGrid one = rms_grid_of_warp(row + c, min(plan.group, plan.channels - c), lane);
    if (lane / lanes == first_lane / lanes) grid = {one.qs, one.offset, HUGE_VALF, -HUGE_VALF};
  }
  return grid;
}

template <bool kCodebook, typename T>
__device__ std::uint32_t simulate_with_grid(Pack<T>& pack, VectorGrid grid, bool has_thresholds, const FastRule& rule) {
  const FastGrid grids[1] = {{grid.qs, grid.offset, 1.0f / grid.qs}};
  const bool suits = suits_reciprocal(grid.qs, grid.offset);
  if (has_thresholds) {
    const float upper[1] = {grid.upper};
    const float lower[1] = {grid.lower};
    return suits ? simulate_dense<kCodebook, true>(pack, grids, upper, lower, rule)
                 : simulate_dense<kCodebook, false>(pack, grids, upper, lower, rule);
  }
  if (suits) {
    simulate_pack<kCodebook, true>(pack, grids, rule);
  } else {
    simulate_pack<kCodebook, false>(pack, grids, rule);
  }
  return 0;
}

/// Quantises rows of at most kPacks * 32 packs, a warp each.
///
///   1024 halves, kPacks 4     pack 0: channels 8 * lane ...     pack 1: 256 + 8 * lane ...     ...     pack 3
///   vectors                   a row, or groups of kPack * 2^k channels: 2^k lanes of one pack
///
/// Launch  any number of blocks of kRowThreads
/// Work    ranges by shuffles, squares by strands; calibrated grids as they are
/// Reads   x of the quantised tokens once (rms: once more, from the caches); grids [tokens] in calibrated mode
/// Writes  out of the quantised tokens, may be x if *findings has been through all of x; in calibrated mode adds outliers;
///         kSomewhere into *findings
/// Needs   as check_rows_kernel; a row of at most kPacks * 32 packs; no outlier quantiles
template <bool kCodebook, int kPacks, typename T>
__global__ void __launch_bounds__(kRowThreads)
    simulate_rows_kernel(VectorPlan<T> plan, const VectorGrid* calibrated,
                         const __grid_constant__ CodebookTable codebook, Findings* findings) {
  __shared__ float boundaries[kCodebook ? kMaxCentroids : 1];
  __shared__ float values[kCodebook ? kMaxCentroids : 1];
  if (plan.x == plan.out && findings->first_bad != ~Counter{0}) return;
  const FastRule rule = load_rule(codebook, plan.options, boundaries, values);
  __syncthreads();
  constexpr int kStep = kWarpLanes * kPack<T>;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const bool is_whole = plan.group >= plan.channels;
  const int lanes = is_whole ? kWarpLanes : static_cast<int>(plan.group) / kPack<T>;
  const bool is_rms = plan.options.scale == ScaleRule::kRms;
  std::uint32_t outliers = 0;
  float finite = 0.0f;
  for (std::int64_t t = plan.first_token + static_cast<std::int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpLanes;
       t < plan.end_token; t += static_cast<std::int64_t>(gridDim.x) * kRowWarps) {
    const T* row = plan.x + t * plan.x_token_stride;
    Pack<T> packs[kPacks] = {};
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int c = p * kStep + lane * kPack<T>;
      if (c < plan.channels) packs[p] = load_pack(row + c);
    }
    VectorGrid grid{};
    if (calibrated != nullptr) {
      grid = calibrated[t];
    } else if (is_whole && is_rms) {
      const UniformGrid one = rms_grid_of_warp(row, plan.channels, lane);
      grid = {one.qs, one.offset, HUGE_VALF, -HUGE_VALF};
    } else if (is_whole) {
      PackRange<T> range;
      range.clear();
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        if (p * kStep + lane * kPack<T> < plan.channels) range.add(packs[p]);
      }
      float low = HUGE_VALF;
      float high = -HUGE_VALF;
      add_whole_pack(range, low, high);
      grid = range_grid_of_lanes(low, high, kWarpLanes, plan.options, findings);
    }
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int c = p * kStep + lane * kPack<T>;
      if (p * kStep >= plan.channels) break;
      if (calibrated == nullptr && !is_whole && is_rms) {
        grid = rms_grid_of_lanes(row, p * kStep, lanes, plan, lane);
      } else if (calibrated == nullptr && !is_whole) {
        PackRange<T> range;
        range.clear();
        if (c < plan.channels) range.add(packs[p]);
        float low = HUGE_VALF;
        float high = -HUGE_VALF;
        add_whole_pack(range, low, high);
        grid = range_grid_of_lanes(low, high, lanes, plan.options, findings);
      }
      if (is_rms || calibrated != nullptr) finite = finite_sum(packs[p], finite);
      outliers += simulate_with_grid<kCodebook>(packs[p], grid, calibrated != nullptr && c < plan.channels, rule);
      if (c < plan.channels) store_pack(plan.out + t * plan.out_token_stride + c, packs[p]);
    }
  }
  tell_bad(!(finite == 0.0f), findings);
  count_outliers(outliers, findings);
}

}  // namespace kvpack::cuda
