// Per-token quantisation of sequences whose channels lie side by side, aligned: a warp keeps a row in registers, reads it
// once and writes it once. The rules are quantize/uniform.h and quantize/codebook.h.
#pragma once

#include "quantize/tables_cuda.cuh"

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

/// Where the grid of a whole row comes from.
enum class RowGrids { kRange, kRms, kCalibrated };

/// One vector that a whole warp shares, with a table or without.
template <bool kCodebook, bool kTables, bool kThresholds, typename T>
struct WarpVector {
  struct NoTable {
    __device__ NoTable(FastGrid /*grid*/, const FastRule& /*rule*/, int /*lane*/) {}
  };
  VectorGrid grid;
  FastGrid fast[1];
  bool is_suitable;
  std::conditional_t<kTables, LaneTable<kCodebook, T>, NoTable> table;
  Thresholds<T, 1> thresholds;

  /// Every lane must call.
  __device__ WarpVector(VectorGrid of_row, const FastRule& rule, int lane)
      : grid(of_row),
        fast{{of_row.qs, of_row.offset, 1.0f / of_row.qs}},
        is_suitable(kTables ? suits_table<kCodebook>(of_row.qs, of_row.offset)
                            : suits_reciprocal(of_row.qs, of_row.offset)),
        table(fast[0], rule, lane) {
    if constexpr (kThresholds) thresholds.set(0, grid.upper, grid.lower);
  }

  /// Quantises a pack that was read from x and writes it; returns the number of outliers. Every lane must call, those
  /// that are not active with anything.
  __device__ std::uint32_t simulate(Pack<T> pack, bool is_active, const T* x, T* out, const FastRule& rule) const {
    if (!is_suitable) {
      return is_active ? simulate_pack_plainly<kCodebook>(x, out, rule, [this](int) { return grid; }) : 0;
    }
    const Pack<T> exact = pack;
    if constexpr (kTables) {
      table.simulate(pack);
    } else {
      simulate_pack<kCodebook>(pack, fast, rule);
    }
    if (!is_active) return 0;
    std::uint32_t outliers = 0;
    if constexpr (kThresholds) outliers = thresholds.restore(exact, pack);
    store_pack(out, pack);
    return outliers;
  }
};

/// Quantises rows of at most kPacks * 32 packs, a vector each, a warp each.
///
///   1024 halves, kPacks 4     pack 0: channels 8 * lane ...     pack 1: 256 + 8 * lane ...     ...     pack 3
///
/// Launch  any number of blocks of kRowThreads
/// Work    ranges by shuffles, squares by strands; calibrated grids as they are
/// Reads   x of the quantised tokens once (rms: once more, from the caches); grids [tokens] in calibrated mode
/// Writes  out of the quantised tokens, may be x if *findings has been through all of x; in calibrated mode adds outliers;
///         kSomewhere into *findings
/// Needs   as check_rows_kernel; a row of at most kPacks * 32 packs; no outlier quantiles
template <bool kCodebook, bool kTables, RowGrids kGrids, int kPacks, typename T>
__global__ void __launch_bounds__(kRowThreads, kPacks <= 4 ? 4 : 1)
    simulate_rows_kernel(VectorPlan<T> plan, const VectorGrid* calibrated,
                         const __grid_constant__ CodebookTable codebook, Findings* findings) {
  __shared__ float boundaries[kCodebook ? kMaxCentroids : 1];
  __shared__ float values[kCodebook ? kMaxCentroids : 1];
  if (plan.x == plan.out && findings->first_bad != ~Counter{0}) return;
  const FastRule rule = load_rule(codebook, plan.options, boundaries, values);
  __syncthreads();
  constexpr int kStep = kWarpLanes * kPack<T>;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int channels = static_cast<int>(plan.channels);
  std::uint32_t outliers = 0;
  float finite = 0.0f;
  for (std::int64_t t = plan.first_token + static_cast<std::int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpLanes;
       t < plan.end_token; t += static_cast<std::int64_t>(gridDim.x) * kRowWarps) {
    const T* row = plan.x + t * plan.x_token_stride;
    T* out = plan.out + t * plan.out_token_stride;
    Pack<T> packs[kPacks] = {};
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int c = p * kStep + lane * kPack<T>;
      if (c < channels) packs[p] = load_pack(row + c);
    }
    VectorGrid grid{};
    if constexpr (kGrids == RowGrids::kCalibrated) {
      grid = calibrated[t];
    } else if constexpr (kGrids == RowGrids::kRms) {
      const UniformGrid one = rms_grid_of_warp(row, channels, lane);
      grid = {one.qs, one.offset, HUGE_VALF, -HUGE_VALF};
    } else {
      PackRange<T> range;
      range.clear();
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        if (p * kStep + lane * kPack<T> < channels) range.add(packs[p]);
      }
      float low = HUGE_VALF;
      float high = -HUGE_VALF;
      add_whole_pack(range, low, high);
      grid = range_grid_of_lanes(low, high, kWarpLanes, plan.options, findings);
    }
    const WarpVector<kCodebook, kTables, kGrids == RowGrids::kCalibrated, T> vector(grid, rule, lane);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int c = p * kStep + lane * kPack<T>;
      if (p * kStep >= channels) break;
      if constexpr (kGrids != RowGrids::kRange) finite = finite_sum(packs[p], finite);
      outliers += vector.simulate(packs[p], c < channels, row + c, out + c, rule);
    }
  }
  if constexpr (kGrids != RowGrids::kRange) tell_bad(!(finite == 0.0f), findings);
  if constexpr (kGrids == RowGrids::kCalibrated) count_outliers(outliers, findings);
}

}  // namespace kvpack::cuda
