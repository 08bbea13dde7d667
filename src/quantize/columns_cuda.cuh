// Per-channel quantisation of sequences whose channels lie side by side, aligned: 16-byte loads, lanes along channels.
// Long vectors take two passes, groups of at most 128 tokens one. The rules are quantize/uniform.h and codebook.h.
#pragma once

#include "quantize/packs_cuda.cuh"

namespace kvpack::cuda {

inline constexpr int kColumnWarps = 8;
inline constexpr int kColumnThreads = kColumnWarps * kWarpLanes;
inline constexpr int kColumnTokens = 128;  // of a tile: 16 loads a thread
inline constexpr int kColumnBatch = 4;     // loads of a thread that are on their way together
static_assert(kColumnTokens % (kColumnWarps * kColumnBatch) == 0);

/// Channels of a tile; a block has at least as many threads.
template <typename T>
inline constexpr int kColumnChannels = kPack<T> * kWarpLanes;

/// Ranges or grids of a tile's channels in shared memory, element j of lane l at [j][l]: no two lanes share a bank.
template <typename T, typename Value>
using ColumnValues = Value[kPack<T>][kWarpLanes];

/// A tile: kColumnTokens tokens at most of one group, kColumnChannels channels.
struct ColumnTile {
  std::int64_t group;
  std::int64_t first_channel;
  TokenRange tokens;
};

template <typename T>
__host__ __device__ std::int64_t column_tiles(const VectorPlan<T>& plan) {
  return divide_up(plan.channels, kColumnChannels<T>) * divide_up(plan.group, kColumnTokens) * plan.num_groups;
}

template <typename T>
__device__ ColumnTile column_tile(const VectorPlan<T>& plan, std::int64_t index) {
  const std::int64_t across = divide_up(plan.channels, kColumnChannels<T>);
  const std::int64_t down = divide_up(plan.group, kColumnTokens);
  ColumnTile tile{index / across / down, index % across * kColumnChannels<T>, {}};
  const TokenRange tokens = plan.token_range(tile.group);
  tile.tokens.first = tokens.first + index / across % down * kColumnTokens;
  tile.tokens.end = min(tile.tokens.first + kColumnTokens, tokens.end);
  return tile;
}

/// Merges the ranges of a block's threads into shared keys, which must be none() everywhere before.
template <typename T>
__device__ void merge_columns(const PackRange<T>& own, int lane, ColumnValues<T, RangeKeys>& shared) {
#pragma unroll
  for (int j = 0; j < kPack<T>; ++j) {
    merge_atomically(shared[j][lane], {ordered_key(own.low_at(j)), ~ordered_key(own.high_at(j))});
  }
}

template <typename T>
__device__ bool has_bad_range(const PackRange<T>& range) {
  bool is_bad = false;
#pragma unroll
  for (int j = 0; j < kPack<T>; ++j) is_bad |= is_bad_range(range.low_at(j), range.high_at(j));
  return is_bad;
}

/// Smallest and largest of each vector.
///
/// Launch  any number of blocks of kColumnThreads
/// Work    tiles of kColumnTokens tokens; warp w takes tokens w, w + 8, ...; the block merges, then memory
/// Reads   x of the quantised tokens once
/// Writes  merges into ranges [num_vectors], which start as all ones; kSomewhere into *findings
/// Needs   channels side by side, all rows aligned to 16 bytes, channels a multiple of kPack
template <typename T>
__global__ void __launch_bounds__(kColumnThreads)
    column_ranges_kernel(VectorPlan<T> plan, RangeKeys* ranges, Findings* findings) {
  __shared__ ColumnValues<T, RangeKeys> shared;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  const std::int64_t num_tiles = column_tiles(plan);
  for (std::int64_t index = blockIdx.x; index < num_tiles; index += gridDim.x) {
    const ColumnTile tile = column_tile(plan, index);
    const std::int64_t channel = tile.first_channel + lane * kPack<T>;
    if (threadIdx.x < kColumnChannels<T>) shared[threadIdx.x / kWarpLanes][lane] = RangeKeys::none();
    PackRange<T> range;
    range.clear();
    if (channel < plan.channels) {
      const T* x = plan.x + channel;
#pragma unroll 8
      for (std::int64_t t = tile.tokens.first + warp; t < tile.tokens.end; t += kColumnWarps) {
        range.add(load_pack(x + t * plan.x_token_stride));
      }
      tell_bad(has_bad_range(range), findings);
    }
    __syncthreads();  // shared is empty
    merge_columns(range, lane, shared);
    __syncthreads();
    if (threadIdx.x < kColumnChannels<T>) {
      const int j = static_cast<int>(threadIdx.x) / kWarpLanes;
      const std::int64_t own = tile.first_channel + lane * kPack<T> + j;
      if (own < plan.channels) merge_atomically(ranges[tile.group * plan.channels + own], shared[j][lane]);
    }
    __syncthreads();  // the next tile empties shared
  }
}

/// Grids of a tile's channels in shared memory.
template <typename T>
struct ColumnGrids {
  ColumnValues<T, float> qs;
  ColumnValues<T, float> offset;
  ColumnValues<T, float> inverse;
  ColumnValues<T, float> upper;
  ColumnValues<T, float> lower;

