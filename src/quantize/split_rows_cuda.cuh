// Dense-and-sparse quantisation of whole rows that fit a warp's registers: thresholds, grid and elements in one pass. The
// rules are quantize/outliers.h, uniform.h and codebook.h.
#pragma once

#include "quantize/outliers.h"
#include "quantize/rows_cuda.cuh"

namespace kvpack::cuda {

/// Elements at one end of a row that can be told apart cheaply; more (rows full of equal numbers) take the long way.
inline constexpr int kTailSlots = kWarpLanes;

/// Shared memory of a warp: keys of the elements at its row's upper and lower end, in any order.
struct RowTails {
  std::uint32_t keys[2][kTailSlots];
  std::uint32_t counts[2];
};

/// Places of a row's two order statistics next to a quantile, counted from the end of the row on its side.
struct TailPlaces {
  int nearer;
  int farther;  // nearer or nearer + 1

  /// Elements of the end that hold both, and the one behind them: the first dense one unless numbers repeat.
  [[nodiscard]] KVPACK_HOST_DEVICE int needed() const { return farther + 2; }
};

KVPACK_HOST_DEVICE inline TailPlaces upper_places(const OutlierPlan& plan, std::int64_t count) {
  return {static_cast<int>(count - 1 - plan.upper.above), static_cast<int>(count - 1 - plan.upper.below)};
}
KVPACK_HOST_DEVICE inline TailPlaces lower_places(const OutlierPlan& plan) {
  return {static_cast<int>(plan.lower.below), static_cast<int>(plan.lower.above)};
}

/// The `rank`-th largest of the lanes' keys, 0 where fewer lanes have one. Key 0 says none.
__device__ inline std::uint32_t ranked_key_of_lanes(std::uint32_t own, int rank) {
  std::uint32_t largest = 0;
  for (int found = 0; found < rank; found += __popc(__ballot_sync(kAllLanes, own == largest))) {
    if (found > 0 && own == largest) own = 0;
    largest = warp_most(own);
    if (largest == 0) break;
  }
  return largest;
}

/// The key whose rank is `place` from the largest, among those of lanes below `count`.
__device__ inline std::uint32_t key_at_place(std::uint32_t key, std::uint32_t rank, int place, bool is_active) {
  const std::uint32_t holder = __ballot_sync(kAllLanes, is_active && rank == static_cast<std::uint32_t>(place));
  return __shfl_sync(kAllLanes, key, __ffs(static_cast<int>(holder)) - 1);
}

/// A row in a warp's registers: kPacks packs a lane, of which those below `channels` count.
template <int kPacks, typename T>
struct WarpRow {
  const Pack<T> (&packs)[kPacks];
  int lane;
  int channels;

  __device__ bool has_pack(int p) const { return (p * kWarpLanes + lane) * kPack<T> < channels; }

  /// Calls f(value) for each of this lane's elements.
  template <typename F>
  __device__ void for_each(F&& f) const {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (!has_pack(p)) break;
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) f(element_value(packs[p].at[j]));
    }
  }

  /// The key at `place` of the sorted row, bit by bit: exact whatever the numbers, at 32 counts of the row.
  __device__ std::uint32_t sorted_key(std::int64_t place) const {
    std::uint32_t key = 0;
    for (std::uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
      std::uint32_t below = 0;
      for_each([&](float value) { below += ordered_key(value) < (key | bit); });
      if (warp_sum(below) <= place) key |= bit;
    }
    return key;
  }
};

/// Thresholds of a row and the range of its dense part, which is empty (low above high) where all are outliers.
struct RowSplit {
  float upper;
  float lower;
  float low;
  float high;
};

