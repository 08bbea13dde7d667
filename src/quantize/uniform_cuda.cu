// Simulated quantisation on the GPU. What lies aligned takes packs_launch_cuda.cuh; everything else two steps with one look
// from the host between them: every vector's grid, and only when all values are finite the elements. The rules are
// quantize/uniform.h, quantize/codebook.h and quantize/outliers.h.
#include <limits>
#include <optional>

#include "core/with_type.h"
#include "cuda/buffer.h"
#include "cuda/check.h"
#include "cuda/device.h"
#include "quantize/codebook_cuda.cuh"
#include "quantize/outliers_cuda.cuh"
#include "quantize/packs_launch_cuda.cuh"
#include "quantize/uniform_cuda.cuh"

namespace kvpack::cuda {

namespace {

/// Smallest and largest of each per-channel vector. Lanes lie on neighbouring channels:
///
///   tile of 32 channels x at most 256 tokens of one group      warp 0   tokens 0  8 16 ...
///                                                               warp 1   tokens 1  9 17 ...
///
/// Launch  any number of blocks of (32, kTileRows)
/// Work    per tile: a thread's own range, merged over the block's warps, then into memory: a group has several tiles
/// Reads   x of the quantised tokens once
/// Writes  merges into ranges [num_vectors], which start as all ones, and into *findings
/// Needs   nothing
template <typename T>
__global__ void __launch_bounds__(kThreads)
    range_per_channel_kernel(VectorPlan<T> plan, std::int64_t num_tiles, RangeKeys* ranges, Findings* findings) {
  __shared__ RangeKeys of_warps[kTileRows][kWarpLanes];
  const std::int64_t tiles_across = divide_up(plan.channels, kWarpLanes);
  const std::int64_t tiles_down = divide_up(plan.group, kRangeTokens);
  for (std::int64_t tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    const std::int64_t channel = tile % tiles_across * kWarpLanes + threadIdx.x;
    const std::int64_t group = tile / tiles_across / tiles_down;
    const TokenRange tokens = plan.token_range(group);
    const std::int64_t first = tokens.first + tile / tiles_across % tiles_down * kRangeTokens;
    const std::int64_t end = min(first + kRangeTokens, tokens.end);
    RangeKeys range = RangeKeys::none();
    for (std::int64_t t = first + threadIdx.y; channel < plan.channels && t < end; t += kTileRows) {
      const T element = plan.x[t * plan.x_token_stride + channel * plan.x_channel_stride];
      range.add(checked_value(element, t * plan.channels + channel, findings));
    }
    of_warps[threadIdx.y][threadIdx.x] = range;
    __syncthreads();
    if (threadIdx.y == 0 && channel < plan.channels && first < end) {
      for (int warp = 1; warp < kTileRows; ++warp) {
        range.low = min(range.low, of_warps[warp][threadIdx.x].low);
        range.inverted_high = min(range.inverted_high, of_warps[warp][threadIdx.x].inverted_high);
      }
      merge_atomically(ranges[group * plan.channels + channel], range);
    }
    __syncthreads();  // the next tile writes of_warps
  }
}

/// Smallest and largest of each per-token vector, a warp each.
///
/// Launch  any number of blocks of (32, kTileRows)
/// Work    lanes lie on neighbouring channels; one reduction over the warp
/// Reads   x of the quantised tokens once
/// Writes  ranges [num_vectors]; merges into *findings
/// Needs   sm_80 for the warp's integer minimum
template <typename T>
__global__ void __launch_bounds__(kThreads)
    range_per_token_kernel(VectorPlan<T> plan, RangeKeys* ranges, Findings* findings) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kTileRows;
  for (std::int64_t v = static_cast<std::int64_t>(blockIdx.x) * kTileRows + threadIdx.y; v < plan.num_vectors;
       v += step) {
    const std::int64_t token = plan.first_token + v / plan.num_groups;
    const std::int64_t first = v % plan.num_groups * plan.group;
    const std::int64_t end = min(first + plan.group, plan.channels);
    RangeKeys range = RangeKeys::none();
    for (std::int64_t c = first + threadIdx.x; c < end; c += kWarpLanes) {
      const T element = plan.x[token * plan.x_token_stride + c * plan.x_channel_stride];
      range.add(checked_value(element, token * plan.channels + c, findings));
    }
    range.low = warp_least(range.low);
    range.inverted_high = warp_least(range.inverted_high);
    if (threadIdx.x == 0) ranges[v] = range;
  }
}

/// Turns ranges into grids that have no outliers.
///
/// Launch  any number of blocks of kThreads
/// Work    a thread per vector
/// Reads   ranges [num_vectors]
/// Writes  grids [num_vectors]
/// Needs   finite ranges; others give grids without meaning
__global__ void __launch_bounds__(kThreads)
    make_grids_kernel(const RangeKeys* ranges, std::int64_t num_vectors, QuantizeOptions options, VectorGrid* grids) {
  const float never = HUGE_VALF;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t v = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; v < num_vectors; v += step) {
    const UniformGrid grid = make_range_grid(ranges[v].low_value(), ranges[v].high_value(), options);
    grids[v] = {grid.qs, grid.offset, never, -never};
  }
}

