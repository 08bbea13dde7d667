// The general quantiser: every implementation against the reference over methods, and the rules of its parts.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "kvpack/kvpack.h"
#include "quantize/prepare.h"
#include "quantize/uniform_cases.h"
#include "support/compare.h"
#include "support/implementations.h"

namespace kvpack::test {
namespace {

class SimulateQuantized : public ImplementationTest {};
INSTANTIATE_TEST_SUITE_P(Cpu, SimulateQuantized, ::testing::ValuesIn(cpu_implementations("simulate_quantized")),
                         test_name);

/// Centroids 2^bits of them, unevenly spaced.
std::vector<float> make_codebook(std::int32_t bits) {
  std::vector<float> codebook(std::size_t{1} << bits);
  const auto last = static_cast<float>(codebook.size() - 1);
  for (std::size_t k = 0; k < codebook.size(); ++k) {
    const float place = 2.0f * static_cast<float>(k) / last - 1.0f;
    codebook[k] = 0.3f * place + 0.7f * place * place * place;
  }
  return codebook;
}

enum class Method { kNuq, kQNorm, kRms, kCalibratedUniform, kCalibratedNuq };

/// A case of uniform_cases.h with a codebook, another scale or calibrated thresholds put on top.
struct QuantizedCase {
  UniformCase base;
  Method method;
  std::vector<float> codebook;
  std::vector<float> lower;
  std::vector<float> upper;

  QuantizedCase(const UniformCase& c, Method chosen)
      : base(c), method(chosen), codebook(make_codebook(c.options.bits)) {
    const bool by_channel = c.options.axis == Axis::kPerChannel;
    for (std::int64_t i = 0; i < (by_channel ? c.channels : c.tokens); ++i) {
      lower.push_back(i % 11 == 10 ? 0.5f : -0.75f - 0.125f * static_cast<float>(i % 7));
      upper.push_back(i % 11 == 10 ? 0.5f : 0.5f + 0.25f * static_cast<float>(i % 5));
    }
  }

