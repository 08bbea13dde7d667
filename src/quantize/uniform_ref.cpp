// Reference of simulated quantisation: one vector at a time, sorted where order matters. Every other
// implementation is compared with this one, bit for bit.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/half.h"
#include "core/with_type.h"
#include "quantize/implementations.h"
#include "quantize/outliers.h"
#include "quantize/uniform.h"

namespace kvpack::reference {

namespace {

/// Outliers of a vector and the range of the rest, straight from the definition.
OutlierSplit split_outliers(const std::vector<float>& values, double outlier_fraction) {
  std::vector<float> sorted = values;
  std::sort(sorted.begin(), sorted.end());
  const auto n = static_cast<std::int64_t>(sorted.size());
  const auto at = [&](std::int64_t place) { return sorted[static_cast<std::size_t>(place)]; };
  const auto quantile = [&](const QuantilePosition& position) {
    return interpolate(at(position.below), at(position.above), position.weight);
  };
  const OutlierPlan plan = make_outlier_plan(outlier_fraction, n);
  OutlierSplit split;
  split.upper = quantile(plan.upper);
  split.lower = quantile(plan.lower);
  const float median = at((n - 1) / 2);  // the lower of the two middle values
  std::vector<float> dense = values;
  for (float& value : dense) {
    if (value < split.upper && value > split.lower) continue;
    value = median;
    ++split.outliers;
  }
  split.low = *std::min_element(dense.begin(), dense.end());
  split.high = *std::max_element(dense.begin(), dense.end());
  return split;
}

/// Range of the values, none of them an outlier.
OutlierSplit whole_range(const std::vector<float>& values) {
  OutlierSplit split;
  split.low = *std::min_element(values.begin(), values.end());
  split.high = *std::max_element(values.begin(), values.end());
  return split;
}

UniformGrid rms_grid(const std::vector<float>& values) {
  float strands[kStrands] = {};
  for (std::size_t i = 0; i < values.size(); ++i) {
    float& strand = strands[i % kStrands];
    strand = strand + values[i] * values[i];
  }
  return make_rms_grid(join_strands(strands), static_cast<std::int64_t>(values.size()));
}

/// Grid and thresholds of one vector; `fixed` is its calibrated grid, or null.
VectorGrid find_grid(const std::vector<float>& values, const UniformProblem& problem, const VectorGrid* fixed) {
  if (fixed != nullptr) return *fixed;
  const QuantizeOptions& options = problem.options;
  constexpr float kNever = std::numeric_limits<float>::infinity();
  if (options.scale == ScaleRule::kRms) {
    const UniformGrid grid = rms_grid(values);
    return {grid.qs, grid.offset, kNever, -kNever};
  }
  const bool has_outliers = options.outlier_fraction > 0.0;
  const OutlierSplit split = has_outliers ? split_outliers(values, options.outlier_fraction) : whole_range(values);
  const UniformGrid grid = make_range_grid(split.low, split.high, options);
  return {grid.qs, grid.offset, has_outliers ? split.upper : kNever, has_outliers ? split.lower : -kNever};
}

/// One vector: `count` elements `x_stride` apart.
template <typename T>
void simulate_vector(const T* x, std::int64_t x_stride, T* out, std::int64_t out_stride, std::int64_t count,
                     const UniformProblem& problem, const VectorGrid* fixed, UniformOutcome& outcome) {
  std::vector<float> values(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) {
    values[static_cast<std::size_t>(i)] = to_float(x[i * x_stride]);
    if (!std::isfinite(values[static_cast<std::size_t>(i)])) {
      outcome.all_finite = false;
      return;
    }
  }
  const VectorGrid vector = find_grid(values, problem, fixed);
  const UniformGrid grid{vector.qs, vector.offset};
  const CodebookTable* codebook = problem.codebook;
  for (std::int64_t i = 0; i < count; ++i) {
    const float value = values[static_cast<std::size_t>(i)];
    const bool is_outlier = value >= vector.upper || value <= vector.lower;
    const bool is_degenerate = grid.qs == 0.0f;
    T result = x[i * x_stride];
    if (!is_outlier && is_degenerate && problem.options.compat) from_float(grid.offset, result);
    if (!is_outlier && !is_degenerate) {
      from_float(codebook == nullptr
                     ? simulate_value(value, grid, largest_code(problem.options.bits))
                     : simulate_with_codebook(value, grid, codebook->boundaries, codebook->values, codebook->levels),
                 result);
    }
    out[i * out_stride] = result;
    outcome.counts.outliers += is_outlier;
  }
  outcome.counts.vectors += 1;
  outcome.counts.quantized += count;
}

template <typename T>
UniformOutcome simulate_as(const UniformProblem& problem) {
  const auto* x = static_cast<const T*>(problem.x);
  auto* out = static_cast<T*>(problem.out);
  UniformOutcome outcome;
  const auto copy_tokens = [&](std::int64_t first, std::int64_t end) {
    for (std::int64_t t = first; t < end; ++t) {
      std::copy_n(x + t * problem.x_token_stride, problem.channels, out + t * problem.out_token_stride);
    }
  };
  const auto fixed = [&](std::int64_t token, std::int64_t channel) {
    return problem.static_grids == nullptr ? nullptr : &static_grid(problem, token, channel);
  };
  if (problem.options.axis == Axis::kPerToken) {
    for (std::int64_t t = problem.options.protected_tokens; t < problem.tokens; ++t) {
      for (std::int64_t c = 0; c < problem.channels; c += problem.group) {
        simulate_vector(x + t * problem.x_token_stride + c, 1, out + t * problem.out_token_stride + c, 1,
                        std::min(problem.group, problem.channels - c), problem, fixed(t, c), outcome);
      }
    }
  } else {
    const std::int64_t groups = num_token_groups(problem);
    for (std::int64_t g = 0; g < groups; ++g) {
      const TokenRange range = token_group(problem, g);
      if (range.first == range.end) continue;
      for (std::int64_t c = 0; c < problem.channels; ++c) {
        simulate_vector(x + range.first * problem.x_token_stride + c, problem.x_token_stride,
                        out + range.first * problem.out_token_stride + c, problem.out_token_stride,
                        range.end - range.first, problem, fixed(range.first, c), outcome);
      }
    }
    copy_tokens(std::max(groups * problem.group, problem.options.protected_tokens), problem.tokens);
  }
  copy_tokens(0, problem.options.protected_tokens);
  return outcome;
}

}  // namespace

UniformOutcome simulate_uniform(const UniformProblem& problem) {
  return with_float_type(problem.dtype, [&]<typename T>() { return simulate_as<T>(problem); });
}

}  // namespace kvpack::reference
