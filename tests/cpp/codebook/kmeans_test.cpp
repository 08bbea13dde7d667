// Exact k-means: dynamic programming against every cut, on weighted points of all kinds, and its speed.
#include "codebook/kmeans.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <random>

#include "kvpack/kvpack.h"
#include "support/compare.h"

namespace kvpack::test {
namespace {

TEST(FindClusters, EqualsTheBestOfEveryCut) {
  std::mt19937 random(kSeed);
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> uniform(0.01, 5.0);
  for (int trial = 0; trial < 600; ++trial) {
    const auto count = 1 + static_cast<std::int64_t>(random() % 13);
    std::vector<double> values;
    std::vector<double> weights;
    for (std::int64_t i = 0; i < count; ++i) {
      const double value = normal(random) + (trial % 4 == 1 ? 1000.0 : 0.0);
      values.push_back(trial % 3 == 0 ? std::round(value * 2.0) : value);  // with ties
      weights.push_back(trial % 2 == 0 ? 1.0 : uniform(random));
    }
    const WeightedPoints all = gather_points(values.data(), weights.data(), count, 1);
    const auto different = static_cast<std::int32_t>(all.values.size());
    for (std::int32_t levels = 1; levels <= std::min(different, 6); ++levels) {
      const Clusters expected = reference::find_clusters(all, levels);
      const Clusters actual = find_clusters(all, levels);
      ASSERT_NEAR(actual.error, expected.error, 1e-9 * (1.0 + expected.error)) << "trial " << trial;
      ASSERT_EQ(actual.firsts.size(), static_cast<std::size_t>(levels));
      for (std::size_t k = 1; k < actual.firsts.size(); ++k) ASSERT_LT(actual.firsts[k - 1], actual.firsts[k]);
    }
  }
}

TEST(FindClusters, AsManyClustersAsPointsLeaveNothing) {
  const double values[] = {3.0, 1.0, 2.0};
  float codebook[3];
  EXPECT_EQ(calibrate_codebook(values, nullptr, 3, 3, codebook), 0.0);
  EXPECT_EQ(codebook[0], 1.0f);
  EXPECT_EQ(codebook[2], 3.0f);
}

TEST(CalibrateCodebook, TakesAHistogramInTime) {
  // The issue asks for 0.2 s for 4096 bins and 32 centroids; the bound here leaves room for a busy machine.
  std::vector<double> values(4096);
  std::vector<double> weights(4096);
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = (static_cast<double>(i) + 0.5) / 2048.0 - 1.0;
    weights[i] = std::exp(-8.0 * values[i] * values[i]);
  }
  float codebook[32];
  const auto start = std::chrono::steady_clock::now();
  calibrate_codebook(values.data(), weights.data(), 4096, 32, codebook);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  EXPECT_LT(seconds.count(), 2.0);
  for (int k = 0; k < 32; ++k) EXPECT_NEAR(codebook[k], -codebook[31 - k], 1e-3f);
}

}  // namespace
}  // namespace kvpack::test
