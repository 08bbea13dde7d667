// The standard normal distribution in float64: density, probabilities of both tails, quantiles.
#pragma once

namespace kvpack {

double normal_density(double x);
/// Probability below x, with full relative accuracy in the lower tail.
double normal_below(double x);
/// The x below which a share p in (0, 1) lies, to about 15 digits.
double normal_quantile(double p);

}  // namespace kvpack
