// Protected tokens as KVQuant's tool has them: its statistics see every token of a channel, and only then the first ones
// are kept. Ours see the others only, in every implementation; so the grids of this one case are found here, beforehand.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/half.h"
#include "core/parallel.h"
#include "core/with_type.h"
#include "quantize/implementations.h"
#include "quantize/outliers.h"

namespace kvpack::reference {

namespace {

/// One channel: quantiles and median over all tokens, the range over those that are neither protected nor outliers, and
/// the median, which stands for both. Without outliers the old tool looks at no mask: the range is that of all tokens.
VectorGrid find_compat_grid(const std::vector<float>& values, const QuantizeOptions& options) {
  constexpr float kNever = std::numeric_limits<float>::infinity();
  if (options.outlier_fraction == 0.0) {
    const auto [low, high] = std::minmax_element(values.begin(), values.end());
    const UniformGrid grid = make_range_grid(*low, *high, options);
    return {grid.qs, grid.offset, kNever, -kNever};
  }
  std::vector<float> sorted = values;
  std::sort(sorted.begin(), sorted.end());
  const auto n = static_cast<std::int64_t>(sorted.size());
  const auto at = [&](std::int64_t place) { return sorted[static_cast<std::size_t>(place)]; };
  const auto quantile = [&](const QuantilePosition& position) {
    return interpolate(at(position.below), at(position.above), position.weight);
  };
  const OutlierPlan plan = make_outlier_plan(options.outlier_fraction, n);
  const float upper = quantile(plan.upper);
  const float lower = quantile(plan.lower);
  float low = at((n - 1) / 2);
  float high = low;
  for (auto i = static_cast<std::size_t>(options.protected_tokens); i < values.size(); ++i) {
    if (values[i] >= upper || values[i] <= lower) continue;
    low = std::min(low, values[i]);
    high = std::max(high, values[i]);
  }
  const UniformGrid grid = make_range_grid(low, high, options);
  return {grid.qs, grid.offset, upper, lower};
}

}  // namespace

CompatOutcome find_compat_grids(const UniformProblem& problem, VectorGrid* grids) {
  std::vector<std::int64_t> first_bad(static_cast<std::size_t>(problem.channels), problem.tokens);
  with_float_type(problem.dtype, [&]<typename T>() {
    auto task = [&](std::int64_t c) {
      const T* column = static_cast<const T*>(problem.x) + c * problem.x_channel_stride;
      std::vector<float> values(static_cast<std::size_t>(problem.tokens));
      for (std::int64_t t = 0; t < problem.tokens; ++t) {
        values[static_cast<std::size_t>(t)] = to_float(column[t * problem.x_token_stride]);
      }
      const auto bad = std::find_if(values.begin(), values.end(), [](float value) { return !std::isfinite(value); });
      first_bad[static_cast<std::size_t>(c)] = bad - values.begin();
      if (bad == values.end()) grids[c] = find_compat_grid(values, problem.options);
    };
    parallel_for(problem.channels, task);
  });
  CompatOutcome outcome;
  for (std::int64_t c = 0; c < problem.channels; ++c) {
    const std::int64_t token = first_bad[static_cast<std::size_t>(c)];
    const std::int64_t place = token * problem.channels + c;
    if (token < problem.tokens && (outcome.first_bad < 0 || place < outcome.first_bad)) outcome.first_bad = place;
  }
  return outcome;
}

}  // namespace kvpack::reference
