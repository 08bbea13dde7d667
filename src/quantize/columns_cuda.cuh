// Per-channel quantisation of sequences whose channels lie side by side, aligned: 16-byte loads, lanes along channels.
// Long vectors take two passes, groups of at most 128 tokens one. The rules are quantize/uniform.h and codebook.h.
#pragma once

#include "quantize/tables_cuda.cuh"

namespace kvpack::cuda {

inline constexpr int kColumnWarps = 8;
inline constexpr int kColumnThreads = kColumnWarps * kWarpLanes;
inline constexpr int kColumnTokens = 128;  // of a tile: 16 loads a thread
inline constexpr int kRangeTokens = 256;   // of a tile that is only read: merging costs as much as a dozen loads
inline constexpr int kColumnBatch = 4;     // loads of a thread that are on their way together
static_assert(kColumnTokens % (kColumnWarps * kColumnBatch) == 0);

/// Channels of a tile; a block has at least as many threads.
template <typename T>
inline constexpr int kColumnChannels = kPack<T> * kWarpLanes;

/// Grids of a tile's channels in shared memory, element j of lane l at [j][l]: no two lanes share a bank.
template <typename T, typename Value>
using ColumnValues = Value[kPack<T>][kWarpLanes];

/// A tile: at most kTokens tokens of one group, kColumnChannels channels.
struct ColumnTile {
  std::int64_t group;
  std::int64_t first_channel;
  TokenRange tokens;
};

template <int kTokens, typename T>
__host__ __device__ std::int64_t column_tiles(const VectorPlan<T>& plan) {
  return divide_up(plan.channels, kColumnChannels<T>) * divide_up(plan.group, kTokens) * plan.num_groups;
}

template <int kTokens, typename T>
__device__ ColumnTile column_tile(const VectorPlan<T>& plan, std::int64_t index) {
  const std::int64_t across = divide_up(plan.channels, kColumnChannels<T>);
  const std::int64_t down = divide_up(plan.group, kTokens);
  ColumnTile tile{index / across / down, index % across * kColumnChannels<T>, {}};
  const TokenRange tokens = plan.token_range(tile.group);
  tile.tokens.first = tokens.first + index / across % down * kTokens;
  tile.tokens.end = min(tile.tokens.first + kTokens, tokens.end);
  return tile;
}

/// Ranges that the warps of a block have found for a tile's channels, laid out as ColumnValues.
template <typename T>
struct ColumnRanges {
  float low[kColumnWarps][kPack<T>][kWarpLanes];
  float high[kColumnWarps][kPack<T>][kWarpLanes];

