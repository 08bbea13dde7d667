// Outlier thresholds of long per-channel vectors in one pass and a bit: a sample bounds both ends of a vector, one pass
// collects what lies beyond the bounds, and the few elements found hold every order statistic that thresholds and the dense
// range need. Vectors for which that fails (numbers that repeat, tokens in an order that fools the sample) are listed, and
// outliers_cuda.cuh selects in them. The rule is quantize/outliers.h.
#pragma once

#include "quantize/outliers_cuda.cuh"
#include "quantize/sample_tails_cuda.cuh"

namespace kvpack::cuda {

inline constexpr int kCollectTokens = 256;  // of a tile
inline constexpr int kCollectSlots = 16;    // elements of a channel's end that a tile keeps in shared memory
inline constexpr int kHeldKeys = 16;        // of a list that a lane keeps in registers

/// Element j of a pack in registers, j known at run time.
template <typename T>
__device__ float picked_value(const Pack<T>& pack, int j) {
  float value = element_value(pack.at[0]);
#pragma unroll
  for (int i = 1; i < kPack<T>; ++i) value = i == j ? element_value(pack.at[i]) : value;
  return value;
}

/// Shared memory of collect_tails_kernel: the ends of a tile's channels, element j of lane l at [j][l].
template <typename T>
struct CollectedTails {
  std::uint32_t counts[2][kPack<T>][kWarpLanes];
  std::uint32_t keys[2][kCollectSlots][kPack<T>][kWarpLanes];
};

/// Keys from here on, of either end, are no finite numbers.
inline constexpr std::uint32_t kInfinityKey = 0xff800000u;

/// A list in memory for each end of each vector: [num_vectors][2][capacity] keys.
struct TailLists {
  std::uint32_t* keys;
  std::int64_t capacity;

  __device__ std::uint32_t* list(std::int64_t vector, int side) const { return keys + (vector * 2 + side) * capacity; }
};

/// Lists what lies at or beyond the bounds.
///
/// Launch  any number of blocks of kColumnThreads
/// Work    tiles of kCollectTokens tokens x kColumnChannels channels; shared lists first, then one place in memory for all
/// Reads   x of the quantised tokens once; bounds [num_vectors]
/// Writes  lists; adds to the counts of bounds, beyond the capacity too
/// Needs   as column_ranges_kernel
template <typename T>
__global__ void __launch_bounds__(kColumnThreads, 3)
    collect_tails_kernel(VectorPlan<T> plan, TailBounds* bounds, TailLists lists) {
  __shared__ CollectedTails<T> found;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  const std::int64_t across = divide_up(plan.channels, kColumnChannels<T>);
  const std::int64_t down = divide_up(plan.group, kCollectTokens);
  for (std::int64_t tile = blockIdx.x; tile < across * down * plan.num_groups; tile += gridDim.x) {
    const std::int64_t group = tile / across / down;
    const std::int64_t channel = tile % across * kColumnChannels<T> + lane * kPack<T>;
    const TokenRange tokens = plan.token_range(group);
    const std::int64_t first = tokens.first + tile / across % down * kCollectTokens;
    const std::int64_t end = min(first + kCollectTokens, tokens.end);
    const std::int64_t vector = group * plan.channels + channel;
    const bool is_active = channel < plan.channels;
    for (int i = static_cast<int>(threadIdx.x); i < 2 * kColumnChannels<T>; i += kColumnThreads) {
      (&found.counts[0][0][0])[i] = 0;
    }
    PackBounds<T, kPack<T>> own;
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      const TailBounds of = is_active ? bounds[vector + j] : TailBounds{};
      own.set(j, key_value(of.keys[0]), key_value(~of.keys[1]));
    }
    __syncthreads();
    const auto add = [&](int j, int side, std::uint32_t key) {
      const std::uint32_t slot = atomicAdd(&found.counts[side][j][lane], 1u);
      if (slot < kCollectSlots) {
        found.keys[side][slot][j][lane] = key;
        return;
      }
      const std::uint32_t place = atomicAdd(&bounds[vector + j].counts[side], 1u);
      if (place < lists.capacity) lists.list(vector + j, side)[place] = key;
    };
    for (std::int64_t batch = first + warp; is_active && batch < end; batch += kColumnBatch * kColumnWarps) {
      Pack<T> packs[kColumnBatch];
#pragma unroll
      for (int b = 0; b < kColumnBatch; ++b) {
        const std::int64_t t = min(batch + b * kColumnWarps, end - 1);
        packs[b] = load_pack(plan.x + t * plan.x_token_stride + channel);
      }
#pragma unroll
      for (int b = 0; b < kColumnBatch; ++b) {
        std::uint32_t beyond = batch + b * kColumnWarps < end ? own.beyond(packs[b]) : 0u;
        // Lanes find different elements, so a warp goes around as often as the lane that found most.
        for (; beyond != 0; beyond &= beyond - 1) {
          const int bit = __ffs(static_cast<int>(beyond)) - 1;
          const int side = own.side_of(bit);
          const int j = own.element_of(bit);
          const std::uint32_t key = ordered_key(picked_value(packs[b], j));
          add(j, side, side == 0 ? key : ~key);
        }
      }
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < 2 * kColumnChannels<T>; i += kColumnThreads) {
      const int side = i / kColumnChannels<T>;
      const int j = i % kColumnChannels<T> / kWarpLanes;
      const std::int64_t target = group * plan.channels + tile % across * kColumnChannels<T> + lane * kPack<T> + j;
      const std::uint32_t count = min(found.counts[side][j][lane], std::uint32_t{kCollectSlots});
      if (target - group * plan.channels >= plan.channels || count == 0) continue;
      const std::uint32_t place = atomicAdd(&bounds[target].counts[side], count);
      for (std::uint32_t k = 0; k < count && place + k < lists.capacity; ++k) {
        lists.list(target, side)[place + k] = found.keys[side][k][j][lane];
      }
    }
    __syncthreads();  // the next tile empties the shared lists
  }
}

