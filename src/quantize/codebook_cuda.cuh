// What codebooks, rms scales and calibrated thresholds add on the GPU. The rule is quantize/codebook.h.
#pragma once

#include "cuda/check.h"
#include "quantize/codebook.h"
#include "quantize/uniform_cuda.cuh"

namespace kvpack::cuda {

inline constexpr int kTileRows = 8;  // warps of a block, one token each at a time
inline constexpr int kThreads = kTileRows * kWarpLanes;
inline constexpr int kWriteTokens = 64;
inline constexpr dim3 kTileThreads(kWarpLanes, kTileRows);

/// What happens to a value between its affine stage and back.
enum class Steps { kUniform, kCodebook };

/// A codebook where every thread of a block finds it at its own pace. Up to 32 levels lie in different banks.
struct SharedCodebook {
  float boundaries[kMaxCentroids];
  float values[kMaxCentroids];
  std::int32_t levels;

  /// Every thread of the block must call.
  __device__ void load(const CodebookTable& table) {
    const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
    const int threads = static_cast<int>(blockDim.x * blockDim.y);
    for (int k = thread; k < table.levels; k += threads) {
      boundaries[k] = table.boundaries[k];
      values[k] = table.values[k];
    }
    if (thread == 0) levels = table.levels;
    __syncthreads();
  }
  __device__ float simulate(float value, UniformGrid grid) const {
    return simulate_with_codebook(value, grid, boundaries, values, levels);
  }
};

/// Tiles of 32 channels x kWriteTokens tokens that cover a sequence.
template <typename T>
std::int64_t num_element_tiles(const VectorPlan<T>& plan) {
  return divide_up(plan.channels, kWarpLanes) * divide_up(plan.tokens, kWriteTokens);
}

/// Copies pageable host memory, which is free to change when this returns.
template <typename T>
void copy_to_device(T* target, const T* source, std::int64_t count, cudaStream_t stream) {
  const auto bytes = static_cast<std::size_t>(count) * sizeof(T);
  check_cuda(cudaMemcpyAsync(target, source, bytes, cudaMemcpyHostToDevice, stream), "copy grids to the device");
}

/// Looks for values that are not finite and counts what lies beyond calibrated thresholds.
///
/// Launch  any number of blocks of (32, kTileRows)
/// Work    tiles of 32 channels x kWriteTokens tokens, lanes on neighbouring channels; a sum per thread
/// Reads   x of the quantised tokens once; grids [channels] or [tokens]
/// Writes  merges into *findings
/// Needs   nothing
template <Axis kAxis, typename T>
__global__ void __launch_bounds__(kThreads)
    check_static_kernel(VectorPlan<T> plan, std::int64_t num_tiles, const VectorGrid* grids, Findings* findings) {
  const std::int64_t tiles_across = divide_up(plan.channels, kWarpLanes);
  Counter outliers = 0;
  for (std::int64_t tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    const std::int64_t c = tile % tiles_across * kWarpLanes + threadIdx.x;
    if (c >= plan.channels) continue;
    const std::int64_t first = max(tile / tiles_across * kWriteTokens, plan.first_token);
    const std::int64_t end = min((tile / tiles_across + 1) * kWriteTokens, plan.end_token);
    for (std::int64_t t = first + threadIdx.y; t < end; t += kTileRows) {
      const T element = plan.x[t * plan.x_token_stride + c * plan.x_channel_stride];
      const float value = checked_value(element, t * plan.channels + c, findings);
      const VectorGrid grid = grids[plan.template grid_index<kAxis>(t, c)];
      outliers += value >= grid.upper || value <= grid.lower;
    }
  }
  if (outliers > 0) atomicAdd(&findings->outliers, outliers);
}

/// Root mean square of each per-token vector, a warp each: lane i is strand i, and halving distances join strands in the
/// order of join_strands().
///
/// Launch  any number of blocks of (32, kTileRows)
/// Work    lanes lie on neighbouring channels; one reduction over the warp
/// Reads   x of the quantised tokens once
/// Writes  grids [num_vectors]; merges into *findings
/// Needs   nothing
template <typename T>
__global__ void __launch_bounds__(kThreads)
    rms_per_token_kernel(VectorPlan<T> plan, VectorGrid* grids, Findings* findings) {
  static_assert(kStrands == kWarpLanes);
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kTileRows;
  for (std::int64_t v = static_cast<std::int64_t>(blockIdx.x) * kTileRows + threadIdx.y; v < plan.num_vectors;
       v += step) {
    const std::int64_t token = plan.first_token + v / plan.num_groups;
    const std::int64_t first = v % plan.num_groups * plan.group;
    const std::int64_t end = min(first + plan.group, plan.channels);
    float sum = 0.0f;
    for (std::int64_t c = first + threadIdx.x; c < end; c += kWarpLanes) {
      const T element = plan.x[token * plan.x_token_stride + c * plan.x_channel_stride];
      const float value = checked_value(element, token * plan.channels + c, findings);
      sum = sum + value * value;
    }
    for (int half = kStrands / 2; half > 0; half /= 2) sum = sum + __shfl_down_sync(0xffffffffu, sum, half);
    if (threadIdx.x == 0) {
      const UniformGrid grid = make_rms_grid(sum, end - first);
      grids[v] = {grid.qs, grid.offset, HUGE_VALF, -HUGE_VALF};
    }
  }
}

/// Root mean square of each per-channel vector. A block has 32 channels of a group of tokens:
///
///   thread (x, y)   channel x, strands y, y + 8, y + 16, y + 24: tokens first + strand, + 32, + 64 ...
///
/// Launch  any number of blocks of (32, kTileRows)
/// Work    per tile: the strands into shared memory, then one thread joins those of a channel
/// Reads   x of the quantised tokens once
/// Writes  grids [num_vectors]; merges into *findings
/// Needs   nothing
template <typename T>
__global__ void __launch_bounds__(kThreads)
    rms_per_channel_kernel(VectorPlan<T> plan, std::int64_t num_tiles, VectorGrid* grids, Findings* findings) {
  __shared__ float sums[kStrands][kWarpLanes];
  const std::int64_t tiles_across = divide_up(plan.channels, kWarpLanes);
  for (std::int64_t tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    const std::int64_t channel = tile % tiles_across * kWarpLanes + threadIdx.x;
    const std::int64_t group = tile / tiles_across;
    const TokenRange tokens = plan.token_range(group);
    for (int strand = static_cast<int>(threadIdx.y); strand < kStrands; strand += kTileRows) {
      float sum = 0.0f;
      for (std::int64_t t = tokens.first + strand; channel < plan.channels && t < tokens.end; t += kStrands) {
        const T element = plan.x[t * plan.x_token_stride + channel * plan.x_channel_stride];
        const float value = checked_value(element, t * plan.channels + channel, findings);
        sum = sum + value * value;
      }
      sums[strand][threadIdx.x] = sum;
    }
    __syncthreads();
    if (threadIdx.y == 0 && channel < plan.channels) {
      float strands[kStrands];
      for (int strand = 0; strand < kStrands; ++strand) strands[strand] = sums[strand][threadIdx.x];
      const UniformGrid grid = make_rms_grid(join_strands(strands), tokens.end - tokens.first);
      grids[group * plan.channels + channel] = {grid.qs, grid.offset, HUGE_VALF, -HUGE_VALF};
    }
    __syncthreads();  // the next tile writes sums
  }
}

template <typename T>
void launch_static_check(const VectorPlan<T>& plan, const VectorGrid* grids, Findings* findings, cudaStream_t stream) {
  const std::int64_t tiles = num_element_tiles(plan);
  const int blocks = grid_blocks(tiles);
  if (plan.options.axis == Axis::kPerToken) {
    check_static_kernel<Axis::kPerToken><<<blocks, kTileThreads, 0, stream>>>(plan, tiles, grids, findings);
  } else {
    check_static_kernel<Axis::kPerChannel><<<blocks, kTileThreads, 0, stream>>>(plan, tiles, grids, findings);
  }
  check_cuda(cudaGetLastError(), "launch the check of calibrated thresholds");
}

template <typename T>
void launch_rms(const VectorPlan<T>& plan, VectorGrid* grids, Findings* findings, cudaStream_t stream) {
  if (plan.options.axis == Axis::kPerToken) {
    const int blocks = grid_blocks(divide_up(plan.num_vectors, kTileRows));
    rms_per_token_kernel<<<blocks, kTileThreads, 0, stream>>>(plan, grids, findings);
  } else {
    const std::int64_t tiles = divide_up(plan.channels, kWarpLanes) * plan.num_groups;
    rms_per_channel_kernel<<<grid_blocks(tiles), kTileThreads, 0, stream>>>(plan, tiles, grids, findings);
  }
  check_cuda(cudaGetLastError(), "launch the root mean squares");
}

}  // namespace kvpack::cuda
