// Simulated uniform quantisation: the rule's examples and edge cases, on every implementation.
#include <gtest/gtest.h>

#include "kvpack/kvpack.h"
#include "quantize/uniform_cases.h"
#include "support/compare.h"
#include "support/implementations.h"

namespace kvpack::test {
namespace {

class SimulateUniform : public ImplementationTest {};
INSTANTIATE_TEST_SUITE_P(Cpu, SimulateUniform, ::testing::ValuesIn(cpu_implementations("simulate_uniform")), test_name);

/// Runs one case and compares it with the reference.
void expect_equal_to_reference(const UniformCase& c, const std::string& implementation) {
  SCOPED_TRACE(describe(c));
  expect_equal_to_reference(c, implementation, [&](const TensorView& x, const TensorView& out) {
    return simulate_uniform(x, out, c.options);
  });
}

TEST_P(SimulateUniform, EqualsTheReferenceBitForBitInEveryShapeAndOption) {
  for (const UniformCase& c : uniform_cases()) {
    for (const Axis axis : {Axis::kPerChannel, Axis::kPerToken}) {
      UniformCase one = c;
      one.options.axis = axis;
      expect_equal_to_reference(one, GetParam());
      if (HasFailure()) return;
    }
  }
}

TEST_P(SimulateUniform, EqualsTheReferenceOnEveryKindOfData) {
  for (const Fill fill : {Fill::kConstant, Fill::kTies, Fill::kMostlyTies, Fill::kPositive, Fill::kNegative,
                          Fill::kDrift, Fill::kDenormal, Fill::kZeros, Fill::kHuge}) {
    for (const double outliers : {0.0, 0.01, 0.1}) {
      for (const OffsetRule offset : {OffsetRule::kFloating, OffsetRule::kClamp}) {
        for (const bool compat : {false, true}) {
          for (const Axis axis : {Axis::kPerChannel, Axis::kPerToken}) {
            UniformCase c{"data", 83, 72, fill};
            c.options.axis = axis;
            c.options.bits = 3;
            c.options.offset = offset;
            c.options.outlier_fraction = outliers;
            c.options.compat = compat;
            expect_equal_to_reference(c, GetParam());
            if (HasFailure()) return;
          }
        }
      }
    }
  }
}

TEST_P(SimulateUniform, SixteenBitsCopyEveryBitEvenNaN) {
  Matrix x(3, 33, DType::kFloat16);
  x.fill(Fill::kNormal, kSeed);
  x.set(1, 7, std::nan(""));
  Matrix out(3, 33, DType::kFloat16);
  UniformOptions options;
  options.bits = 16;
  simulate_uniform(x.view(), out.view(), options);
  EXPECT_TRUE(same_bits(x, out));
}

TEST_P(SimulateUniform, AConstantVectorComesBackAndCompatReturnsZero) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64}) {
    for (const Axis axis : {Axis::kPerChannel, Axis::kPerToken}) {
      Matrix x(20, 40, dtype);
      x.fill(Fill::kConstant, kSeed);
      if (dtype == DType::kFloat64) x.set(0, 0, -1.25);
      Matrix out(20, 40, dtype);
      UniformOptions options;
      options.axis = axis;
      simulate_uniform(x.view(), out.view(), options);
      EXPECT_TRUE(same_bits(x, out));
      options.compat = true;
      simulate_uniform(x.view(), out.view(), options);
      EXPECT_EQ(out.get(19, 39), 0.0);
      EXPECT_FALSE(std::signbit(out.get(19, 39)));
    }
  }
}