/// Quantises and dequantises one element; exact ones keep their bits, which a float64 would lose through float32.
template <Steps kSteps, typename T>
__device__ T simulate_element(T element, VectorGrid grid, const QuantizeOptions& options,
                              const SharedCodebook& codebook) {
  const float value = element_value(element);
  if (value >= grid.upper || value <= grid.lower) return element;
  const bool is_degenerate = grid.qs == 0.0f;
  if (is_degenerate && !options.compat) return element;
  float simulated = grid.offset;
  if (!is_degenerate) {
    const UniformGrid of_vector{grid.qs, grid.offset};
    simulated = kSteps == Steps::kCodebook ? codebook.simulate(value, of_vector)
                                           : simulate_value(value, of_vector, largest_code(options.bits));
  }
  T result{};
  set_element(simulated, result);
  return result;
}

/// Writes every element: tokens outside [first_token, end_token) as they are, the others through their vector's grid.
///
/// Launch  any number of blocks of (32, kTileRows)
/// Work    tiles of 32 channels x kWriteTokens tokens, lanes on neighbouring channels
/// Reads   x once; grids [num_vectors], from the caches where vectors are long; the codebook, from shared memory
/// Writes  out [tokens, channels] once, may be x
/// Needs   grids of finite vectors
template <Axis kAxis, Steps kSteps, typename T>
__global__ void __launch_bounds__(kThreads)
    write_elements_kernel(VectorPlan<T> plan, std::int64_t num_tiles, const VectorGrid* grids) {
  __shared__ SharedCodebook codebook;
  if constexpr (kSteps == Steps::kCodebook) codebook.load(*plan.codebook);
  const std::int64_t tiles_across = divide_up(plan.channels, kWarpLanes);
  for (std::int64_t tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    const std::int64_t c = tile % tiles_across * kWarpLanes + threadIdx.x;
    if (c >= plan.channels) continue;
    const std::int64_t first = tile / tiles_across * kWriteTokens;
    const std::int64_t end = min(first + kWriteTokens, plan.tokens);
    VectorGrid grid{};
    std::int64_t grid_end = 0;  // the first token that needs another grid
    for (std::int64_t t = first + threadIdx.y; t < end; t += kTileRows) {
      T element = plan.x[t * plan.x_token_stride + c * plan.x_channel_stride];
      if (t >= plan.first_token && t < plan.end_token) {
        if constexpr (kAxis == Axis::kPerToken) {
          grid = grids[plan.template grid_index<kAxis>(t, c)];
        } else if (t >= grid_end) {
          grid = grids[plan.template grid_index<kAxis>(t, c)];
          grid_end = (t / plan.group + 1) * plan.group;
        }
        element = simulate_element<kSteps>(element, grid, plan.options, codebook);
      }
      plan.out[t * plan.out_token_stride + c * plan.out_channel_stride] = element;
    }
  }
}

/// How many vectors there are and where; 16 bits leave every token exact.
template <typename T>
VectorPlan<T> make_plan(const UniformProblem& problem) {
  VectorPlan<T> plan{};
  plan.x = static_cast<const T*>(problem.x);
  plan.out = static_cast<T*>(problem.out);
  plan.tokens = problem.tokens;
  plan.channels = problem.channels;
  plan.x_token_stride = problem.x_token_stride;
  plan.x_channel_stride = problem.x_channel_stride;
  plan.out_token_stride = problem.out_token_stride;
  plan.out_channel_stride = problem.out_channel_stride;
  plan.group = problem.group;
  plan.options = problem.options;
  plan.is_static = problem.static_grids != nullptr;
  plan.first_token = problem.options.protected_tokens;
  const bool by_channel = problem.options.axis == Axis::kPerChannel;
  const std::int64_t token_groups = by_channel ? num_token_groups(problem) : 0;
  plan.end_token = by_channel ? std::min(token_groups * problem.group, problem.tokens) : problem.tokens;
  if (problem.options.bits == 16 || plan.end_token <= plan.first_token) {
    plan.end_token = plan.first_token;
    return plan;
  }
  plan.first_group = by_channel ? plan.first_token / plan.group : 0;
  plan.num_groups = by_channel ? token_groups - plan.first_group : divide_up(plan.channels, plan.group);
  plan.num_vectors = plan.num_groups * (by_channel ? plan.channels : plan.end_token - plan.first_token);
  return plan;
}

