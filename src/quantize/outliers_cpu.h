// Outlier thresholds of one vector on the CPU without sorting it: from its two tails, or by selection when that fails.
#pragma once

#include <algorithm>
#include <cstdint>

#include "quantize/outliers.h"

namespace kvpack {

/// Why the tails are enough. Only the neighbours of both quantiles and the range of the dense part are needed. All
/// elements from a pivot upwards, where the pivot is at most the quantile's lower neighbour, hold the upper
/// neighbours, every upper outlier, and the largest element below the threshold. The median changes the range only
/// when it is an outlier itself, which its rank and the number of outliers tell. So one sweep that collects both tails
/// replaces the sort.

/// Elements of the upper tail that must be known: down to the quantile's lower neighbour.
inline std::int64_t upper_tail_length(const OutlierPlan& plan, std::int64_t n) { return n - plan.upper.below; }
inline std::int64_t lower_tail_length(const OutlierPlan& plan) { return plan.lower.above + 1; }

/// Below this, tails are so long that selection over the whole vector is the better way.
inline bool tails_are_short(const OutlierPlan& plan, std::int64_t n) {
  return std::max(upper_tail_length(plan, n), lower_tail_length(plan)) * 8 <= n;
}

/// Candidates of one side; `values` may be reordered.
struct Tail {
  float* values;
  std::int64_t count;
};

/// Finishes a vector of n values from both tails. Returns false when they do not decide it (ties up to the median, or
/// nothing dense among the candidates): then split_by_selection() must.
bool split_from_tails(Tail top, Tail bottom, std::int64_t n, const OutlierPlan& plan, OutlierSplit& split);

/// Finishes a vector from all its values, by selection; `values` is reordered.
OutlierSplit split_by_selection(float* values, std::int64_t n, const OutlierPlan& plan);

/// The rank-th largest (1 = largest) and the rank-th smallest of a few values, which are reordered.
float select_largest(float* values, std::int64_t count, std::int64_t rank);
float select_smallest(float* values, std::int64_t count, std::int64_t rank);

}  // namespace kvpack
