// Magnitude pruning on the GPU. A row's threshold is found bit by bit from the top, as in prune/magnitude_cpu.h: counts
// of ranks decide each bit, nothing is sorted.
#include <cuda_runtime.h>

#include <optional>

#include "core/with_type.h"
#include "cuda/buffer.h"
#include "cuda/check.h"
#include "cuda/device.h"
#include "cuda/element.cuh"
#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "prune/implementations.h"
#include "prune/magnitude_cuda.cuh"

namespace kvpack::cuda {

namespace {

using Counter = unsigned long long;  // the type that atomicAdd knows

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpLanes;

/// Where a row of one (token, head) lies.
template <typename T>
struct Row {
  const T* x;
  T* out;
  const float* scores;  // or null
  bool is_protected;
};

template <typename T>
__device__ Row<T> row_at(const PruneProblem& problem, std::int64_t index) {
  const std::int64_t heads = problem.channels / problem.head_dim;
  const std::int64_t token = index / heads;
  const std::int64_t first = index % heads * problem.head_dim;
  return {static_cast<const T*>(problem.x) + token * problem.x_token_stride + first * problem.x_channel_stride,
          static_cast<T*>(problem.out) + token * problem.out_token_stride + first * problem.out_channel_stride,
          problem.channel_scores == nullptr ? nullptr : problem.channel_scores + first,
          token < problem.protected_tokens};
}

/// Prunes rows of at most kSlots * 32 entries, a warp each; ranks stay in registers.
///
///   head_dim 80, kSlots 4          slot 0          slot 1          slot 2          slot 3
///   entry of lane 0, 1, ..., 31    0  1 ... 31     32 33 ... 63    64 ... 79 -     - - ... -
///
/// Launch  any number of blocks of kThreads
/// Work    warp w of the grid takes rows w, w + warps, ...; 31 counts of kSlots ballots' worth of compares at most
/// Reads   x [tokens, channels], channel_scores [channels] or null, both once
/// Writes  out [tokens, channels] once, may be x; adds the survivors of rows that are not protected to *kept, if not null
/// Needs   head_dim <= kSlots * 32; sm_80 for the warp's integer reductions
template <typename T, int kSlots>
__global__ void __launch_bounds__(kThreads)
    prune_rows_kernel(PruneProblem problem, std::int64_t num_rows, Counter* kept) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const std::uint32_t lanes_below = (1u << lane) - 1u;
  std::uint32_t survivors = 0;
  for (std::int64_t r = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpLanes; r < num_rows;
       r += static_cast<std::int64_t>(gridDim.x) * kWarps) {
    const Row<T> row = row_at<T>(problem, r);
    T entries[kSlots];
    std::uint32_t ranks[kSlots];  // 0 beyond the row: never reached by a candidate, which is at least 1
    std::uint32_t all_bits = 0;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int i = s * kWarpLanes + lane;
      ranks[s] = 0;
      if (i >= problem.head_dim) continue;
      entries[s] = row.x[i * problem.x_channel_stride];
      ranks[s] = magnitude_rank(element_value(entries[s]), row.scores == nullptr ? nullptr : row.scores + i);
      all_bits |= ranks[s];
    }
    Cut cut{0, 0};  // everything survives
    if (!row.is_protected) cut = find_warp_cut(ranks, all_bits, problem.rank_from_top, problem.rule);
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int i = s * kWarpLanes + lane;
      const bool is_tie = cut.num_ties > 0 && ranks[s] == cut.at_least - 1u;
      const std::uint32_t ties = __ballot_sync(kAllLanes, is_tie);
      const bool survives = ranks[s] >= cut.at_least || (is_tie && __popc(ties & lanes_below) < cut.num_ties);
      cut.num_ties -= __popc(ties);
      if (i >= problem.head_dim) continue;
      row.out[i * problem.out_channel_stride] = survives ? entries[s] : T{};
      survivors += survives && !row.is_protected;
    }
  }
  if (kept == nullptr) return;
  survivors = warp_sum(survivors);
  if (lane == 0) atomicAdd(kept, static_cast<Counter>(survivors));
}

