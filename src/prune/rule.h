// The numbers that follow from a pruning rule, for every operation that prunes.
#pragma once

#include <cstdint>

#include "kvpack/prune.h"

namespace kvpack {

/// Throws InvalidArgument for a share or a rule that does not exist.
void require_prune_rule(double sparsity, PruneRule rule);

/// Which of a row's magnitudes, counted from the largest (1 .. head_dim), is the threshold.
std::int64_t rank_from_top(double sparsity, PruneRule rule, std::int64_t head_dim);

}  // namespace kvpack
