// Entry of magnitude pruning: checks, the rule's counts, dispatch.
#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "core/sequences.h"
#include "dispatch/registry.h"
#include "prune/implementations.h"
#include "prune/rule.h"

namespace kvpack {

namespace {

/// floor(s*D) with the slack that makes 0.7*10 seven.
std::int64_t dropped_per_row(double sparsity, std::int64_t head_dim) {
  return static_cast<std::int64_t>(std::floor(sparsity * static_cast<double>(head_dim) + 1e-6));
}

void require_sparsity(double sparsity) {
  require(sparsity >= 0.0 && sparsity < 1.0, "sparsity is ", sparsity, "; it must be at least 0 and below 1");
}

PruneProblem make_problem(const TensorView& x, const TensorView& out, const PruneOptions& options, void* stream) {
  PruneProblem problem;
  set_sequences(problem, x, out);
  problem.head_dim = options.head_dim > 0 ? options.head_dim : problem.channels;
  problem.protected_tokens = std::min(options.protected_tokens, problem.tokens);
  problem.rule = options.rule;
  problem.rank_from_top = rank_from_top(options.sparsity, options.rule, problem.head_dim);
  problem.channel_scores = options.channel_scores;
  problem.stream = stream;
  return problem;
}

}  // namespace

std::int64_t kept_per_row(double sparsity, std::int64_t head_dim) {
  require_sparsity(sparsity);
  require(head_dim >= 1, "head_dim is ", head_dim, "; it must be at least 1");
  return head_dim - dropped_per_row(sparsity, head_dim);
}

void require_prune_rule(double sparsity, PruneRule rule) {
  require_sparsity(sparsity);
  require(rule == PruneRule::kExact || rule == PruneRule::kKthValue, "there is no pruning rule number ",
          static_cast<int>(rule));
}

std::int64_t rank_from_top(double sparsity, PruneRule rule, std::int64_t head_dim) {
  const std::int64_t dropped = dropped_per_row(sparsity, head_dim);
  if (rule == PruneRule::kExact) return head_dim - dropped;
  // The max(1, dropped)-th smallest of D is the (D + 1 - that)-th largest.
  return head_dim + 1 - std::max<std::int64_t>(1, dropped);
}

PruneCounts prune_magnitude(const TensorView& x, const TensorView& out, const PruneOptions& options, void* stream) {
  require_sequence_pair(x, out);
  require_prune_rule(options.sparsity, options.rule);
  require(options.protected_tokens >= 0, "protected_tokens is ", options.protected_tokens, "; it must be at least 0");
  require(options.head_dim >= 0, "head_dim is ", options.head_dim, "; it must be at least 0");
  const std::int64_t channels = x.shape[static_cast<std::size_t>(x.rank - 1)];
  require(options.head_dim == 0 || channels % options.head_dim == 0, "head_dim ", options.head_dim,
          " does not divide the ", channels, " channels of x");
  const auto function = select<PruneFunction>(Operation::kPruneMagnitude, x.device.kind);
  PruneCounts counts;
  if (x.num_elements() == 0) return counts;
  for (std::int64_t i = 0; i < num_sequences(x); ++i) {
    run_packed(sequence(x, i), sequence(out, i), [&](const TensorView& source, const TensorView& target) {
      const PruneProblem problem = make_problem(source, target, options, stream);
      counts.rows += (problem.tokens - problem.protected_tokens) * (problem.channels / problem.head_dim);
      counts.kept += function(problem);
    });
  }
  return counts;
}

}  // namespace kvpack