/// Prunes rows too long for registers, a block each; x is read again for each bit of the threshold.
///
/// Launch  any number of blocks of kThreads
/// Work    block b takes rows b, b + blocks, ...
/// Reads   x up to 33 times, channel_scores [channels] or null
/// Writes  out once, after the last count: it may be x; *kept as above
/// Needs   nothing beyond sm_80
template <typename T>
__global__ void __launch_bounds__(kThreads)
    prune_wide_rows_kernel(PruneProblem problem, std::int64_t num_rows, Counter* kept) {
  const auto add = [](std::int64_t a, std::int64_t b) { return a + b; };
  std::int64_t survivors = 0;
  for (std::int64_t r = blockIdx.x; r < num_rows; r += gridDim.x) {
    const Row<T> row = row_at<T>(problem, r);
    const auto rank_at = [&](std::int64_t i) {
      const float* score = row.scores == nullptr ? nullptr : row.scores + i;
      return magnitude_rank(element_value(row.x[i * problem.x_channel_stride]), score);
    };
    const auto count_at_least = [&](std::uint32_t candidate) {
      std::int64_t count = 0;
      for (std::int64_t i = threadIdx.x; i < problem.head_dim; i += kThreads) count += rank_at(i) >= candidate;
      return block_reduce<kThreads>(count, add);
    };
    constexpr std::uint32_t kEveryBit = 0x7fffffffu;
    Cut cut{0, 0};
    if (!row.is_protected) cut = find_cut(kEveryBit, problem.rank_from_top, problem.rule, count_at_least);
    for (std::int64_t first = 0; first < problem.head_dim; first += kThreads) {
      const std::int64_t i = first + threadIdx.x;
      const bool inside = i < problem.head_dim;
      const std::uint32_t rank = inside ? rank_at(i) : 0;
      const bool is_tie = inside && cut.num_ties > 0 && rank == cut.at_least - 1u;
      // Ties in front of this thread's, found by one more sum: rows this wide are rare.
      __shared__ std::uint32_t ties_of_warp[kWarps];
      const std::uint32_t ties = __ballot_sync(kAllLanes, is_tie);
      const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
      if (threadIdx.x % kWarpLanes == 0) ties_of_warp[warp] = static_cast<std::uint32_t>(__popc(ties));
      __syncthreads();
      std::int64_t ties_before = __popc(ties & ((1u << (threadIdx.x % kWarpLanes)) - 1u));
      std::int64_t all_ties = 0;
      for (int w = 0; w < kWarps; ++w) {
        if (w < warp) ties_before += ties_of_warp[w];
        all_ties += ties_of_warp[w];
      }
      __syncthreads();  // the next round writes ties_of_warp
      const bool survives = rank >= cut.at_least || (is_tie && ties_before < cut.num_ties);
      cut.num_ties -= all_ties;
      if (!inside) continue;
      row.out[i * problem.out_channel_stride] = survives ? row.x[i * problem.x_channel_stride] : T{};
      survivors += survives && !row.is_protected;
    }
  }
  if (kept != nullptr) atomicAdd(kept, static_cast<Counter>(survivors));
}

template <typename T>
void launch_prune(const PruneProblem& problem, std::int64_t num_rows, Counter* kept) {
  const auto stream = static_cast<cudaStream_t>(problem.stream);
  const int blocks = grid_blocks(divide_up(num_rows, kWarps));
  if (problem.head_dim <= 64) {
    prune_rows_kernel<T, 2><<<blocks, kThreads, 0, stream>>>(problem, num_rows, kept);
  } else if (problem.head_dim <= 128) {
    prune_rows_kernel<T, 4><<<blocks, kThreads, 0, stream>>>(problem, num_rows, kept);
  } else if (problem.head_dim <= 256) {
    prune_rows_kernel<T, 8><<<blocks, kThreads, 0, stream>>>(problem, num_rows, kept);
  } else if (problem.head_dim <= 1024) {
    prune_rows_kernel<T, 32><<<blocks, kThreads, 0, stream>>>(problem, num_rows, kept);
  } else {
    prune_wide_rows_kernel<T><<<grid_blocks(num_rows), kThreads, 0, stream>>>(problem, num_rows, kept);
  }
  check_cuda(cudaGetLastError(), "launch prune_magnitude");
}

}  // namespace

/// Rule kExact keeps a known number of entries, so the call returns while the stream works. Rule kKthValue keeps ties
/// together: their number is read back, which synchronises the stream.
std::int64_t prune_magnitude(const PruneProblem& problem) {
  const DeviceGuard device(problem.x, "x");
  const std::int64_t heads = problem.channels / problem.head_dim;
  std::optional<DeviceBuffer<Counter>> counter;
  if (problem.rule == PruneRule::kKthValue) {
    counter.emplace(1, static_cast<cudaStream_t>(problem.stream));
    counter->fill_bytes(0);
  }
  Counter* kept_on_device = counter ? counter->data() : nullptr;
  with_float_type(problem.dtype,
                  [&]<typename T>() { launch_prune<T>(problem, problem.tokens * heads, kept_on_device); });
  if (!counter) return (problem.tokens - problem.protected_tokens) * heads * problem.rank_from_top;
  Counter kept = 0;
  counter->read_to(&kept);
  return static_cast<std::int64_t>(kept);
}

}  // namespace kvpack::cuda