  __device__ void put(const PackRange<T>& own, int warp, int lane) {
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      low[warp][j][lane] = own.low_at(j);
      high[warp][j][lane] = own.high_at(j);
    }
  }
  /// Of element j of a lane, over all warps; a barrier after put() must come before.
  [[nodiscard]] __device__ float2 merged(int j, int lane) const {
    float2 range{low[0][j][lane], high[0][j][lane]};
#pragma unroll
    for (int warp = 1; warp < kColumnWarps; ++warp) {
      range.x = min_or_nan(range.x, low[warp][j][lane]);
      range.y = max_or_nan(range.y, high[warp][j][lane]);
    }
    return range;
  }
};

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
/// Work    tiles of kRangeTokens tokens; warp w takes tokens w, w + 8, ...; the block merges, then memory
/// Reads   x of the quantised tokens once
/// Writes  merges into ranges [num_vectors], which start as all ones; kSomewhere into *findings
/// Needs   channels side by side, all rows aligned to 16 bytes, channels a multiple of kPack
template <typename T>
__global__ void __launch_bounds__(kColumnThreads)
    column_ranges_kernel(VectorPlan<T> plan, RangeKeys* ranges, Findings* findings) {
  __shared__ ColumnRanges<T> shared;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  const std::int64_t num_tiles = column_tiles<kRangeTokens>(plan);
  for (std::int64_t index = blockIdx.x; index < num_tiles; index += gridDim.x) {
    const ColumnTile tile = column_tile<kRangeTokens>(plan, index);
    const std::int64_t channel = tile.first_channel + lane * kPack<T>;
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
    shared.put(range, warp, lane);
    __syncthreads();
    if (threadIdx.x < kColumnChannels<T> && channel + warp < plan.channels) {
      const float2 merged = shared.merged(warp, lane);
      merge_atomically(ranges[tile.group * plan.channels + channel + warp],
                       {ordered_key(merged.x), ~ordered_key(merged.y)});
    }
    __syncthreads();  // the next tile writes shared
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

struct NoTables {};
template <typename T>
struct OwnGrids {
  FastGrid of_element[kPack<T>];

  __device__ OwnGrids(NoTables /*tables*/, int /*lane*/) {}
};

/// One thread's channels of a tile, in registers as far as its elements need them: kTables from ColumnTables.
template <bool kCodebook, bool kTables, bool kThresholds, typename T>
struct OwnColumns {
  using SharedTables = std::conditional_t<kTables, ColumnTables<kCodebook, T>, NoTables>;

  const ColumnGrids<T>& shared;
  int lane;
  bool is_suitable;
  std::conditional_t<kTables, OwnTables<kCodebook, T>, OwnGrids<T>> grids;
  std::conditional_t<kThresholds, Thresholds<T, kPack<T>>, bool> thresholds;

  __device__ OwnColumns(const ColumnGrids<T>& of_tile, const SharedTables& tables, int own_lane, const FastRule& rule)
      : shared(of_tile), lane(own_lane), is_suitable(true), grids(tables, own_lane) {
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      const float qs = shared.qs[j][lane];
      const float offset = shared.offset[j][lane];
      if constexpr (kTables) {
        is_suitable &= suits_table<kCodebook>(qs, offset);
        grids.set(j, qs, offset, rule.levels);
      } else {
        is_suitable &= suits_reciprocal(qs, offset);
        grids.of_element[j] = {qs, offset, shared.inverse[j][lane]};
      }
      if constexpr (kThresholds) thresholds.set(j, shared.upper[j][lane], shared.lower[j][lane]);
    }
  }

  /// Quantises a pack that was read from x and writes it; returns the number of outliers.
  __device__ std::uint32_t simulate(Pack<T>& pack, const T* x, T* out, const FastRule& rule) const {
    if (!is_suitable) {
      return simulate_pack_plainly<kCodebook>(x, out, rule, [this](int j) {
        return VectorGrid{shared.qs[j][lane], shared.offset[j][lane], shared.upper[j][lane], shared.lower[j][lane]};
      });
    }
    std::uint32_t outliers = 0;
    const Pack<T> exact = pack;
    if constexpr (kTables) {
      grids.simulate(pack);
    } else {
      simulate_pack<kCodebook>(pack, grids.of_element, rule);
    }
    if constexpr (kThresholds) outliers = thresholds.restore(exact, pack);
    store_pack(out, pack);
    return outliers;
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
template <bool kCodebook, bool kTables, bool kThresholds, typename T>
__global__ void __launch_bounds__(kColumnThreads, 3)
    write_columns_kernel(VectorPlan<T> plan, const RangeKeys* ranges, const VectorGrid* vector_grids,
                         const __grid_constant__ CodebookTable codebook, Findings* findings) {
  using Own = OwnColumns<kCodebook, kTables, kThresholds, T>;
  __shared__ ColumnGrids<T> shared;
  __shared__ typename Own::SharedTables tables;
  __shared__ float boundaries[kCodebook ? kMaxCentroids : 1];
  __shared__ float values[kCodebook ? kMaxCentroids : 1];
  if (plan.x == plan.out && findings->first_bad != ~Counter{0}) return;
  const FastRule rule = load_rule(codebook, plan.options, boundaries, values);
  const bool is_calibrated = plan.options.causality == Causality::kCalibrated;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  const std::int64_t num_tiles = column_tiles<kColumnTokens>(plan);
  std::uint32_t outliers = 0;
  for (std::int64_t index = blockIdx.x; index < num_tiles; index += gridDim.x) {
    const ColumnTile tile = column_tile<kColumnTokens>(plan, num_tiles - 1 - index);
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
    if constexpr (kTables) {
      const int j = warp % kPack<T>;
      if (tile.first_channel + lane * kPack<T> + j < plan.channels) {
        const FastGrid grid{shared.qs[j][lane], shared.offset[j][lane], shared.inverse[j][lane]};
        tables.fill(grid, rule, j, lane, warp / kPack<T>, kColumnWarps / kPack<T>);
      }
      __syncthreads();
    }
    const std::int64_t channel = tile.first_channel + lane * kPack<T>;
    if (channel < plan.channels) {
      const Own own(shared, tables, lane, rule);
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
          outliers += own.simulate(packs[b], plan.x + t * plan.x_token_stride + channel,
                                   plan.out + t * plan.out_token_stride + channel, rule);
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
  __shared__ ColumnRanges<T> ranges;
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
    ranges.put(range, warp, lane);
    __syncthreads();
    if (threadIdx.x < kColumnChannels<T>) {
      const float2 own = ranges.merged(warp, lane);
      // + 0 as ordered keys have it: one range for zeros of both signs.
      shared.set(make_range_grid(own.x + 0.0f, own.y + 0.0f, plan.options), HUGE_VALF, -HUGE_VALF);
    }
    __syncthreads();
    if (is_active) {
      const OwnColumns<kCodebook, false, false, T> own(shared, {}, lane, rule);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const std::int64_t t = tokens.first + warp + r * kColumnWarps;
        if (t >= tokens.end) break;
        own.simulate(packs[r], plan.x + t * plan.x_token_stride + channel,
                     plan.out + t * plan.out_token_stride + channel, rule);
      }
    }
    __syncthreads();  // the next tile writes shared memory
  }
}

}  // namespace kvpack::cuda