template <typename T>
void launch_ranges(const VectorPlan<T>& plan, RangeKeys* ranges, Findings* findings, cudaStream_t stream) {
  if (plan.options.axis == Axis::kPerToken) {
    const int blocks = grid_blocks(divide_up(plan.num_vectors, kTileRows));
    range_per_token_kernel<<<blocks, kTileThreads, 0, stream>>>(plan, ranges, findings);
  } else {
    const std::int64_t tiles =
        divide_up(plan.channels, kWarpLanes) * divide_up(plan.group, kRangeTokens) * plan.num_groups;
    range_per_channel_kernel<<<grid_blocks(tiles), kTileThreads, 0, stream>>>(plan, tiles, ranges, findings);
  }
  check_cuda(cudaGetLastError(), "launch the ranges of simulate_uniform");
}

/// Chooses by the length of vectors how many share a block: groups of 32 and 64 would leave most of a block idle, and few
/// long channels most of the GPU.
template <typename T>
void launch_outlier_split(const VectorPlan<T>& plan, VectorGrid* grids, Findings* findings, cudaStream_t stream) {
  const bool is_short = plan.group <= 128;
  if (plan.options.axis == Axis::kPerToken) {
    if (is_short) {
      launch_split<Axis::kPerToken, 8, 256>(plan, nullptr, grids, findings, stream);
    } else {
      launch_split<Axis::kPerToken, 1, 256>(plan, nullptr, grids, findings, stream);
    }
  } else if (is_short) {
    launch_split<Axis::kPerChannel, 16, 256>(plan, nullptr, grids, findings, stream);
  } else {
    launch_split<Axis::kPerChannel, 8, 1024>(plan, nullptr, grids, findings, stream);
  }
}

template <Steps kSteps, typename T>
void launch_write_of(const VectorPlan<T>& plan, const VectorGrid* grids, cudaStream_t stream) {
  const std::int64_t tiles = num_element_tiles(plan);
  const int blocks = grid_blocks(tiles);
  if (plan.options.axis == Axis::kPerToken) {
    write_elements_kernel<Axis::kPerToken, kSteps><<<blocks, kTileThreads, 0, stream>>>(plan, tiles, grids);
  } else {
    write_elements_kernel<Axis::kPerChannel, kSteps><<<blocks, kTileThreads, 0, stream>>>(plan, tiles, grids);
  }
  check_cuda(cudaGetLastError(), "launch the writing of simulated quantisation");
}

template <typename T>
void launch_write(const VectorPlan<T>& plan, const VectorGrid* grids, cudaStream_t stream) {
  if (plan.codebook == nullptr) {
    launch_write_of<Steps::kUniform>(plan, grids, stream);
  } else {
    launch_write_of<Steps::kCodebook>(plan, grids, stream);
  }
}

/// Grids of all vectors, and what the host must know before anything is written. Synchronises the stream.
template <typename T>
Findings find_grids(const VectorPlan<T>& plan, bool with_outliers, VectorGrid* grids, cudaStream_t stream) {
  DeviceBuffer<Findings> findings(1, stream);
  findings.fill_bytes(0xff);
  if (plan.is_static) {
    launch_static_check(plan, grids, findings.data(), stream);
  } else if (plan.options.scale == ScaleRule::kRms) {
    launch_rms(plan, grids, findings.data(), stream);
  } else if (with_outliers) {
    launch_outlier_split(plan, grids, findings.data(), stream);
  } else {
    DeviceBuffer<RangeKeys> ranges(plan.num_vectors, stream);
    ranges.fill_bytes(0xff);
    launch_ranges(plan, ranges.data(), findings.data(), stream);
    make_grids_kernel<<<grid_blocks(divide_up(plan.num_vectors, kThreads)), kThreads, 0, stream>>>(
        ranges.data(), plan.num_vectors, plan.options, grids);
    check_cuda(cudaGetLastError(), "launch the grids of simulate_uniform");
  }
  Findings result{};
  findings.read_to(&result);
  return result;
}