TEST_P(SimulateUniform, ProtectedTokensComeBackAndLeaveNoTraceInTheRest) {
  Matrix x(50, 70, DType::kFloat32);
  x.fill(Fill::kNormal, kSeed);
  for (std::int64_t c = 0; c < 70; ++c) x.set(0, c, 1e4 + static_cast<double>(c));  // a sink token is far away
  for (const double outliers : {0.0, 0.05}) {
    for (const Axis axis : {Axis::kPerChannel, Axis::kPerToken}) {
      UniformOptions options;
      options.axis = axis;
      options.outlier_fraction = outliers;
      options.protected_tokens = 2;
      Matrix out(50, 70, DType::kFloat32);
      simulate_uniform(x.view(), out.view(), options);
      TensorView rest = x.view();
      rest.shape[0] = 48;
      rest.data = static_cast<float*>(rest.data) + 2 * rest.strides[0];
      Matrix expected(48, 70, DType::kFloat32);
      options.protected_tokens = 0;
      simulate_uniform(rest, expected.view(), options);
      for (std::int64_t c = 0; c < 70; ++c) {
        EXPECT_EQ(out.bits(0, c), x.bits(0, c));
        EXPECT_EQ(out.bits(1, c), x.bits(1, c));
        for (std::int64_t t = 2; t < 50; ++t) ASSERT_EQ(out.bits(t, c), expected.bits(t - 2, c)) << t << ", " << c;
      }
    }
  }
}

TEST_P(SimulateUniform, CausalGroupsDoNotSeeTheFutureAndKeepTheIncompleteOneExact) {
  Matrix x(150, 33, DType::kFloat32);
  x.fill(Fill::kNormal, kSeed);
  UniformOptions options;
  options.bits = 2;
  options.causality = Causality::kCausal;
  Matrix out(150, 33, DType::kFloat32);
  const UniformCounts counts = simulate_uniform(x.view(), out.view(), options);
  EXPECT_EQ(counts.vectors, 2 * 33);
  EXPECT_EQ(counts.quantized, 128 * 33);
  Matrix changed(150, 33, DType::kFloat32);
  changed.copy_from(x);
  for (std::int64_t c = 0; c < 33; ++c) changed.set(64, c, 100.0);
  Matrix out_changed(150, 33, DType::kFloat32);
  simulate_uniform(changed.view(), out_changed.view(), options);
  for (std::int64_t c = 0; c < 33; ++c) {
    for (std::int64_t t = 0; t < 64; ++t) ASSERT_EQ(out.bits(t, c), out_changed.bits(t, c)) << t << ", " << c;
    EXPECT_NE(out.bits(100, c), out_changed.bits(100, c));
    for (std::int64_t t = 128; t < 150; ++t) ASSERT_EQ(out.bits(t, c), x.bits(t, c)) << t << ", " << c;
  }
}

TEST_P(SimulateUniform, AValueThatIsNotFiniteIsNamedBeforeXChanges) {
  for (const Axis axis : {Axis::kPerChannel, Axis::kPerToken}) {
    for (const double bad : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
      for (const std::int64_t channel : {3, 69}) {  // within a vector, and behind the last whole one
        Matrix x(40, 70, DType::kFloat32);
        x.fill(Fill::kNormal, kSeed);
        x.set(17, channel, bad);
        Matrix before(40, 70, DType::kFloat32);
        before.copy_from(x);
        Matrix out(40, 70, DType::kFloat32);
        UniformOptions options;
        options.axis = axis;
        options.outlier_fraction = channel == 3 ? 0.0 : 0.02;
        for (const TensorView& target : {out.view(), x.view()}) {
          try {
            simulate_uniform(x.view(), target, options);
            ADD_FAILURE() << bad << " was accepted";
          } catch (const InvalidArgument& error) {
            const std::string place = "token 17, channel " + std::to_string(channel);
            EXPECT_NE(std::string(error.what()).find(place), std::string::npos) << error.what();
          }
        }
        EXPECT_TRUE(same_bits(before, x));
      }
    }
  }
}

TEST_P(SimulateUniform, ABatchOfTwoEqualsTwoSingles) {
  std::vector<float> values(2 * 30 * 20);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = std::sin(static_cast<float>(i * i % 1009));
  std::vector<float> together(values.size());
  std::vector<float> apart(values.size());
  UniformOptions options;
  options.protected_tokens = 1;
  options.outlier_fraction = 0.05;
  simulate_uniform(make_view(values.data(), DType::kFloat32, {2, 30, 20}),
                   make_view(together.data(), DType::kFloat32, {2, 30, 20}), options);
  for (int b = 0; b < 2; ++b) {
    simulate_uniform(make_view(values.data() + b * 600, DType::kFloat32, {30, 20}),
                     make_view(apart.data() + b * 600, DType::kFloat32, {30, 20}), options);
  }
  EXPECT_EQ(together, apart);
}