  [[nodiscard]] QuantizeOptions options() const {
    QuantizeOptions options;
    static_cast<UniformOptions&>(options) = base.options;
    if (method != Method::kCalibratedUniform) {
      options.codebook = codebook.data();
      options.num_centroids = static_cast<std::int32_t>(codebook.size());
    }
    if (method == Method::kQNorm) {
      options.norm_scale = 1.25f;
      options.norm_offset = -0.0625f;
    }
    if (method == Method::kRms) {
      options.scale = ScaleRule::kRms;
      options.outlier_fraction = 0.0;
    }
    if (method == Method::kCalibratedUniform || method == Method::kCalibratedNuq) {
      options.causality = Causality::kCalibrated;
      options.lower = lower.data();
      options.upper = upper.data();
      options.num_thresholds = static_cast<std::int64_t>(lower.size());
    }
    return options;
  }
};

constexpr Method kMethods[] = {Method::kNuq, Method::kQNorm, Method::kRms, Method::kCalibratedUniform,
                               Method::kCalibratedNuq};

void expect_equal_to_reference(const UniformCase& c, Method method, const std::string& implementation) {
  SCOPED_TRACE(describe(c) + ", method " + std::to_string(static_cast<int>(method)));
  const QuantizedCase quantized(c, method);
  const QuantizeOptions options = quantized.options();
  expect_equal_to_reference(c, implementation, [&](const TensorView& x, const TensorView& out) {
    return simulate_quantized(x, out, options);
  });
}

TEST_P(SimulateQuantized, EqualsTheReferenceBitForBitInEveryShapeAndMethod) {
  for (const UniformCase& c : uniform_cases()) {
    for (const Axis axis : {Axis::kPerChannel, Axis::kPerToken}) {
      for (const Method method : kMethods) {
        UniformCase one = c;
        one.options.axis = axis;
        expect_equal_to_reference(one, method, GetParam());
        if (HasFailure()) return;
      }
    }
  }
}

TEST_P(SimulateQuantized, EqualsTheReferenceOnEveryKindOfDataAndNumberOfBits) {
  for (const Fill fill : {Fill::kConstant, Fill::kTies, Fill::kMostlyTies, Fill::kPositive, Fill::kDrift,
                          Fill::kDenormal, Fill::kZeros, Fill::kHuge}) {
    for (const std::int32_t bits : {2, 3, 4, 5, 8}) {
      for (const Axis axis : {Axis::kPerChannel, Axis::kPerToken}) {
        for (const Method method : kMethods) {
          UniformCase c{"data", 45, 41, fill};
          c.options.axis = axis;
          c.options.bits = bits;
          c.options.outlier_fraction = bits % 2 == 0 ? 0.0 : 0.02;
          c.options.compat = bits == 3 || bits == 8;
          c.options.offset = bits == 8 ? OffsetRule::kClamp : OffsetRule::kFloating;
          expect_equal_to_reference(c, method, GetParam());
          if (HasFailure()) return;
        }
      }
    }
  }
}

TEST_P(SimulateQuantized, LongVectorsEqualTheReference) {
  for (const Method method : kMethods) {
    UniformCase c{"long", 3000, 50};
    c.options.bits = 5;
    expect_equal_to_reference(c, method, GetParam());
    if (HasFailure()) return;
  }
}

TEST_P(SimulateQuantized, WithoutACodebookItIsSimulateUniform) {
  for (const UniformCase& c : uniform_cases()) {
    Matrix x(c.tokens, c.channels, c.dtype, c.layout);
    x.fill(c.fill, kSeed);
    Matrix expected(c.tokens, c.channels, c.dtype);
    Matrix actual(c.tokens, c.channels, c.dtype);
    QuantizeOptions options;
    static_cast<UniformOptions&>(options) = c.options;
    simulate_uniform(x.view(), expected.view(), c.options);
    simulate_quantized(x.view(), actual.view(), options);
    ASSERT_TRUE(same_bits(expected, actual)) << describe(c);
  }
}

TEST(CodebookRule, FollowsAWorkedExample) {
  // Range [-2, 6]: centre 2, half range 4. y = -1, -0.5, 0.25, 1; -0.5 lies midway between -1 and 0 and goes down.
  const float codebook[] = {-1.0f, 0.0f, 0.5f, 1.0f};
  float values[] = {-2.0f, 0.0f, 3.0f, 6.0f};
  float out[4];
  QuantizeOptions options;
  options.bits = 2;
  options.axis = Axis::kPerToken;
  options.codebook = codebook;
  options.num_centroids = 4;
  const TensorView x = make_view(values, DType::kFloat32, {1, 4});
  const TensorView y = make_view(out, DType::kFloat32, {1, 4});
  simulate_quantized(x, y, options);
  EXPECT_EQ(out[0], -2.0f);
  EXPECT_EQ(out[1], -2.0f);
  EXPECT_EQ(out[2], 2.0f);  // 0.25 lies midway between 0 and 0.5
  EXPECT_EQ(out[3], 6.0f);
  options.norm_scale = 0.5f;
  options.norm_offset = 0.25f;
  simulate_quantized(x, y, options);
  EXPECT_EQ(out[0], 1.0f) << "(-1 * 0.5 + 0.25) * 4 + 2";
}

TEST(CodebookRule, BoundariesDecideAsTheSmallestRoundedDistanceDoes) {
  std::mt19937 random(kSeed);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  for (int trial = 0; trial < 2000; ++trial) {
    const float a = uniform(random);
    const float b = uniform(random) * (trial % 3 == 0 ? 1e-6f : 1.0f) + (trial % 5 == 0 ? a : 0.0f);
    const float lower = std::min(a, b);
    const float upper = std::max(a, b);
    if (lower == upper) continue;
    const float boundary = boundary_between(lower, upper);
    ASSERT_GE(boundary, lower);
    ASSERT_LT(boundary, upper);
    float y = boundary;
    for (int i = 0; i < 4; ++i) y = std::nextafter(y, -2.0f);
    for (int i = 0; i < 8; ++i, y = std::nextafter(y, 2.0f)) {
      if (y < lower || y > upper) continue;
      const bool takes_upper = std::fabs(y - upper) < std::fabs(y - lower);
      ASSERT_EQ(y > boundary, takes_upper) << lower << ", " << upper << ", " << y;
    }
  }
}

TEST(CalibratedRule, ThresholdsAreStrictAndWithoutOutliersClip) {
  const float lower[] = {-1.0f};
  const float upper[] = {2.0f};
  float values[] = {-1.0f, 2.0f, std::nextafter(2.0f, 3.0f), -5.0f, 0.6f};
  float out[5];
  QuantizeOptions options;
  options.bits = 2;
  options.causality = Causality::kCalibrated;
  options.lower = lower;
  options.upper = upper;
  options.num_thresholds = 1;
  const TensorView x = make_view(values, DType::kFloat32, {5, 1});
  const TensorView y = make_view(out, DType::kFloat32, {5, 1});
  EXPECT_EQ(simulate_quantized(x, y, options).outliers, 0);
  EXPECT_EQ(out[2], 2.0f);
  EXPECT_EQ(out[3], -1.0f);
  EXPECT_EQ(out[4], 1.0f);
  options.outlier_fraction = 0.01;
  EXPECT_EQ(simulate_quantized(x, y, options).outliers, 2);
  EXPECT_EQ(out[0], -1.0f);
  EXPECT_EQ(out[2], values[2]);
  EXPECT_EQ(out[3], -5.0f);
}

TEST(CalibratedRule, CompatRoundsEveryStepToFloat16) {
  // Range 0.3 - -0.1 = 0.39990234 in float16; 1/range = 2.5; qs = 37.5; off = -0.1*37.5 = -3.7480469
  const float lower[] = {-0.0999755859375f};
  const float upper[] = {0.300048828125f};
  float value = 0.2f;
  float out = 0.0f;
  QuantizeOptions options;
  options.causality = Causality::kCalibrated;
  options.compat = true;
  options.lower = lower;
  options.upper = upper;
  options.num_thresholds = 1;
  const std::vector<VectorGrid> grids = make_static_grids(options);
  EXPECT_EQ(grids[0].qs, 37.5f);
  EXPECT_EQ(grids[0].offset, -3.75f);
  simulate_quantized(make_view(&value, DType::kFloat32, {1, 1}), make_view(&out, DType::kFloat32, {1, 1}), options);
  EXPECT_EQ(out, (11.0f - 3.75f) / 37.5f);
}

TEST(CalibratedRule, CompatReturnsTheCentreOfACodebookWithoutARangeAndZeroOfAGridWithoutOne) {
  const std::vector<float> codebook = make_codebook(4);
  const float threshold[] = {0.5f};
  float value = 0.75f;
  float out = -1.0f;
  const TensorView x = make_view(&value, DType::kFloat32, {1, 1});
  const TensorView y = make_view(&out, DType::kFloat32, {1, 1});
  QuantizeOptions options;
  options.causality = Causality::kCalibrated;
  options.lower = threshold;
  options.upper = threshold;
  options.num_thresholds = 1;
  simulate_quantized(x, y, options);
  EXPECT_EQ(out, 0.75f);
  options.compat = true;
  simulate_quantized(x, y, options);
  EXPECT_EQ(out, 0.0f);
  options.codebook = codebook.data();
  options.num_centroids = 16;
  simulate_quantized(x, y, options);
  EXPECT_EQ(out, 0.5f);
}

}  // namespace
}  // namespace kvpack::test
