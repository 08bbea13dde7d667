// Histograms of normalised values: every implementation against the reference, bit for bit, whatever the type, layout,
// weights and number of threads.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "kvpack/kvpack.h"
#include "support/compare.h"
#include "support/implementations.h"
#include "support/matrix.h"

namespace kvpack::test {
namespace {

/// What comes out of one call, bins filled with something before.
struct Outcome {
  std::vector<double> weights = std::vector<double>(kHistogramBins, 0.25);
  std::vector<double> moments = std::vector<double>(kHistogramBins, -0.5);
  std::int64_t counted = 0;
  std::int64_t outside = 0;

  bool operator==(const Outcome&) const = default;
};

struct Samples {
  TensorView x;
  TensorView element_weights;
  std::vector<float> lower;
  std::vector<float> upper;
  std::vector<float> channel_weights;
  std::int64_t protected_tokens = 0;
};

Outcome accumulate(const Samples& samples) {
  Outcome outcome;
  HistogramOptions options;
  options.lower = samples.lower.data();
  options.upper = samples.upper.data();
  options.channel_weights = samples.channel_weights.empty() ? nullptr : samples.channel_weights.data();
  options.protected_tokens = samples.protected_tokens;
  const HistogramCounts counts = accumulate_histogram(
      samples.x, samples.element_weights, options, make_view(outcome.weights.data(), DType::kFloat64, {kHistogramBins}),
      make_view(outcome.moments.data(), DType::kFloat64, {kHistogramBins}));
  outcome.counted = counts.counted;
  outcome.outside = counts.outside;
  return outcome;
}

/// Ranges that leave some values outside; channel 1 is constant, and so are those that are narrower than float32.
Samples make_samples(const TensorView& x) {
  Samples samples;
  samples.x = x;
  for (std::int64_t c = 0; c < x.shape[1]; ++c) {
    samples.lower.push_back(-1.0f - 0.01f * static_cast<float>(c));
    samples.upper.push_back(c == 1 ? samples.lower.back() : 1.5f);
    samples.channel_weights.push_back(0.5f + static_cast<float>(c % 5));
  }
  return samples;
}

class AccumulateHistogram : public ImplementationTest {};

TEST_P(AccumulateHistogram, EqualsTheReferenceToTheBit) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64}) {
    for (const auto& [tokens, channels] : {std::tuple{0, 5},
                                           {1, 1},
                                           {3, 2},
                                           {7, 7},
                                           {33, 8},
                                           {9, 15},
                                           {70, 16},
                                           {5, 17},
                                           {2047, 9},
                                           {2048, 33},
                                           {2049, 3},
                                           {4100, 40}}) {
      for (const Layout layout : {Layout{}, Layout{1, 3, 1}, Layout{2, 5, 3}}) {
        Matrix x(tokens, channels, dtype, layout);
        x.fill(Fill::kNormal, kSeed);
        Matrix element_weights(tokens, channels, DType::kFloat32, layout);
        element_weights.fill(Fill::kPositive, kSeed + 1);
        Samples samples = make_samples(x.view());
        for (const bool weighted : {false, true}) {
          samples.element_weights = weighted ? element_weights.view() : TensorView{};
          samples.protected_tokens = weighted ? 1 : 0;
          if (weighted) samples.channel_weights.clear();
          const Outcome actual = accumulate(samples);
          EXPECT_EQ(last_implementation(), GetParam());
          force_implementation("reference");
          const Outcome expected = accumulate(samples);
          force_implementation(GetParam());
          EXPECT_TRUE(actual == expected)
              << static_cast<int>(dtype) << " " << tokens << " x " << channels << " channel stride "
              << layout.channel_stride << (weighted ? " weighted" : "");
        }
      }
    }
  }
}

TEST_P(AccumulateHistogram, CountsValuesAtBothEndsAndNothingBeyond) {
  constexpr float kAbove = 1.0f + std::numeric_limits<float>::epsilon();
  std::vector<float> values{-1.0f, 1.0f, 0.0f, -0.0f, kAbove, -kAbove, 3e38f, -3e38f, std::nextafter(0.0f, -1.0f)};
  Samples samples;
  const auto channels = static_cast<std::int64_t>(values.size());
  samples.x = make_view(values.data(), DType::kFloat32, {1, channels});
  samples.lower.assign(values.size(), -1.0f);
  samples.upper.assign(values.size(), 1.0f);
  const Outcome outcome = accumulate(samples);
  EXPECT_EQ(outcome.counted, 5);
  EXPECT_EQ(outcome.outside, 4);
  EXPECT_EQ(outcome.weights.front(), 1.25);
  EXPECT_EQ(outcome.weights.back(), 1.25);
  // -1e-45 + 1 is 1: it goes with the zeros, and its moment stays what it is.
  EXPECT_EQ(outcome.weights[kHistogramBins / 2], 3.25);
}

TEST_P(AccumulateHistogram, GivesTheSameBitsForEveryNumberOfThreads) {
  Matrix x(9000, 12, DType::kFloat16);
  x.fill(Fill::kNormal, kSeed);
  const Samples samples = make_samples(x.view());
  set_num_threads(1);
  const Outcome alone = accumulate(samples);
  EXPECT_EQ(alone.counted + alone.outside, 9000 * 11);
  for (const int threads : {2, 5}) {
    set_num_threads(threads);
    EXPECT_TRUE(accumulate(samples) == alone) << threads;
  }
  set_num_threads(0);
}

INSTANTIATE_TEST_SUITE_P(Cpu, AccumulateHistogram, ::testing::ValuesIn(cpu_implementations("accumulate_histogram")),
                         test_name);

}  // namespace
}  // namespace kvpack::test