TEST(UniformRule, FollowsAWorkedExample) {
  // min -1, max 2, 2 bits: qs = 3/3 = 1, off = -1, codes RNE(x + 1): 0, 0 (0.5 to even), 2, 3
  float values[] = {-1.0f, -0.5f, 0.75f, 2.0f};
  float out[4];
  UniformOptions options;
  options.bits = 2;
  options.axis = Axis::kPerToken;
  const UniformCounts counts =
      simulate_uniform(make_view(values, DType::kFloat32, {1, 4}), make_view(out, DType::kFloat32, {1, 4}), options);
  EXPECT_EQ(out[0], -1.0f);
  EXPECT_EQ(out[1], -1.0f);
  EXPECT_EQ(out[2], 1.0f);
  EXPECT_EQ(out[3], 2.0f);
  EXPECT_EQ(counts.quantized, 4);
  EXPECT_EQ(counts.vectors, 1);
}

TEST(UniformRule, ClampedOffsetsAreWholeAndOneSignedVectorsStartAtZero) {
  float values[] = {5.0f, 5.5f, 6.0f, 5.25f};
  float out[4];
  UniformOptions options;
  options.axis = Axis::kPerToken;
  options.offset = OffsetRule::kClamp;
  simulate_uniform(make_view(values, DType::kFloat32, {1, 4}), make_view(out, DType::kFloat32, {1, 4}), options);
  for (const float value : out) EXPECT_EQ(value, 1.0f) << "off = clamp(75, -15, 0) = 0, every code is 15, 15/15 = 1";
}

TEST(UniformRule, OutliersAreInclusiveAndExact) {
  // 201 values 0..200: t = 0.995 falls on place 199 exactly, so 199 and 200 are outliers, and 0 and 1 below.
  std::vector<float> values(201);
  for (int i = 0; i < 201; ++i) values[static_cast<std::size_t>(i * 37 % 201)] = static_cast<float>(i);
  std::vector<float> out(201);
  UniformOptions options;
  options.bits = 2;
  options.axis = Axis::kPerToken;
  options.outlier_fraction = 0.01;
  const UniformCounts counts = simulate_uniform(make_view(values.data(), DType::kFloat32, {1, 201}),
                                                make_view(out.data(), DType::kFloat32, {1, 201}), options);
  EXPECT_EQ(counts.outliers, 4);
  for (std::size_t i = 0; i < 201; ++i) {
    const bool is_outlier = values[i] <= 1.0f || values[i] >= 199.0f;
    const bool is_end_of_grid = values[i] == 2.0f || values[i] == 198.0f;  // the dense range
    if (is_end_of_grid) {
      EXPECT_NEAR(out[i], values[i], 1e-3f);
    } else {
      EXPECT_EQ(out[i] == values[i], is_outlier) << values[i];
    }
  }
}

TEST(UniformErrors, ShowTheValueAndTheSet) {
  float data[4] = {1, 2, 3, 4};
  const TensorView x = make_view(data, DType::kFloat32, {2, 2});
  const auto message = [&](UniformOptions options) {
    try {
      simulate_uniform(x, x, options);
    } catch (const InvalidArgument& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  UniformOptions options;
  options.bits = 6;
  EXPECT_EQ(message(options), "bits is 6; it is one of 2, 3, 4, 5, 8 and 16");
  options = {};
  options.outlier_fraction = 1.0;
  EXPECT_EQ(message(options), "outlier_fraction is 1; it must be at least 0 and below 1");
  options = {};
  options.group = -2;
  EXPECT_NE(message(options).find("-2"), std::string::npos);
  options = {};
  options.protected_tokens = -4;
  EXPECT_NE(message(options).find("-4"), std::string::npos);
}

}  // namespace
}  // namespace kvpack::test
