// Protected tokens as KVQuant's tool has them: its statistics see every token of a channel, and only then the first ones
// are kept. Ours see the others only, in every implementation; so the grids of this one case are found here, beforehand.
#include <algorithm>
#include <limits>
#include <vector>

#include "core/half.h"
#include "core/parallel.h"
#include "core/with_type.h"
#include "quantize/outliers.h"
#include "quantize/prepare.h"

namespace kvpack {

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

bool needs_compat_grids(const QuantizeOptions& options, std::int64_t tokens) {
  const bool whole_channels = options.axis == Axis::kPerChannel && (options.group == 0 || options.group >= tokens);
  return options.compat && whole_channels && options.causality == Causality::kOracle &&
         options.scale == ScaleRule::kRange && options.bits != 16 && options.protected_tokens > 0 &&
         options.protected_tokens < tokens;
}

std::vector<VectorGrid> make_compat_grids(const TensorView& x, const QuantizeOptions& options) {
  std::vector<VectorGrid> grids(static_cast<std::size_t>(x.shape[1]));
  with_float_type(x.dtype, [&]<typename T>() {
    auto task = [&](std::int64_t c) {
      const T* column = static_cast<const T*>(x.data) + c * x.strides[1];
      std::vector<float> values(static_cast<std::size_t>(x.shape[0]));
      for (std::int64_t t = 0; t < x.shape[0]; ++t) {
        values[static_cast<std::size_t>(t)] = to_float(column[t * x.strides[0]]);
      }
      grids[static_cast<std::size_t>(c)] = find_compat_grid(values, options);
    };
    parallel_for(x.shape[1], task);
  });
  return grids;
}

}  // namespace kvpack