/// Any row, without hurry.
template <int kPacks, typename T>
__device__ RowSplit split_row_bit_by_bit(const WarpRow<kPacks, T>& row, const OutlierPlan& places) {
  const auto quantile = [&row](QuantilePosition position) {
    const float below = key_value(row.sorted_key(position.below));
    return interpolate(below, key_value(row.sorted_key(position.above)), position.weight);
  };
  const float upper = quantile(places.upper);
  const float lower = quantile(places.lower);
  RangeKeys dense = RangeKeys::none();
  std::uint32_t num_upper = 0;
  std::uint32_t num_lower = 0;
  row.for_each([&](float value) {
    const bool is_upper = value >= upper;
    const bool is_lower = value <= lower;
    num_upper += is_upper;
    num_lower += is_lower;
    if (!is_upper && !is_lower) dense.add(value);
  });
  num_upper = warp_sum(num_upper);
  num_lower = warp_sum(num_lower);
  const std::int64_t median_place = (row.channels - 1) / 2;
  if (num_lower > median_place || num_upper >= row.channels - median_place) {
    dense.add(key_value(row.sorted_key(median_place)));  // it stands in for the outliers
  }
  dense.low = warp_least(dense.low);
  dense.inverted_high = warp_least(dense.inverted_high);
  return {upper, lower, dense.low_value(), dense.high_value()};
}

/// One end of a row, largest keys first; `flip` turns ordered keys into keys that grow towards the end.
struct SortedTail {
  std::uint32_t key;
  std::uint32_t rank;
  bool is_active;
  std::uint32_t flip;

  __device__ SortedTail(const RowTails& tails, int side, int lane) : flip(side == 0 ? 0u : ~0u) {
    const int count = static_cast<int>(tails.counts[side]);
    is_active = lane < count;
    key = is_active ? tails.keys[side][lane] : 0u;
    rank = 0;
    for (int i = 0; i < count; ++i) {
      const std::uint32_t other = __shfl_sync(kAllLanes, key, i);
      rank += other > key || (other == key && i < lane);
    }
  }
  [[nodiscard]] __device__ float value_at(int place) const {
    return key_value(key_at_place(key, rank, place, is_active) ^ flip);
  }
  [[nodiscard]] __device__ float own_value() const { return key_value(key ^ flip); }
};

/// Thresholds from the ends of a row, which the lanes' largest and smallest elements bound:
///
///   lanes' largest       9 4 7 6    the third largest is 6, so at least three elements of the row are 6 or more, and
///   elements >= 6        9 8 7 6    sorting these few gives the places next to the quantile
///
/// The few are read once more, from `memory`, where the row comes from: the caches have it, and registers have no index.
/// False where numbers repeat so much that there are too many, or no dense one among them. Every lane must call.
template <int kPacks, typename T>
__device__ bool split_row_by_tails(const WarpRow<kPacks, T>& row, const T* memory, float own_low, float own_high,
                                   const OutlierPlan& places, RowTails& tails, RowSplit& split) {
  const TailPlaces above = upper_places(places, row.channels);
  const TailPlaces below = lower_places(places);
  const bool has_any = row.has_pack(0);
  const std::uint32_t high_key = ranked_key_of_lanes(has_any ? ordered_key(own_high) : 0u, above.needed());
  const std::uint32_t low_key = ranked_key_of_lanes(has_any ? ~ordered_key(own_low) : 0u, below.needed());
  if (high_key == 0 || low_key == 0) return false;
  const float high_bound = key_value(high_key);
  const float low_bound = key_value(~low_key);
  if (row.lane < 2) tails.counts[row.lane] = 0;
  __syncwarp();
  PackBounds<T, 1> bounds;
  bounds.set(0, high_bound, low_bound);
  const auto add = [&](int side, float value) {
    const std::uint32_t slot = atomicAdd(&tails.counts[side], 1u);
    if (slot < kTailSlots) tails.keys[side][slot] = side == 0 ? ordered_key(value) : ~ordered_key(value);
  };
  // Two packs' bits fit a word, as beyond() leaves every second byte free; four packs go together, as the warp goes around
  // as often as the lane that found most.
#pragma unroll
  for (int first = 0; first < kPacks; first += 4) {
    unsigned long long found = 0;
#pragma unroll
    for (int p = first; p < first + 4 && p < kPacks; ++p) {
      if (row.has_pack(p))
        found |= static_cast<unsigned long long>(bounds.beyond(row.packs[p])) << (p % 4 / 2 * 32 + p % 2 * 8);
    }
    for (; found != 0; found &= found - 1) {
      const int bit = __ffsll(static_cast<long long>(found)) - 1;
      const int pack = first + bit / 32 * 2 + bit / 8 % 2;
      const int of_pack = bit % 32 & ~8;
      add(bounds.side_of(of_pack),
          element_value(memory[(pack * kWarpLanes + row.lane) * kPack<T> + bounds.element_of(of_pack)]));
    }
  }
  __syncwarp();
  if (tails.counts[0] > kTailSlots || tails.counts[1] > kTailSlots) return false;
  const SortedTail upper_end(tails, 0, row.lane);
  const SortedTail lower_end(tails, 1, row.lane);
  split.upper = interpolate(upper_end.value_at(above.farther), upper_end.value_at(above.nearer), places.upper.weight);
  split.lower = interpolate(lower_end.value_at(below.nearer), lower_end.value_at(below.farther), places.lower.weight);

  const auto is_dense = [&split](const SortedTail& tail) {
    return tail.is_active && tail.own_value() < split.upper && tail.own_value() > split.lower;
  };
  const std::uint32_t high = warp_most(is_dense(upper_end) ? upper_end.key : 0u);
  const std::uint32_t low = warp_most(is_dense(lower_end) ? lower_end.key : 0u);
  split.high = key_value(high);
  split.low = key_value(~low);
  // Fewer than half of the row at either end: the median is dense.
  const int shorter_half = row.channels / 2;
  return high != 0 && low != 0 && tails.counts[0] < shorter_half && tails.counts[1] < shorter_half;
}