  /// The grid of this thread's channel; a thread a channel calls.
  __device__ void set(UniformGrid grid, float above, float below) {
    const unsigned j = threadIdx.x / kWarpLanes;
    const unsigned lane = threadIdx.x % kWarpLanes;
    qs[j][lane] = grid.qs;
    offset[j][lane] = grid.offset;
    inverse[j][lane] = 1.0f / grid.qs;
    upper[j][lane] = above;
    lower[j][lane] = below;
  }
};

/// One thread's grids in registers.
template <typename T>
struct OwnGrids {
  FastGrid grids[kPack<T>];
  float upper[kPack<T>];
  float lower[kPack<T>];
  bool suits_reciprocal;

  __device__ OwnGrids(const ColumnGrids<T>& shared, int lane) : suits_reciprocal(true) {
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      grids[j] = {shared.qs[j][lane], shared.offset[j][lane], shared.inverse[j][lane]};
      upper[j] = shared.upper[j][lane];
      lower[j] = shared.lower[j][lane];
      suits_reciprocal &= cuda::suits_reciprocal(grids[j].qs, grids[j].offset);
    }
  }

  /// Quantises a pack; returns the number of outliers.
  template <bool kCodebook, bool kThresholds>
  __device__ std::uint32_t simulate(Pack<T>& pack, const FastRule& rule) const {
    if constexpr (kThresholds) {
      return suits_reciprocal ? simulate_dense<kCodebook, true>(pack, grids, upper, lower, rule)
                              : simulate_dense<kCodebook, false>(pack, grids, upper, lower, rule);
    } else {
      if (suits_reciprocal) {
        simulate_pack<kCodebook, true>(pack, grids, rule);
      } else {
        simulate_pack<kCodebook, false>(pack, grids, rule);
      }
      return 0;
    }
  }
};

/// Quantises long vectors from their ranges, or from finished grids with thresholds.
///
/// Launch  any number of blocks of kColumnThreads
/// Work    the tiles of column_ranges_kernel backwards: what that one read last is still in the L2 cache
/// Reads   x once; ranges [num_vectors], or with kThresholds grids ([channels] in calibrated mode, else [num_vectors])
/// Writes  out of the quantised tokens, may be x, unless *findings names a bad value; with kThresholds adds outliers and
///         kSomewhere to *findings
/// Needs   as column_ranges_kernel; out of x: no bad value that *findings does not know yet
template <bool kCodebook, bool kThresholds, typename T>
__global__ void __launch_bounds__(kColumnThreads, 2)
    write_columns_kernel(VectorPlan<T> plan, const RangeKeys* ranges, const VectorGrid* vector_grids,
                         const __grid_constant__ CodebookTable codebook, Findings* findings) {
  __shared__ ColumnGrids<T> shared;
  __shared__ float boundaries[kCodebook ? kMaxCentroids : 1];
  __shared__ float values[kCodebook ? kMaxCentroids : 1];
  if (plan.x == plan.out && findings->first_bad != ~Counter{0}) return;
  const FastRule rule = load_rule(codebook, plan.options, boundaries, values);
  const bool is_calibrated = plan.options.causality == Causality::kCalibrated;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  const std::int64_t num_tiles = column_tiles(plan);
  std::uint32_t outliers = 0;
  for (std::int64_t index = blockIdx.x; index < num_tiles; index += gridDim.x) {
    const ColumnTile tile = column_tile(plan, num_tiles - 1 - index);
    if (threadIdx.x < kColumnChannels<T>) {
      const std::int64_t channel = tile.first_channel + lane * kPack<T> + warp;
      if (channel < plan.channels) {
        const std::int64_t vector = (is_calibrated ? 0 : tile.group * plan.channels) + channel;
        if constexpr (kThresholds) {
          const VectorGrid grid = vector_grids[vector];
          shared.set({grid.qs, grid.offset}, grid.upper, grid.lower);
        } else {
          const RangeKeys range = ranges[vector];
          shared.set(make_range_grid(range.low_value(), range.high_value(), plan.options), HUGE_VALF, -HUGE_VALF);
        }
      }
    }
    __syncthreads();
    const std::int64_t channel = tile.first_channel + lane * kPack<T>;
    if (channel < plan.channels) {
      const OwnGrids<T> own(shared, lane);
      float finite = 0.0f;
      for (std::int64_t first = tile.tokens.first + warp; first < tile.tokens.end;
           first += kColumnBatch * kColumnWarps) {
        Pack<T> packs[kColumnBatch] = {};
#pragma unroll
        for (int b = 0; b < kColumnBatch; ++b) {
          const std::int64_t t = first + b * kColumnWarps;
          if (t < tile.tokens.end) packs[b] = load_pack(plan.x + t * plan.x_token_stride + channel);
        }
#pragma unroll
        for (int b = 0; b < kColumnBatch; ++b) {
          const std::int64_t t = first + b * kColumnWarps;
          if (t >= tile.tokens.end) break;
          if constexpr (kThresholds) finite = finite_sum(packs[b], finite);
          outliers += own.template simulate<kCodebook, kThresholds>(packs[b], rule);
          store_pack(plan.out + t * plan.out_token_stride + channel, packs[b]);
        }
      }
      if constexpr (kThresholds) tell_bad(!(finite == 0.0f), findings);
    }
    __syncthreads();  // the next tile writes shared
  }
  if constexpr (kThresholds) count_outliers(outliers, findings);
}

