// Entry of magnitude pruning: checks, the rule's counts, dispatch.
#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "core/sequences.h"
#include "dispatch/registry.h"
#include "prune/implementations.h"

namespace kvpack {

namespace {

/// floor(s*D) with the slack that makes 0.7*10 seven.
std::int64_t dropped_per_row(double sparsity, std::int64_t head_dim) {
  return static_cast<std::int64_t>(std::floor(sparsity * static_cast<double>(head_dim) + 1e-6));
}

PruneProblem make_problem(const TensorView& x, const TensorView& out, const PruneOptions& options, void* stream) {
  PruneProblem problem;
  problem.x = x.data;
  problem.out = out.data;
  problem.dtype = x.dtype;
  problem.tokens = x.shape[0];
  problem.channels = x.shape[1];
  problem.head_dim = options.head_dim > 0 ? options.head_dim : problem.channels;
  problem.x_token_stride = x.strides[0];
  problem.x_channel_stride = x.strides[1];
  problem.out_token_stride = out.strides[0];
  problem.out_channel_stride = out.strides[1];
  problem.protected_tokens = std::min(options.protected_tokens, problem.tokens);
  problem.rule = options.rule;
  const std::int64_t dropped = dropped_per_row(options.sparsity, problem.head_dim);
  // The max(1, dropped)-th smallest of D is the (D + 1 - that)-th largest.
  problem.rank_from_top = options.rule == PruneRule::kExact ? problem.head_dim - dropped
                                                            : problem.head_dim + 1 - std::max<std::int64_t>(1, dropped);
  problem.channel_scores = options.channel_scores;
  problem.stream = stream;
  return problem;
}

}  // namespace

std::int64_t kept_per_row(double sparsity, std::int64_t head_dim) {
  require(sparsity >= 0.0 && sparsity < 1.0, "sparsity is ", sparsity, "; it must be at least 0 and below 1");
  require(head_dim >= 1, "head_dim is ", head_dim, "; it must be at least 1");
  return head_dim - dropped_per_row(sparsity, head_dim);
}

PruneCounts prune_magnitude(const TensorView& x, const TensorView& out, const PruneOptions& options, void* stream) {
  require_sequence_pair(x, out);
  require(options.sparsity >= 0.0 && options.sparsity < 1.0, "sparsity is ", options.sparsity,
          "; it must be at least 0 and below 1");
  require(options.rule == PruneRule::kExact || options.rule == PruneRule::kKthValue, "there is no pruning rule number ",
          static_cast<int>(options.rule));
  require(options.protected_tokens >= 0, "protected_tokens is ", options.protected_tokens, "; it must be at least 0");
  require(options.head_dim >= 0, "head_dim is ", options.head_dim, "; it must be at least 0");
  const std::int64_t channels = x.shape[static_cast<std::size_t>(x.rank - 1)];
  require(options.head_dim == 0 || channels % options.head_dim == 0, "head_dim ", options.head_dim,
          " does not divide the ", channels, " channels of x");
  const auto function = select<PruneFunction>(Operation::kPruneMagnitude, x.device.kind);
  PruneCounts counts;
  if (x.num_elements() == 0) return counts;
  for (std::int64_t i = 0; i < num_sequences(x); ++i) {
    const TensorView source = sequence(x, i);
    const TensorView target = sequence(out, i);
    const PruneProblem problem = make_problem(source, target, options, stream);
    counts.rows += (problem.tokens - problem.protected_tokens) * (problem.channels / problem.head_dim);
    if (x.device.kind == DeviceKind::kCpu && (source.strides[1] != 1 || target.strides[1] != 1)) {
      const PackedSequence packed(source);
      counts.kept += function(make_problem(packed.view(), packed.view(), options, stream));
      packed.unpack_to(target);
    } else {
      counts.kept += function(problem);
    }
  }
  return counts;
}

}  // namespace kvpack
