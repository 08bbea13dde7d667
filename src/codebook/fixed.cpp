// Codebooks that need no samples: NormalFloat, and Lloyd and Max's for a normal variable.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "codebook/normal.h"
#include "core/check.h"
#include "kvpack/codebook.h"

namespace kvpack {

namespace {

/// What lies between two boundaries of a normal variable: its share, its mean, and how the mean moves with either one.
struct Cell {
  double mean;
  double by_low;
  double by_high;
};

Cell cell_between(double low, double high) {
  // In the upper half both probabilities are near 1: look at the mirror image instead, whose digits survive.
  if (low > 0.0) {
    const Cell mirrored = cell_between(-high, -low);
    return {-mirrored.mean, mirrored.by_high, mirrored.by_low};
  }
  const double share = normal_below(high) - normal_below(low);
  const double at_low = normal_density(low);
  const double at_high = normal_density(high);
  const double mean = (at_low - at_high) / share;
  return {mean, std::isinf(low) ? 0.0 : at_low * (mean - low) / share,
          std::isinf(high) ? 0.0 : at_high * (high - mean) / share};
}

/// One Newton step towards "every centroid is its cell's mean"; the system is tridiagonal. Returns the largest change.
double improve_centroids(std::vector<double>& centroids) {
  const std::size_t n = centroids.size();
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  std::vector<double> diagonal(n);
  std::vector<double> above(n);
  std::vector<double> below(n);
  std::vector<double> change(n);
  for (std::size_t k = 0; k < n; ++k) {
    const double low = k == 0 ? -kInfinity : 0.5 * (centroids[k - 1] + centroids[k]);
    const double high = k + 1 == n ? kInfinity : 0.5 * (centroids[k] + centroids[k + 1]);
    const Cell cell = cell_between(low, high);
    diagonal[k] = 1.0 - 0.5 * cell.by_low - 0.5 * cell.by_high;
    below[k] = -0.5 * cell.by_low;
    above[k] = -0.5 * cell.by_high;
    change[k] = cell.mean - centroids[k];
  }
  for (std::size_t k = 1; k < n; ++k) {
    const double factor = below[k] / diagonal[k - 1];
    diagonal[k] -= factor * above[k - 1];
    change[k] -= factor * change[k - 1];
  }
  double largest = 0.0;
  for (std::size_t k = n; k-- > 0;) {
    change[k] = (change[k] - (k + 1 < n ? above[k] * change[k + 1] : 0.0)) / diagonal[k];
    largest = std::max(largest, std::fabs(change[k]));
  }
  for (std::size_t k = 0; k < n; ++k) centroids[k] += change[k];
  return largest;
}

}  // namespace

void make_nf_codebook(std::int32_t bits, float* codebook) {
  require(bits == 2 || bits == 3 || bits == 4 || bits == 5 || bits == 8, "bits is ", bits,
          "; NF codebooks have 2, 3, 4, 5 or 8");
  require(codebook != nullptr, "codebook is a null pointer");
  const double outermost = 0.5 * (1.0 / 32.0 + 1.0 / 30.0);
  const double reach = -normal_quantile(outermost);
  const std::int32_t half = 1 << (bits - 1);
  // Negative half: `half` shares from the outermost to 1/2, which is the zero. Positive half: one more, without its zero.
  for (std::int32_t i = 0; i < half; ++i) {
    const double p = outermost + (0.5 - outermost) * i / (half - 1);
    codebook[i] = i == half - 1 ? 0.0f : static_cast<float>(normal_quantile(p) / reach);
  }
  for (std::int32_t i = 1; i <= half; ++i) {
    const double p = 0.5 - (0.5 - outermost) * i / half;
    codebook[half - 1 + i] = static_cast<float>(-normal_quantile(p) / reach);
  }
}

void make_gaussian_codebook(std::int32_t levels, float* codebook) {
  constexpr std::int32_t kMostLevels = 1024;
  require(levels >= 1 && levels <= kMostLevels, "levels is ", levels, "; it is 1 to ", kMostLevels);
  require(codebook != nullptr, "codebook is a null pointer");
  const auto n = static_cast<std::size_t>(levels);
  std::vector<double> centroids(n);
  // Many levels lie as densely as the cube root of the density (Panter & Dite): quantiles of variance 3.
  for (std::size_t k = 0; k < n; ++k) {
    const double share = (static_cast<double>(k) + 0.5) / static_cast<double>(n);
    centroids[k] = std::sqrt(3.0) * normal_quantile(share);
  }
  constexpr int kMostSteps = 50;  // 10 are enough up to 1024 levels
  for (int step = 0; step < kMostSteps && improve_centroids(centroids) > 1e-13; ++step) {
  }
  for (std::size_t k = 0; k < n; ++k) codebook[k] = static_cast<float>(0.5 * (centroids[k] - centroids[n - 1 - k]));
}

}  // namespace kvpack
