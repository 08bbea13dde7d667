// What every implementation of simulated quantisation receives, and the list of them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/divide_up.h"
#include "kvpack/quantize.h"
#include "quantize/codebook.h"

namespace kvpack {

/// One sequence after all checks. Trivially copyable; also handed to the CUDA library.
struct UniformProblem {
  const void* x = nullptr;  // [tokens, channels]
  void* out = nullptr;      // [tokens, channels], may be x
  DType dtype = DType::kFloat32;
  std::int64_t tokens = 0;
  std::int64_t channels = 0;
  std::int64_t x_token_stride = 0;    // elements
  std::int64_t x_channel_stride = 1;  // 1 on the CPU: the entry packs other layouts first
  std::int64_t out_token_stride = 0;
  std::int64_t out_channel_stride = 1;
  QuantizeOptions options;                   // bits 16 reaches only CUDA; protected_tokens at most tokens
  const CodebookTable* codebook = nullptr;   // in host memory; null: a uniform grid
  const VectorGrid* static_grids = nullptr;  // [channels], per token [tokens], in host memory; null: found from x
  std::int64_t group = 0;                    // elements of a vector that share a grid, at least 1
  bool only_check = false;                   // CUDA: look for values that are not finite, and write nothing
  void* stream = nullptr;
};

/// What an implementation found. Where a vector holds a value that is not finite, the entry names it.
struct UniformOutcome {
  UniformCounts counts;
  bool all_finite = true;
  std::int64_t first_bad = -1;  // CUDA: token * channels + channel of the first value that is not finite
};

using UniformFunction = UniformOutcome (*)(const UniformProblem&);

/// What finding the grids of `compat` with protected tokens came upon.
struct CompatOutcome {
  std::int64_t first_bad = -1;  // token * channels + channel of the first value that is not finite; grids are open then
};

/// Writes the grid of every channel, [channels] in host memory, with the published tool's statistics.
using CompatGridsFunction = CompatOutcome (*)(const UniformProblem&, VectorGrid* grids);

/// Tokens [first, end) of one group of a per-channel vector.
struct TokenRange {
  std::int64_t first;
  std::int64_t end;
};

/// Groups lie at multiples of `group` from the start of the sequence, whatever is protected, so that a decoder meets
/// the same groups. Group `index` without its protected tokens; may be empty.
inline TokenRange token_group(const UniformProblem& problem, std::int64_t index) {
  const std::int64_t first = std::max(index * problem.group, problem.options.protected_tokens);
  return {first, std::max(first, std::min((index + 1) * problem.group, problem.tokens))};
}

/// Number of groups that are quantised: in causal mode an incomplete last group stays exact.
inline std::int64_t num_token_groups(const UniformProblem& problem) {
  const bool only_complete = problem.options.causality == Causality::kCausal;
  return only_complete ? problem.tokens / problem.group : divide_up(problem.tokens, problem.group);
}

/// The calibrated grid of a vector; `channel` counts per channel, `token` per token.
inline const VectorGrid& static_grid(const UniformProblem& problem, std::int64_t token, std::int64_t channel) {
  return problem.static_grids[problem.options.axis == Axis::kPerToken ? token : channel];
}

namespace reference {
UniformOutcome simulate_uniform(const UniformProblem& problem);
CompatOutcome find_compat_grids(const UniformProblem& problem, VectorGrid* grids);
}  // namespace reference
namespace scalar {
UniformOutcome simulate_uniform(const UniformProblem& problem);
}
namespace avx2 {
UniformOutcome simulate_uniform(const UniformProblem& problem);
}
namespace avx512 {
UniformOutcome simulate_uniform(const UniformProblem& problem);
}
namespace cuda {  // in libkvpack_cuda
UniformOutcome simulate_uniform(const UniformProblem& problem);
CompatOutcome find_compat_grids(const UniformProblem& problem, VectorGrid* grids);
}  // namespace cuda

}  // namespace kvpack
