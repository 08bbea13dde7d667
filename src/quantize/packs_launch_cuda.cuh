// Which of the fast kernels of rows_cuda.cuh and columns_cuda.cuh a sequence takes, if any, and their launches.
#pragma once

#include <algorithm>

#include "cuda/buffer.h"
#include "cuda/check.h"
#include "quantize/codebook_cuda.cuh"
#include "quantize/columns_cuda.cuh"
#include "quantize/rows_cuda.cuh"

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

template <int kPacks, typename T>
void launch_rows_of(const Launch<T>& launch, const VectorGrid* calibrated) {
  const VectorPlan<T>& plan = launch.plan;
  with_flag(launch.codebook.levels > 0, [&]<bool kCodebook>() {
    simulate_rows_kernel<kCodebook, kPacks>
        <<<row_blocks(plan.end_token - plan.first_token), kRowThreads, 0, launch.stream>>>(
            plan, calibrated, launch.codebook, launch.findings);
  });
  check_cuda(cudaGetLastError(), "launch the rows of simulate_quantized");
}

template <typename T>
void launch_rows(const Launch<T>& launch, const VectorGrid* calibrated) {
  const std::int64_t packs = divide_up(launch.plan.channels, kWarpLanes * kPack<T>);
  if (packs <= 1) {
    launch_rows_of<1>(launch, calibrated);
  } else if (packs <= 4) {
    launch_rows_of<4>(launch, calibrated);
  } else if (packs <= 8) {
    launch_rows_of<8>(launch, calibrated);
  } else {
    launch_rows_of<16>(launch, calibrated);
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
  const int blocks = grid_blocks(column_tiles(plan));
  with_flag(launch.codebook.levels > 0, [&]<bool kCodebook>() {
    with_flag(grids != nullptr, [&]<bool kThresholds>() {
      write_columns_kernel<kCodebook, kThresholds>
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

/// Whether the fast kernels take a sequence and its method.
template <typename T>
bool takes_packs(const VectorPlan<T>& plan, const UniformProblem& problem) {
  if (!has_packs(plan)) return false;
  if (problem.only_check) return true;
  const bool has_quantiles = plan.options.outlier_fraction > 0.0 && !plan.is_static;
  const bool by_channel = plan.options.axis == Axis::kPerChannel;
  return !has_quantiles && (by_channel ? plan.options.scale == ScaleRule::kRange : suits_rows(plan));
}

/// Quantises a sequence that takes_packs(); what is not finite is in launch.findings afterwards.
template <typename T>
void simulate_packs(const Launch<T>& launch, const UniformProblem& problem) {
  const VectorPlan<T>& plan = launch.plan;
  const bool by_channel = plan.options.axis == Axis::kPerChannel;
  const bool takes_ranges = by_channel && !plan.is_static && plan.group > kColumnTokens;
  if (problem.only_check || (plan.x == plan.out && !takes_ranges)) launch_row_check(launch);
  if (problem.only_check) return;
  if (plan.is_static) {
    const std::int64_t count = by_channel ? plan.channels : plan.tokens;
    DeviceBuffer<VectorGrid> grids(count, launch.stream);
    copy_to_device(grids.data(), problem.static_grids, count, launch.stream);
    by_channel ? launch_columns(launch, nullptr, grids.data()) : launch_rows(launch, grids.data());
  } else if (!by_channel) {
    launch_rows(launch, nullptr);
  } else if (takes_ranges) {
    DeviceBuffer<RangeKeys> ranges(plan.num_vectors, launch.stream);
    ranges.fill_bytes(0xff);
    column_ranges_kernel<<<grid_blocks(column_tiles(plan)), kColumnThreads, 0, launch.stream>>>(plan, ranges.data(),
                                                                                                launch.findings);
    check_cuda(cudaGetLastError(), "launch the ranges of simulate_quantized");
    launch_columns(launch, ranges.data(), nullptr);
  } else {
    launch_column_groups(launch);
  }
  copy_exact_tokens(plan, launch.stream);
}

}  // namespace kvpack::cuda