/// A list as a warp reads it: the first kHeldKeys * 32 keys from registers, the others from memory.
struct HeldList {
  const std::uint32_t* keys;
  std::uint32_t count;
  std::uint32_t lane;
  std::uint32_t held[kHeldKeys];  // 0 behind the end: below every key

  __device__ HeldList(const std::uint32_t* list, std::uint32_t length, int own_lane)
      : keys(list), count(length), lane(static_cast<std::uint32_t>(own_lane)) {
#pragma unroll
    for (std::uint32_t i = 0; i < kHeldKeys; ++i) {
      held[i] = i * kWarpLanes + lane < count ? keys[i * kWarpLanes + lane] : 0u;
    }
  }
  /// Calls f(key) for each of this lane's keys, and for zeros.
  template <typename F>
  __device__ void for_each(F&& f) const {
#pragma unroll
    for (const std::uint32_t key : held) f(key);
#pragma unroll 4
    for (std::uint32_t i = kHeldKeys * kWarpLanes + lane; i < count; i += kWarpLanes) f(keys[i]);
  }
};

/// The two neighbours of a quantile among a list's keys, and the end of the vector.
struct TailPair {
  std::uint32_t nearer;
  std::uint32_t farther;
  std::uint32_t last;
};

/// Every lane must call.
template <typename T>
__device__ TailPair find_places(const HeldList& list, std::uint32_t bound, TailPlaces places) {
  std::uint32_t last = 0;
  list.for_each([&](std::uint32_t key) { last = max(last, key); });
  TailPair pair;
  pair.last = warp_most(last);
  const auto rank = static_cast<std::uint32_t>(places.farther) + 1;
  const std::uint32_t prefix = ranked_prefix<T>(rank, bound, pair.last, [&list](std::uint32_t least) {
    std::uint32_t at_least = 0;
    list.for_each([&](std::uint32_t key) { at_least += key >= least; });
    return at_least;
  });
  std::uint32_t farther = ~0u;
  list.for_each([&](std::uint32_t key) { farther = key >= prefix ? min(farther, key) : farther; });
  pair.farther = warp_least(farther);
  std::uint32_t above = 0;
  std::uint32_t next = ~0u;
  list.for_each([&](std::uint32_t key) {
    above += key > pair.farther;
    next = key > pair.farther ? min(next, key) : next;
  });
  above = warp_sum(above);
  next = warp_least(next);
  pair.nearer = above > static_cast<std::uint32_t>(places.nearer) ? next : pair.farther;
  return pair;
}

/// The largest key of a list whose element lies between the thresholds, 0 for none. Every lane must call.
__device__ inline std::uint32_t first_dense(const HeldList& list, std::uint32_t flip, float upper, float lower) {
  std::uint32_t dense = 0;
  list.for_each([&](std::uint32_t key) {
    const float value = key_value(key ^ flip);
    if (key != 0 && value < upper && value > lower) dense = max(dense, key);
  });
  return warp_most(dense);
}

/// Grids and thresholds from the lists.
///
/// Launch  any number of blocks of kRowThreads
/// Work    a warp per vector
/// Reads   bounds [num_vectors] and lists
/// Writes  grids [num_vectors]; is_open [num_vectors]: 1 where the lists do not tell, else 0; kSomewhere into *findings
/// Needs   nothing
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    split_from_tails_kernel(VectorPlan<T> plan, const TailBounds* bounds, TailLists lists, VectorGrid* grids,
                            std::uint8_t* is_open, Findings* findings) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kRowWarps;
  for (std::int64_t v = static_cast<std::int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpLanes;
       v < plan.num_vectors; v += step) {
    const TokenRange tokens = plan.token_range(v / plan.channels);
    const std::int64_t count = tokens.end - tokens.first;
    const OutlierPlan places = make_outlier_plan(plan.options.outlier_fraction, count);
    const TailPlaces above = upper_places(places, count);
    const TailPlaces below = lower_places(places);
    const TailBounds found = bounds[v];
    const std::int64_t most = min(lists.capacity, (count - 1) / 2);  // fewer than half: the median is dense
    const auto is_usable = [&](int side, TailPlaces wanted) {
      const std::int64_t listed = found.counts[side];
      return found.keys[side] != 0 && listed >= wanted.needed() && listed <= most;
    };
    bool is_closed = is_usable(0, above) && is_usable(1, below);
    if (is_closed) {
      const HeldList uppers(lists.list(v, 0), found.counts[0], lane);
      const HeldList lowers(lists.list(v, 1), found.counts[1], lane);
      const TailPair top = find_places<T>(uppers, found.keys[0], above);
      const TailPair bottom = find_places<T>(lowers, found.keys[1], below);
      tell_bad(max(top.last, bottom.last) >= kInfinityKey, findings);
      const float upper = interpolate(key_value(top.farther), key_value(top.nearer), places.upper.weight);
      const float lower = interpolate(key_value(~bottom.nearer), key_value(~bottom.farther), places.lower.weight);
      const std::uint32_t high = first_dense(uppers, 0u, upper, lower);
      const std::uint32_t low = first_dense(lowers, ~0u, upper, lower);
      is_closed = high != 0 && low != 0;
      if (is_closed && lane == 0) {
        const UniformGrid grid = make_range_grid(key_value(~low), key_value(high), plan.options);
        grids[v] = {grid.qs, grid.offset, upper, lower};
      }
    }
    if (lane == 0) is_open[v] = is_closed ? 0 : 1;
  }
}

}  // namespace kvpack::cuda
