// Outlier thresholds on the GPU: exact order statistics by radix selection, four passes of eight bits over ordered keys.
// The rule is quantize/outliers.h; nothing here decides what an outlier is.
#pragma once

#include "quantize/outliers.h"
#include "quantize/uniform_cuda.cuh"

namespace kvpack::cuda {

inline constexpr int kBins = 256;

/// Shared memory of a block that selects in kVectors vectors at a time; two places each (the upper and the lower quantile).
template <int kVectors>
struct Selection {
  std::uint32_t histogram[kVectors][2][kBins + 1];  // one more: equal bins of two vectors lie in different banks
  std::uint32_t key[kVectors][2];                   // the wanted keys, known from the top byte down
  std::uint32_t place[kVectors][2];                 // the wanted place among the elements with these known bytes
  std::uint32_t equal[kVectors][2];                 // elements that have the key
  std::uint32_t next[kVectors][2];                  // the smallest key above it
  RangeKeys dense[kVectors];                        // range of what is no outlier
  std::uint32_t num_upper[kVectors];
  std::uint32_t num_lower[kVectors];
  std::uint32_t num_outliers[kVectors];
};

/// One vector's elements in global memory.
template <typename T>
struct VectorView {
  const T* x;
  std::int64_t stride;
  std::uint32_t count;       // 0 behind the last vector
  std::int64_t first_place;  // token * channels + channel of element 0, for messages
  std::int64_t place_stride;
  std::int64_t index;  // of its VectorGrid
};

/// This thread among the kRows that share a vector.
struct Worker {
  int vector;
  int row;
};

/// Finds in each histogram the bin that holds the wanted place, and narrows place and key to it. A warp per histogram:
///   bins 3 0 5 2 | place 4  ->  bin 2, place 1: the element stands second among the 5
template <int kVectors, int kThreads>
__device__ void narrow_to_bins(Selection<kVectors>& shared, int shift) {
  constexpr int kLaneBins = kBins / kWarpLanes;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  for (int h = static_cast<int>(threadIdx.x) / kWarpLanes; h < 2 * kVectors; h += kThreads / kWarpLanes) {
    const std::uint32_t* bins = shared.histogram[h / 2][h % 2];
    std::uint32_t own = 0;
    for (int b = 0; b < kLaneBins; ++b) own += bins[lane * kLaneBins + b];
    std::uint32_t through = own;  // elements in the bins of this lane and of those below
    for (int distance = 1; distance < kWarpLanes; distance *= 2) {
      const std::uint32_t below = __shfl_up_sync(0xffffffffu, through, distance);
      if (lane >= distance) through += below;
    }
    std::uint32_t place = shared.place[h / 2][h % 2];
    __syncwarp();  // every lane has read the place before one of them changes it
    if (place >= through || place < through - own) continue;
    place -= through - own;
    int bin = lane * kLaneBins;
    for (; place >= bins[bin]; ++bin) place -= bins[bin];
    shared.place[h / 2][h % 2] = place;
    shared.equal[h / 2][h % 2] = bins[bin];
    shared.key[h / 2][h % 2] |= static_cast<std::uint32_t>(bin) << shift;
  }
}

/// Selects the elements at shared.place of every vector: afterwards key holds theirs, equal how often it occurs, and
/// place where among the equal ones the wanted element stands. Every thread must call.
template <int kVectors, int kThreads, typename T>
__device__ void select_keys(const VectorView<T>& view, Worker worker, Selection<kVectors>& shared, Findings* findings) {
  constexpr std::uint32_t kRows = kThreads / kVectors;
  for (int shift = 24; shift >= 0; shift -= 8) {
    auto* all_bins = &shared.histogram[0][0][0];
    for (int i = static_cast<int>(threadIdx.x); i < kVectors * 2 * (kBins + 1); i += kThreads) all_bins[i] = 0;
    __syncthreads();
    const std::uint32_t known = shift == 24 ? 0u : ~0u << (shift + 8);
    const std::uint32_t upper_key = shared.key[worker.vector][0];
    const std::uint32_t lower_key = shared.key[worker.vector][1];
    for (std::uint32_t i = static_cast<std::uint32_t>(worker.row); i < view.count; i += kRows) {
      const std::uint32_t key =
          ordered_key(checked_value(view.x[i * view.stride], view.first_place + i * view.place_stride, findings));
      const std::uint32_t bin = (key >> shift) & (kBins - 1);
      if (((key ^ upper_key) & known) == 0) atomicAdd(&shared.histogram[worker.vector][0][bin], 1u);
      if (((key ^ lower_key) & known) == 0) atomicAdd(&shared.histogram[worker.vector][1][bin], 1u);
    }
    __syncthreads();
    narrow_to_bins<kVectors, kThreads>(shared, shift);
    __syncthreads();
  }
}

/// Asks select_keys for two places of a vector. One thread per vector calls.
template <int kVectors>
__device__ void ask_for_places(Selection<kVectors>& shared, int vector, std::int64_t first, std::int64_t second) {
  shared.key[vector][0] = shared.key[vector][1] = 0;
  shared.place[vector][0] = static_cast<std::uint32_t>(first);
  shared.place[vector][1] = static_cast<std::uint32_t>(second);
}

/// Linear quantile from the selected lower neighbour and, where it is another place, the next element.
template <int kVectors>
__device__ float selected_quantile(const Selection<kVectors>& shared, int vector, int side, QuantilePosition position) {
  const std::uint32_t below = shared.key[vector][side];
  const bool next_is_equal =
      position.above == position.below || shared.place[vector][side] + 1 < shared.equal[vector][side];
  return interpolate(key_value(below), key_value(next_is_equal ? below : shared.next[vector][side]), position.weight);
}

/// Smallest keys above both selected ones. Every thread must call.
template <int kVectors, int kThreads, typename T>
__device__ void find_next_keys(const VectorView<T>& view, Worker worker, Selection<kVectors>& shared) {
  constexpr std::uint32_t kRows = kThreads / kVectors;
  const std::uint32_t upper_key = shared.key[worker.vector][0];
  const std::uint32_t lower_key = shared.key[worker.vector][1];
  std::uint32_t above_upper = ~0u;
  std::uint32_t above_lower = ~0u;
  for (std::uint32_t i = static_cast<std::uint32_t>(worker.row); i < view.count; i += kRows) {
    const std::uint32_t key = ordered_key(element_value(view.x[i * view.stride]));
    if (key > upper_key) above_upper = min(above_upper, key);
    if (key > lower_key) above_lower = min(above_lower, key);
  }
  atomicMin(&shared.next[worker.vector][0], above_upper);
  atomicMin(&shared.next[worker.vector][1], above_lower);
  __syncthreads();
}

/// Counts outliers and finds the range of the rest. Every thread must call.
template <int kVectors, int kThreads, typename T>
__device__ void find_dense_range(const VectorView<T>& view, Worker worker, float upper, float lower,
                                 Selection<kVectors>& shared) {
  constexpr std::uint32_t kRows = kThreads / kVectors;
  RangeKeys dense = RangeKeys::none();
  std::uint32_t num_upper = 0;
  std::uint32_t num_lower = 0;
  std::uint32_t num_outliers = 0;
  for (std::uint32_t i = static_cast<std::uint32_t>(worker.row); i < view.count; i += kRows) {
    const float value = element_value(view.x[i * view.stride]);
    const bool is_upper = value >= upper;
    const bool is_lower = value <= lower;
    num_upper += is_upper;
    num_lower += is_lower;
    num_outliers += is_upper || is_lower;
    if (!is_upper && !is_lower) dense.add(value);
  }
  merge_atomically(shared.dense[worker.vector], dense);
  atomicAdd(&shared.num_upper[worker.vector], num_upper);
  atomicAdd(&shared.num_lower[worker.vector], num_lower);
  atomicAdd(&shared.num_outliers[worker.vector], num_outliers);
  __syncthreads();
}

/// Vector number `vector` of a tile: kVectors neighbouring channels of a group of tokens, or kVectors successive runs of
/// channels of tokens.
template <Axis kAxis, int kVectors, typename T>
__device__ VectorView<T> vector_view(const VectorPlan<T>& plan, std::int64_t tile, int vector) {
  if constexpr (kAxis == Axis::kPerToken) {
    const std::int64_t index = tile * kVectors + vector;
    const std::int64_t token = plan.first_token + index / plan.num_groups;
    const std::int64_t channel = index % plan.num_groups * plan.group;
    const std::int64_t count = index < plan.num_vectors ? min(plan.group, plan.channels - channel) : 0;
    return {plan.x + token * plan.x_token_stride + channel * plan.x_channel_stride,
            plan.x_channel_stride,
            static_cast<std::uint32_t>(count),
            token * plan.channels + channel,
            1,
            index};
  } else {
    const std::int64_t tiles_across = divide_up(plan.channels, kVectors);
    const std::int64_t group = tile / tiles_across;
    const std::int64_t channel = tile % tiles_across * kVectors + vector;
    const TokenRange range = plan.token_range(group);
    const std::int64_t count = channel < plan.channels ? range.end - range.first : 0;
    return {plan.x + range.first * plan.x_token_stride + channel * plan.x_channel_stride,
            plan.x_token_stride,
            static_cast<std::uint32_t>(count),
            range.first * plan.channels + channel,
            plan.channels,
            group * plan.channels + channel};
  }
}

/// Thresholds and grids of all vectors of a sequence.
///
///   0 ... 9, outlier_fraction 0.4: t = 0.8, both quantiles between places
///   upper  place 0.8 * 9 = 7.2: 7.2    outliers 8 9
///   lower  place 0.2 * 9 = 1.8: 1.8    outliers 0 1          dense 2 ... 7, the median 4 is among them
///
/// Launch  any number of blocks of kThreads; kVectors vectors share a block, so that its lanes read neighbours
/// Work    per tile: select both lower neighbours, find the upper ones, count outliers and find the dense range; the median
///         is selected only where it is an outlier itself (see quantize/outliers_cpu.h), as it changes the range only there
/// Reads   x of the quantised tokens, 6 times, 10 where a median is wanted: from the caches after the first
/// Writes  grids [num_vectors]; merges outliers and the first value that is not finite into *findings. With is_open
///         [num_vectors] only tiles in which it is not 0 for a vector, and no outliers
/// Needs   at most 2^31 - 1 elements a vector; with a value that is not finite the grids have no meaning
template <Axis kAxis, int kVectors, int kThreads, typename T>
__global__ void __launch_bounds__(kThreads)
    split_outliers_kernel(VectorPlan<T> plan, std::int64_t num_tiles, const std::uint8_t* is_open, VectorGrid* grids,
                          Findings* findings) {
  __shared__ Selection<kVectors> shared;
  const Worker worker{static_cast<int>(threadIdx.x) % kVectors, static_cast<int>(threadIdx.x) / kVectors};
  const int v = worker.vector;
  Counter outliers = 0;
  for (std::int64_t tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    const VectorView<T> view = vector_view<kAxis, kVectors>(plan, tile, v);
    if (is_open != nullptr && __syncthreads_or(view.count > 0 && is_open[view.index] != 0) == 0) continue;
    const std::int64_t count = max(view.count, 1u);
    const OutlierPlan places = make_outlier_plan(plan.options.outlier_fraction, count);
    if (worker.row == 0) {
      ask_for_places(shared, v, places.upper.below, places.lower.below);
      shared.next[v][0] = shared.next[v][1] = ~0u;
      shared.dense[v] = RangeKeys::none();
      shared.num_upper[v] = shared.num_lower[v] = shared.num_outliers[v] = 0;
    }
    __syncthreads();
    select_keys<kVectors, kThreads>(view, worker, shared, findings);
    find_next_keys<kVectors, kThreads>(view, worker, shared);
    const float upper = selected_quantile(shared, v, 0, places.upper);
    const float lower = selected_quantile(shared, v, 1, places.lower);
    find_dense_range<kVectors, kThreads>(view, worker, upper, lower, shared);

    const std::int64_t median_place = (count - 1) / 2;
    const bool median_is_outlier = shared.num_lower[v] > median_place || shared.num_upper[v] >= count - median_place;
    if (__syncthreads_or(view.count > 0 && median_is_outlier)) {
      if (worker.row == 0) ask_for_places(shared, v, median_place, median_place);
      __syncthreads();
      select_keys<kVectors, kThreads>(view, worker, shared, findings);
      if (worker.row == 0) merge_atomically(shared.dense[v], {shared.key[v][0], ~shared.key[v][0]});
    }
    if (worker.row == 0 && view.count > 0) {
      const UniformGrid grid = make_range_grid(shared.dense[v].low_value(), shared.dense[v].high_value(), plan.options);
      grids[view.index] = {grid.qs, grid.offset, upper, lower};
      outliers += shared.num_outliers[v];
    }
    __syncthreads();  // the next tile starts with fresh shared memory
  }
  if (outliers > 0 && is_open == nullptr) atomicAdd(&findings->outliers, outliers);
}

}  // namespace kvpack::cuda
