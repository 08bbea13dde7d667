// The standard normal distribution, from the C library's erfc and exp.
#include "codebook/normal.h"

#include <cmath>
#include <numbers>

namespace kvpack {

double normal_density(double x) {
  constexpr double kInverseRoot = std::numbers::inv_sqrtpi / std::numbers::sqrt2;
  return kInverseRoot * std::exp(-0.5 * x * x);
}

double normal_below(double x) { return 0.5 * std::erfc(-x / std::numbers::sqrt2); }

double normal_quantile(double p) {
  if (p == 0.5) return 0.0;
  if (p > 0.5) return -normal_quantile(1.0 - p);
  // A start within 0.0005 (Abramowitz & Stegun 26.2.23), then Halley's rule, which triples the digits: three are plenty.
  const double t = std::sqrt(-2.0 * std::log(p));
  double x = (2.515517 + t * (0.802853 + t * 0.010328)) / (1.0 + t * (1.432788 + t * (0.189269 + t * 0.001308))) - t;
  for (int i = 0; i < 3; ++i) {
    const double step = (normal_below(x) - p) / normal_density(x);
    x -= step / (1.0 + 0.5 * x * step);
  }
  return x;
}

}  // namespace kvpack