/// Quantises groups of at most kRows * kColumnWarps tokens in one pass, the group in registers.
///
///   group of 32 tokens, kRows 4      warp 0   tokens 0  8 16 24
///                                    warp 1   tokens 1  9 17 25
///
/// Launch  any number of blocks of kColumnThreads
/// Work    a tile is a group x kColumnChannels channels: ranges, merged by the block; a thread makes a channel's grid
/// Reads   x of the quantised tokens once
/// Writes  out of the quantised tokens, may be x if *findings has been through all of x; kSomewhere into *findings
/// Needs   as column_ranges_kernel
template <bool kCodebook, int kRows, typename T>
__global__ void __launch_bounds__(kColumnThreads, kRows <= 8 ? 2 : 1)
    column_groups_kernel(VectorPlan<T> plan, const __grid_constant__ CodebookTable codebook, Findings* findings) {
  __shared__ ColumnValues<T, RangeKeys> ranges;
  __shared__ ColumnGrids<T> shared;
  __shared__ float boundaries[kCodebook ? kMaxCentroids : 1];
  __shared__ float values[kCodebook ? kMaxCentroids : 1];
  if (plan.x == plan.out && findings->first_bad != ~Counter{0}) return;
  const FastRule rule = load_rule(codebook, plan.options, boundaries, values);
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  const std::int64_t across = divide_up(plan.channels, kColumnChannels<T>);
  for (std::int64_t index = blockIdx.x; index < across * plan.num_groups; index += gridDim.x) {
    const std::int64_t first_channel = index % across * kColumnChannels<T>;
    const TokenRange tokens = plan.token_range(index / across);
    const std::int64_t channel = first_channel + lane * kPack<T>;
    const bool is_active = channel < plan.channels;
    if (threadIdx.x < kColumnChannels<T>) ranges[warp][lane] = RangeKeys::none();
    Pack<T> packs[kRows] = {};
    PackRange<T> range;
    range.clear();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const std::int64_t t = tokens.first + warp + r * kColumnWarps;
      if (is_active && t < tokens.end) packs[r] = load_pack(plan.x + t * plan.x_token_stride + channel);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (is_active && tokens.first + warp + r * kColumnWarps < tokens.end) range.add(packs[r]);
    }
    tell_bad(has_bad_range(range), findings);
    __syncthreads();  // ranges are empty
    merge_columns(range, lane, ranges);
    __syncthreads();
    if (threadIdx.x < kColumnChannels<T>) {
      const RangeKeys own = ranges[warp][lane];
      shared.set(make_range_grid(own.low_value(), own.high_value(), plan.options), HUGE_VALF, -HUGE_VALF);
    }
    __syncthreads();
    if (is_active) {
      const OwnGrids<T> own(shared, lane);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const std::int64_t t = tokens.first + warp + r * kColumnWarps;
        if (t >= tokens.end) break;
        own.template simulate<kCodebook, false>(packs[r], rule);
        store_pack(plan.out + t * plan.out_token_stride + channel, packs[r]);
      }
    }
    __syncthreads();  // the next tile writes shared memory
  }
}

}  // namespace kvpack::cuda
