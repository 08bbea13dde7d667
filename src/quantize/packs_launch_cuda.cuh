// Which of the fast kernels (rows, row_groups, columns, and split_rows and split_columns for outliers) a sequence takes, if
// any, and their launches.
#pragma once

#include <algorithm>

#include "cuda/buffer.h"
#include "cuda/check.h"
#include "quantize/codebook_cuda.cuh"
#include "quantize/columns_cuda.cuh"
#include "quantize/row_groups_cuda.cuh"
#include "quantize/rows_cuda.cuh"
#include "quantize/split_columns_cuda.cuh"
#include "quantize/split_rows_cuda.cuh"

namespace kvpack::cuda {

/// What the launches of one call share.
template <typename T>
struct Launch {
  const VectorPlan<T>& plan;
  const CodebookTable& codebook;
  Findings* findings;
  cudaStream_t stream;
};

/// Calls f.operator()<true>() or <false>().
template <typename F>
void with_flag(bool flag, F&& f) {
  if (flag) {
    f.template operator()<true>();
  } else {
    f.template operator()<false>();
  }
}

/// Whether 16-byte loads and stores reach every element.
template <typename T>
bool has_packs(const VectorPlan<T>& plan) {
  const auto is_aligned = [](const void* memory, std::int64_t token_stride) {
    return reinterpret_cast<std::uintptr_t>(memory) % 16 == 0 && token_stride % kPack<T> == 0;
  };
  return plan.channels % kPack<T> == 0 && plan.x_channel_stride == 1 && plan.out_channel_stride == 1 &&
         is_aligned(plan.x, plan.x_token_stride) && is_aligned(plan.out, plan.out_token_stride);
}

/// Whether simulate_rows_kernel takes a per-token sequence: rows fit registers, vectors whole rows or powers of two.
template <typename T>
bool suits_rows(const VectorPlan<T>& plan) {
  const std::int64_t packs = plan.group / kPack<T>;
  const bool is_whole = plan.group >= plan.channels;
  const bool fits_lanes = plan.group % kPack<T> == 0 && packs <= kWarpLanes && (packs & (packs - 1)) == 0;
  return plan.channels <= 16 * kWarpLanes * kPack<T> && (is_whole || fits_lanes);
}

/// Blocks that keep every SM of a large GPU busy a few times over.
inline int row_blocks(std::int64_t rows) {
  return grid_blocks(std::min<std::int64_t>(divide_up(rows, kRowWarps), 1 << 12));
}

template <typename T>
void launch_row_check(const Launch<T>& launch) {
  const VectorPlan<T>& plan = launch.plan;
  check_rows_kernel<<<row_blocks(plan.end_token - plan.first_token), kRowThreads, 0, launch.stream>>>(plan,
                                                                                                      launch.findings);
  check_cuda(cudaGetLastError(), "launch the check of simulate_quantized");
}

/// Calls f.operator()<kPacks>() with enough packs of a lane for a row.
template <typename T, typename F>
void with_row_packs(const VectorPlan<T>& plan, F&& f) {
  const std::int64_t packs = divide_up(plan.channels, kWarpLanes * kPack<T>);
  if (packs <= 1) {
    f.template operator()<1>();
  } else if (packs <= 4) {
    f.template operator()<4>();
  } else if (packs <= 8) {
    f.template operator()<8>();
  } else {
    f.template operator()<16>();
  }
}

/// Calls f.operator()<kCodebook, kTables>() as the rule of a call wants it.
template <typename T, typename F>
void with_steps(const Launch<T>& launch, F&& f) {
  with_flag(launch.codebook.levels > 0, [&]<bool kCodebook>() {
    with_flag(suits_tables(launch.codebook, launch.plan.options),
              [&]<bool kTables>() { f.template operator()<kCodebook, kTables>(); });
  });
}

/// Whole rows.
template <RowGrids kGrids, typename T>
void launch_rows(const Launch<T>& launch, const VectorGrid* calibrated) {
  const VectorPlan<T>& plan = launch.plan;
  const int blocks = row_blocks(plan.end_token - plan.first_token);
  with_row_packs(plan, [&]<int kPacks>() {
    with_steps(launch, [&]<bool kCodebook, bool kTables>() {
      simulate_rows_kernel<kCodebook, kTables, kGrids, kPacks>
          <<<blocks, kRowThreads, 0, launch.stream>>>(plan, calibrated, launch.codebook, launch.findings);
    });
  });
  check_cuda(cudaGetLastError(), "launch the rows of simulate_quantized");
}

/// Groups of channels.
template <bool kRms, typename T>
void launch_row_groups(const Launch<T>& launch) {
  const VectorPlan<T>& plan = launch.plan;
  const std::int64_t parts = divide_up(plan.channels, kGroupSpan<T>);
  const int blocks = row_blocks((plan.end_token - plan.first_token) * parts);
  with_flag(launch.codebook.levels > 0, [&]<bool kCodebook>() {
    simulate_row_groups_kernel<kCodebook, kRms>
        <<<blocks, kRowThreads, 0, launch.stream>>>(plan, launch.codebook, launch.findings);
  });
  check_cuda(cudaGetLastError(), "launch the groups of simulate_quantized");
}

template <typename T>
void launch_rows_or_groups(const Launch<T>& launch) {
  const bool is_rms = launch.plan.options.scale == ScaleRule::kRms;
  if (launch.plan.group >= launch.plan.channels) {
    is_rms ? launch_rows<RowGrids::kRms>(launch, nullptr) : launch_rows<RowGrids::kRange>(launch, nullptr);
  } else {
    is_rms ? launch_row_groups<true>(launch) : launch_row_groups<false>(launch);
  }
}

template <typename T>
void launch_column_groups(const Launch<T>& launch) {
  const VectorPlan<T>& plan = launch.plan;
  const int blocks = grid_blocks(divide_up(plan.channels, kColumnChannels<T>) * plan.num_groups);
  const auto start = [&]<int kRows>() {
    with_flag(launch.codebook.levels > 0, [&]<bool kCodebook>() {
      column_groups_kernel<kCodebook, kRows>
          <<<blocks, kColumnThreads, 0, launch.stream>>>(plan, launch.codebook, launch.findings);
    });
  };
  if (plan.group <= 4 * kColumnWarps) {
    start.template operator()<4>();
  } else if (plan.group <= 8 * kColumnWarps) {
    start.template operator()<8>();
  } else {
    start.template operator()<16>();
  }
  check_cuda(cudaGetLastError(), "launch the groups of simulate_quantized");
}

/// From ranges, or from grids with thresholds.
template <typename T>
void launch_columns(const Launch<T>& launch, const RangeKeys* ranges, const VectorGrid* grids) {
  const VectorPlan<T>& plan = launch.plan;
  const int blocks = grid_blocks(column_tiles<kColumnTokens>(plan));
  with_steps(launch, [&]<bool kCodebook, bool kTables>() {
    with_flag(grids != nullptr, [&]<bool kThresholds>() {
      write_columns_kernel<kCodebook, kTables, kThresholds>
          <<<blocks, kColumnThreads, 0, launch.stream>>>(plan, ranges, grids, launch.codebook, launch.findings);
    });
  });
  check_cuda(cudaGetLastError(), "launch the columns of simulate_quantized");
}

/// Tokens outside [first_token, end_token), as they are.
template <typename T>
void copy_exact_tokens(const VectorPlan<T>& plan, cudaStream_t stream) {
  if (plan.x == plan.out) return;
  const auto copy = [&](std::int64_t first, std::int64_t end) {
    if (first >= end) return;
    const auto pitch = [](std::int64_t stride) { return static_cast<std::size_t>(stride) * sizeof(T); };
    const bool is_one_row = end - first == 1;  // whose stride may be anything
    check_cuda(cudaMemcpy2DAsync(
                   plan.out + first * plan.out_token_stride, pitch(is_one_row ? plan.channels : plan.out_token_stride),
                   plan.x + first * plan.x_token_stride, pitch(is_one_row ? plan.channels : plan.x_token_stride),
                   pitch(plan.channels), static_cast<std::size_t>(end - first), cudaMemcpyDeviceToDevice, stream),
               "copy exact tokens");
  };
  copy(0, plan.first_token);
  copy(plan.end_token, plan.tokens);
}

/// Elements of either end of a vector that its thresholds and dense range come from.
template <typename T>
int needed_in_tails(const VectorPlan<T>& plan, std::int64_t count) {
  const OutlierPlan places = make_outlier_plan(plan.options.outlier_fraction, count);
  return std::max(upper_places(places, count).needed(), lower_places(places).needed());
}

/// Tokens of the longest per-channel vector.
template <typename T>
std::int64_t longest_column(const VectorPlan<T>& plan) {
  return std::min(plan.group, plan.end_token - plan.first_token);
}

/// Whether the kernels that split outliers off take the vectors: rows whose ends a warp's lanes hold; columns long enough
/// for a sample and short ends.
template <typename T>
bool suits_tails(const VectorPlan<T>& plan) {
  constexpr std::int64_t kShortestColumn = 1024;
  constexpr double kMostOutliers = 0.05;
  if (plan.options.axis == Axis::kPerToken) {
    return plan.group >= plan.channels && needed_in_tails(plan, plan.channels) <= kTailSlots;
  }
  return longest_column(plan) >= kShortestColumn && plan.options.outlier_fraction <= kMostOutliers;
}

/// Whether the fast kernels take a sequence and its method.
template <typename T>
bool takes_packs(const VectorPlan<T>& plan, const UniformProblem& problem) {
  if (!has_packs(plan)) return false;
  if (problem.only_check) return true;
  const bool is_range = plan.options.scale == ScaleRule::kRange;
  const bool has_quantiles = plan.options.outlier_fraction > 0.0 && !plan.is_static;
  const bool by_channel = plan.options.axis == Axis::kPerChannel;
  return (by_channel ? is_range : suits_rows(plan)) && (!has_quantiles || (is_range && suits_tails(plan)));
}

/// Starts split_outliers_kernel with kVectors vectors a block, kThreads / kVectors threads each.
template <Axis kAxis, int kVectors, int kThreads, typename T>
void launch_split(const VectorPlan<T>& plan, const std::uint8_t* is_open, VectorGrid* grids, Findings* findings,
                  cudaStream_t stream) {
  const bool by_channel = kAxis == Axis::kPerChannel;
  const std::int64_t tiles =
      by_channel ? divide_up(plan.channels, kVectors) * plan.num_groups : divide_up(plan.num_vectors, kVectors);
  split_outliers_kernel<kAxis, kVectors, kThreads>
      <<<grid_blocks(tiles), kThreads, 0, stream>>>(plan, tiles, is_open, grids, findings);
  check_cuda(cudaGetLastError(), "launch the outlier split of simulate_uniform");
}

/// Per-channel thresholds by the ends of vectors, then the elements.
template <typename T>
void launch_split_columns(const Launch<T>& launch) {
  const VectorPlan<T>& plan = launch.plan;
  const std::int64_t longest = longest_column(plan);
  const std::int64_t capacity = tail_capacity(longest, needed_in_tails(plan, longest));
  DeviceBuffer<TailBounds> bounds(plan.num_vectors, launch.stream);
  DeviceBuffer<std::uint32_t> keys(plan.num_vectors * 2 * capacity, launch.stream);
  DeviceBuffer<VectorGrid> grids(plan.num_vectors, launch.stream);
  DeviceBuffer<std::uint8_t> is_open(plan.num_vectors, launch.stream);
  const TailLists lists{keys.data(), capacity};
  const std::int64_t collect_tiles =
      divide_up(plan.channels, kColumnChannels<T>) * divide_up(plan.group, kCollectTokens) * plan.num_groups;
  sample_tails_kernel<<<grid_blocks(plan.channels / kPack<T> * plan.num_groups), kSampleThreads, 0, launch.stream>>>(
      plan, bounds.data());
  collect_tails_kernel<<<grid_blocks(collect_tiles), kColumnThreads, 0, launch.stream>>>(plan, bounds.data(), lists);
  split_from_tails_kernel<<<grid_blocks(divide_up(plan.num_vectors, kRowWarps)), kRowThreads, 0, launch.stream>>>(
      plan, bounds.data(), lists, grids.data(), is_open.data(), launch.findings);
  check_cuda(cudaGetLastError(), "launch the tails of simulate_quantized");
  launch_split<Axis::kPerChannel, 8, 1024>(plan, is_open.data(), grids.data(), launch.findings, launch.stream);
  launch_columns(launch, nullptr, grids.data());
}

template <int kPacks, typename T>
void launch_split_rows_of(const Launch<T>& launch) {
  const VectorPlan<T>& plan = launch.plan;
  const OutlierPlan places = make_outlier_plan(plan.options.outlier_fraction, plan.channels);
  with_steps(launch, [&]<bool kCodebook, bool kTables>() {
    simulate_split_rows_kernel<kCodebook, kTables, kPacks>
        <<<row_blocks(plan.end_token - plan.first_token), kRowThreads, 0, launch.stream>>>(
            plan, places, launch.codebook, launch.findings);
  });
  check_cuda(cudaGetLastError(), "launch the rows with outliers of simulate_quantized");
}

/// Quantises a sequence that takes_packs(); what is not finite is in launch.findings afterwards.
template <typename T>
void simulate_packs(const Launch<T>& launch, const UniformProblem& problem) {
  const VectorPlan<T>& plan = launch.plan;
  const bool by_channel = plan.options.axis == Axis::kPerChannel;
  const bool has_quantiles = plan.options.outlier_fraction > 0.0 && !plan.is_static;
  // Two passes: the first tells what is not finite before the second writes.
  const bool takes_ranges = by_channel && !plan.is_static && (has_quantiles || plan.group > kColumnTokens);
  if (problem.only_check || (plan.x == plan.out && !takes_ranges)) launch_row_check(launch);
  if (problem.only_check) return;
  if (plan.is_static) {
    const std::int64_t count = by_channel ? plan.channels : plan.tokens;
    DeviceBuffer<VectorGrid> grids(count, launch.stream);
    copy_to_device(grids.data(), problem.static_grids, count, launch.stream);
    by_channel ? launch_columns(launch, nullptr, grids.data())
               : launch_rows<RowGrids::kCalibrated>(launch, grids.data());
  } else if (has_quantiles && by_channel) {
    launch_split_columns(launch);
  } else if (has_quantiles) {
    with_row_packs(plan, [&]<int kPacks>() { launch_split_rows_of<kPacks>(launch); });
  } else if (!by_channel) {
    launch_rows_or_groups(launch);
  } else if (takes_ranges) {
    DeviceBuffer<RangeKeys> ranges(plan.num_vectors, launch.stream);
    ranges.fill_bytes(0xff);
    column_ranges_kernel<<<grid_blocks(column_tiles<kRangeTokens>(plan)), kColumnThreads, 0, launch.stream>>>(
        plan, ranges.data(), launch.findings);
    check_cuda(cudaGetLastError(), "launch the ranges of simulate_quantized");
    launch_columns(launch, ranges.data(), nullptr);
  } else {
    launch_column_groups(launch);
  }
  copy_exact_tokens(plan, launch.stream);
}

}  // namespace kvpack::cuda
