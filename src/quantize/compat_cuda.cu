// Grids of `compat` with protected tokens on the GPU: the rule is quantize/compat_ref.cpp. Order statistics by halving, not by
// speed: this serves comparisons with the published tool.
#include <cmath>

#include "core/with_type.h"
#include "cuda/buffer.h"
#include "cuda/check.h"
#include "cuda/device.h"
#include "quantize/outliers.h"
#include "quantize/uniform_cuda.cuh"

namespace kvpack::cuda {

namespace {

constexpr int kCompatThreads = 256;

/// One channel as its block reads it, again and again: it stays in the caches.
template <typename T>
struct Column {
  const T* x;
  std::int64_t stride;
  std::int64_t tokens;

  __device__ float value(std::int64_t token) const { return element_value(x[token * stride]); }

  /// The value of a rank counted from 0, bit by bit: the largest key with at most `rank` smaller ones.
  ///   sorted keys 3 5 5 9, rank 2:   8? 3 keys are smaller: no   4? 1: yes   4+2? 3: no   4+1? 1: yes   -> 5
  __device__ float at_rank(std::int64_t rank) const {
    std::uint32_t key = 0;
    for (std::uint32_t bit = 0x80000000u; bit != 0; bit >>= 1) {
      const std::uint32_t candidate = key | bit;
      std::int64_t smaller = 0;
      for (std::int64_t t = threadIdx.x; t < tokens; t += kCompatThreads) smaller += ordered_key(value(t)) < candidate;
      smaller = block_reduce<kCompatThreads>(smaller, [](std::int64_t a, std::int64_t b) { return a + b; });
      if (smaller <= rank) key = candidate;
    }
    return key_value(key);
  }

  /// Smallest and largest of tokens [first, tokens) strictly between two thresholds, and of `start` in any case.
  __device__ RangeKeys range_between(std::int64_t first, float lower, float upper, RangeKeys start) const {
    RangeKeys range = start;
    for (std::int64_t t = first + threadIdx.x; t < tokens; t += kCompatThreads) {
      if (value(t) < upper && value(t) > lower) range.add(value(t));
    }
    return block_reduce<kCompatThreads>(range, [](RangeKeys a, RangeKeys b) -> RangeKeys {
      return {min(a.low, b.low), min(a.inverted_high, b.inverted_high)};
    });
  }

  __device__ float quantile(const QuantilePosition& position) const {
    return interpolate(at_rank(position.below), at_rank(position.above), position.weight);
  }
};

/// The grid of every channel of one sequence.
///
/// Launch  any number of blocks of kCompatThreads
/// Work    a block per channel; four order statistics for two quantiles and one for the median, 32 sweeps each
/// Reads   x about 160 times with outliers, twice without, nearly always from the caches
/// Writes  grids [channels]; merges into *findings, after which grids of such channels mean nothing
/// Needs   nothing
template <typename T>
__global__ void __launch_bounds__(kCompatThreads)
    find_compat_grids_kernel(UniformProblem problem, VectorGrid* grids, Findings* findings) {
  const QuantizeOptions& options = problem.options;
  const float never = HUGE_VALF;
  for (std::int64_t c = blockIdx.x; c < problem.channels; c += gridDim.x) {
    const Column<T> column{static_cast<const T*>(problem.x) + c * problem.x_channel_stride, problem.x_token_stride,
                           problem.tokens};
    for (std::int64_t t = threadIdx.x; t < problem.tokens; t += kCompatThreads) {
      (void)checked_value(column.x[t * column.stride], t * problem.channels + c, findings);
    }
    VectorGrid grid{0.0f, 0.0f, never, -never};
    RangeKeys range = RangeKeys::none();
    if (options.outlier_fraction > 0.0) {
      const OutlierPlan plan = make_outlier_plan(options.outlier_fraction, problem.tokens);
      grid.upper = column.quantile(plan.upper);
      grid.lower = column.quantile(plan.lower);
      range.add(column.at_rank((problem.tokens - 1) / 2));
      range = column.range_between(options.protected_tokens, grid.lower, grid.upper, range);
    } else {
      range = column.range_between(0, -never, never, range);
    }
    if (threadIdx.x != 0) continue;
    const UniformGrid affine = make_range_grid(range.low_value(), range.high_value(), options);
    grid.qs = affine.qs;
    grid.offset = affine.offset;
    grids[c] = grid;
  }
}

}  // namespace

CompatOutcome find_compat_grids(const UniformProblem& problem, VectorGrid* grids) {
  const DeviceGuard device(problem.x, "x");
  const auto stream = static_cast<cudaStream_t>(problem.stream);
  DeviceBuffer<VectorGrid> found(problem.channels, stream);
  DeviceBuffer<Findings> findings(1, stream);
  findings.fill_bytes(0xff);
  with_float_type(problem.dtype, [&]<typename T>() {
    find_compat_grids_kernel<T>
        <<<grid_blocks(problem.channels), kCompatThreads, 0, stream>>>(problem, found.data(), findings.data());
  });
  check_cuda(cudaGetLastError(), "launch find_compat_grids");
  found.read_to(grids);
  Findings result{};
  findings.read_to(&result);
  return {result.first_bad == ~Counter{0} ? -1 : static_cast<std::int64_t>(result.first_bad)};
}

}  // namespace kvpack::cuda