/// The first value that is not finite, where a fast kernel has only met one: x is still as it was.
template <typename T>
Findings locate_bad(const VectorPlan<T>& plan, cudaStream_t stream) {
  DeviceBuffer<Findings> findings(1, stream);
  DeviceBuffer<RangeKeys> ranges(plan.num_vectors, stream);
  findings.fill_bytes(0xff);
  ranges.fill_bytes(0xff);
  launch_ranges(plan, ranges.data(), findings.data(), stream);
  Findings found{};
  findings.read_to(&found);
  return found;
}

/// Through the fast kernels, all of it before the host looks; nothing where the sequence is none for them.
template <typename T>
std::optional<Findings> try_packs(const VectorPlan<T>& plan, const UniformProblem& problem, cudaStream_t stream) {
  if (!takes_packs(plan, problem)) return std::nullopt;
  const CodebookTable codebook = problem.codebook == nullptr ? CodebookTable{} : *problem.codebook;
  DeviceBuffer<Findings> findings(1, stream);
  findings.fill_bytes(0xff);
  simulate_packs(Launch<T>{plan, codebook, findings.data(), stream}, problem);
  Findings found{};
  findings.read_to(&found);
  return found.first_bad == kSomewhere ? locate_bad(plan, stream) : found;
}

template <typename T>
UniformOutcome make_outcome(const VectorPlan<T>& plan, const Findings& findings) {
  UniformOutcome outcome;
  outcome.all_finite = findings.first_bad == ~Counter{0};
  if (!outcome.all_finite) {
    outcome.first_bad = static_cast<std::int64_t>(findings.first_bad);
    return outcome;
  }
  outcome.counts.quantized = (plan.end_token - plan.first_token) * plan.channels;
  outcome.counts.vectors = plan.num_vectors;
  outcome.counts.outliers = static_cast<std::int64_t>(findings.outliers + 1);
  return outcome;
}

template <typename T>
UniformOutcome simulate_as(const UniformProblem& problem) {
  VectorPlan<T> plan = make_plan<T>(problem);
  const auto stream = static_cast<cudaStream_t>(problem.stream);
  if (plan.num_vectors == 0) {
    if (!problem.only_check) launch_write<T>(plan, nullptr, stream);
    return {};
  }
  if constexpr (sizeof(T) <= 4) {
    const std::optional<Findings> findings = try_packs(plan, problem, stream);
    if (findings) return make_outcome(plan, *findings);
  }
  DeviceBuffer<CodebookTable> codebook(1, stream);
  if (problem.codebook != nullptr) {
    copy_to_device(codebook.data(), problem.codebook, 1, stream);
    plan.codebook = codebook.data();
  }
  const std::int64_t num_static = problem.options.axis == Axis::kPerToken ? plan.tokens : plan.channels;
  DeviceBuffer<VectorGrid> grids(plan.is_static ? num_static : plan.num_vectors, stream);
  if (plan.is_static) copy_to_device(grids.data(), problem.static_grids, num_static, stream);
  // A check alone needs no thresholds: the ranges read each element as well.
  const bool with_outliers = problem.options.outlier_fraction > 0.0 && !problem.only_check;
  const Findings findings = find_grids(plan, with_outliers, grids.data(), stream);
  const UniformOutcome outcome = make_outcome(plan, findings);
  if (outcome.all_finite && !problem.only_check) launch_write(plan, grids.data(), stream);
  return outcome;
}

}  // namespace

/// Synchronises its stream once per sequence: the caller must know that all values are finite, which for what
/// packs_launch_cuda.cuh does not take comes before x may be overwritten, and how many outliers there are. An operation
/// of accuracy studies, not of decoding.
UniformOutcome simulate_uniform(const UniformProblem& problem) {
  const bool by_channel = problem.options.axis == Axis::kPerChannel;
  const std::int64_t longest = std::min(problem.group, by_channel ? problem.tokens : problem.channels);
  constexpr std::int64_t kLongestVector = std::numeric_limits<std::int32_t>::max();
  if (longest > kLongestVector) {
    throw Unsupported(text("a vector has ", longest, " elements; simulate_uniform on cuda takes at most ",
                           kLongestVector, " that share a grid"));
  }
  const DeviceGuard device(problem.x, "x");
  keep_temporary_memory();
  return with_float_type(problem.dtype, [&]<typename T>() { return simulate_as<T>(problem); });
}

}  // namespace kvpack::cuda