/// Quantises whole rows of at most kPacks * 32 packs with outliers, a warp each.
///
/// Launch  any number of blocks of kRowThreads
/// Work    each lane's range; the row's ends by shuffles (split_row_by_tails), rows full of equal numbers bit by bit
/// Reads   x of the quantised tokens once
/// Writes  out of the quantised tokens, may be x if *findings has been through all of x; adds outliers, and kSomewhere for
///         what is not finite, to *findings
/// Needs   as check_rows_kernel; vectors are whole rows; places of `channels` elements, needing at most 32 of either end
template <bool kCodebook, bool kTables, int kPacks, typename T>
__global__ void __launch_bounds__(kRowThreads, kPacks <= 4 ? 3 : 1)
    simulate_split_rows_kernel(VectorPlan<T> plan, OutlierPlan places, const __grid_constant__ CodebookTable codebook,
                               Findings* findings) {
  __shared__ float boundaries[kCodebook ? kMaxCentroids : 1];
  __shared__ float values[kCodebook ? kMaxCentroids : 1];
  __shared__ RowTails tails[kRowWarps];
  if (plan.x == plan.out && findings->first_bad != ~Counter{0}) return;
  const FastRule rule = load_rule(codebook, plan.options, boundaries, values);
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  std::uint32_t outliers = 0;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  Pack<T> packs[kPacks] = {};
  const WarpRow<kPacks, T> row{packs, lane, static_cast<int>(plan.channels)};
  for (std::int64_t t = plan.first_token + static_cast<std::int64_t>(blockIdx.x) * kRowWarps + warp; t < plan.end_token;
       t += static_cast<std::int64_t>(gridDim.x) * kRowWarps) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (row.has_pack(p)) {
        packs[p] = load_pack(plan.x + t * plan.x_token_stride + (p * kWarpLanes + lane) * kPack<T>);
      }
    }
    PackRange<T> range;
    range.clear();
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (row.has_pack(p)) range.add(packs[p]);
    }
    float low = HUGE_VALF;
    float high = -HUGE_VALF;
    add_whole_pack(range, low, high);
    const bool is_bad = row.has_pack(0) && is_bad_range(low, high);
    tell_bad(is_bad, findings);
    if (__any_sync(kAllLanes, is_bad)) continue;
    RowSplit split;
    if (!split_row_by_tails(row, plan.x + t * plan.x_token_stride, low, high, places, tails[warp], split))
      split = split_row_bit_by_bit(row, places);
    const UniformGrid grid = make_range_grid(split.low, split.high, plan.options);
    const WarpVector<kCodebook, kTables, true, T> vector({grid.qs, grid.offset, split.upper, split.lower}, rule, lane);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int c = (p * kWarpLanes + lane) * kPack<T>;
      if (p * kWarpLanes * kPack<T> >= plan.channels) break;
      outliers += vector.simulate(packs[p], row.has_pack(p), plan.x + t * plan.x_token_stride + c,
                                  plan.out + t * plan.out_token_stride + c, rule);
    }
    __syncwarp();  // the next row writes tails
  }
  count_outliers(outliers, findings);
}

}  // namespace kvpack::cuda
