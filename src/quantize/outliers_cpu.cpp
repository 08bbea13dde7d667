// Outlier thresholds by selection. Values are exact order statistics, so every instruction set finds the same ones.
#include "quantize/outliers_cpu.h"

#include <functional>
#include <limits>

namespace kvpack {

float select_largest(float* values, std::int64_t count, std::int64_t rank) {
  std::nth_element(values, values + (rank - 1), values + count, std::greater<float>());
  return values[rank - 1];
}

float select_smallest(float* values, std::int64_t count, std::int64_t rank) {
  std::nth_element(values, values + (rank - 1), values + count);
  return values[rank - 1];
}

bool split_from_tails(Tail top, Tail bottom, std::int64_t n, const OutlierPlan& plan, OutlierSplit& split) {
  const std::int64_t top_length = upper_tail_length(plan, n);
  const std::int64_t bottom_length = lower_tail_length(plan);
  if (top.count < top_length || bottom.count < bottom_length) return false;

  // After selection the wanted neighbour stands at its place and the further ones before it.
  const float upper_below = select_largest(top.values, top.count, top_length);
  const float upper_above =
      plan.upper.above == plan.upper.below ? upper_below : *std::min_element(top.values, top.values + (top_length - 1));
  split.upper = interpolate(upper_below, upper_above, plan.upper.weight);
  const float lower_above = select_smallest(bottom.values, bottom.count, bottom_length);
  const float lower_below = plan.lower.above == plan.lower.below
                                ? lower_above
                                : *std::max_element(bottom.values, bottom.values + (bottom_length - 1));
  split.lower = interpolate(lower_below, lower_above, plan.lower.weight);

  constexpr float kNone = std::numeric_limits<float>::infinity();
  std::int64_t num_upper = 0;
  std::int64_t num_lower = 0;
  split.high = -kNone;
  split.low = kNone;
  for (std::int64_t i = 0; i < top.count; ++i) {
    const float value = top.values[i];
    if (value >= split.upper) {
      ++num_upper;
    } else if (value > split.lower) {
      split.high = std::max(split.high, value);
    }
  }
  for (std::int64_t i = 0; i < bottom.count; ++i) {
    const float value = bottom.values[i];
    if (value <= split.lower) {
      ++num_lower;
    } else if (value < split.upper) {
      split.low = std::min(split.low, value);
    }
  }
  split.outliers = num_upper + num_lower;
  const bool found_dense = split.high > -kNone && split.low < kNone;
  const std::int64_t median_place = (n - 1) / 2;
  const bool median_is_dense = num_lower <= median_place && num_upper < n - median_place;
  return found_dense && median_is_dense;
}

OutlierSplit split_by_selection(float* values, std::int64_t n, const OutlierPlan& plan) {
  const auto at = [&](std::int64_t place) {
    std::nth_element(values, values + place, values + n);
    return values[place];
  };
  OutlierSplit split;
  const float upper_above = at(plan.upper.above);
  split.upper = interpolate(at(plan.upper.below), upper_above, plan.upper.weight);
  const float lower_above = at(plan.lower.above);
  split.lower = interpolate(at(plan.lower.below), lower_above, plan.lower.weight);
  const float median = at((n - 1) / 2);
  split.low = std::numeric_limits<float>::infinity();
  split.high = -split.low;
  for (std::int64_t i = 0; i < n; ++i) {
    const bool is_outlier = values[i] >= split.upper || values[i] <= split.lower;
    const float dense = is_outlier ? median : values[i];
    split.low = std::min(split.low, dense);
    split.high = std::max(split.high, dense);
    split.outliers += is_outlier;
  }
  return split;
}

}  // namespace kvpack
