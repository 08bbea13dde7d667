// Which elements dense-and-sparse quantisation keeps exactly: quantile positions, thresholds, and the finished range of
// the dense part. THE rule, one function for every side. docs/numerics.md section 4.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/portable.h"

namespace kvpack {

/// Where a linear-interpolated quantile lies among n sorted values, computed as torch.quantile does on float32:
/// position q*(n-1) in float32, then lerp between the neighbours.
struct QuantilePosition {
  std::int64_t below = 0;
  std::int64_t above = 0;
  float weight = 0.0f;
};

KVPACK_HOST_DEVICE inline QuantilePosition quantile_position(double q, std::int64_t n) {
  const float position = static_cast<float>(q) * static_cast<float>(n - 1);
  const float below = floorf(position);
  // Beyond 2^24 values float32 may round a position past the last place.
  const auto first = static_cast<std::int64_t>(below);
  const auto second = static_cast<std::int64_t>(ceilf(position));
  return {first < n ? first : n - 1, second < n ? second : n - 1, position - below};
}

/// torch.lerp with one fused multiply-add: exact at both ends.
KVPACK_HOST_DEVICE inline float interpolate(float below, float above, float weight) {
  const float step = above - below;
  return weight < 0.5f ? fmaf(weight, step, below) : fmaf(weight - 1.0f, step, above);
}

/// Upper quantile of dense-and-sparse: t = 1 - (1 - threshold)/2 with threshold = 1 - outlier_fraction.
KVPACK_HOST_DEVICE inline double upper_quantile(double outlier_fraction) {
  const double threshold = 1.0 - outlier_fraction;
  return 1.0 - (1.0 - threshold) / 2.0;
}

/// What one vector of n values needs: both quantile positions.
struct OutlierPlan {
  QuantilePosition upper;
  QuantilePosition lower;
};

KVPACK_HOST_DEVICE inline OutlierPlan make_outlier_plan(double outlier_fraction, std::int64_t n) {
  const double t = upper_quantile(outlier_fraction);
  return {quantile_position(t, n), quantile_position(1.0 - t, n)};
}

/// Thresholds of one vector and the range of its dense part.
struct OutlierSplit {
  float upper = 0.0f;  // x >= upper is an outlier
  float lower = 0.0f;  // x <= lower is an outlier
  float low = 0.0f;    // smallest dense value, the median included where it stands in for outliers
  float high = 0.0f;
  std::int64_t outliers = 0;
};

}  // namespace kvpack
