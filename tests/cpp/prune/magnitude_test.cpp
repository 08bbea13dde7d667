// Magnitude pruning: the rule's examples, and every implementation against the reference over the case table.
#include <gtest/gtest.h>

#include "kvpack/kvpack.h"
#include "support/compare.h"
#include "support/implementations.h"
#include "support/matrix.h"

namespace kvpack::test {
namespace {

struct PruneCase {
  const char* name;  // why it is here
  std::int64_t tokens;
  std::int64_t channels;
  std::int64_t head_dim;
  double sparsity;
  Fill fill = Fill::kNormal;
  DType dtype = DType::kFloat32;
  PruneRule rule = PruneRule::kExact;
  std::int64_t protected_tokens = 0;
  Layout layout = {};
};

const std::vector<PruneCase>& prune_cases() {
  static const std::vector<PruneCase> cases{
      {"no token", 0, 64, 64, 0.5},
      {"one element", 1, 1, 1, 0.5},
      {"one below a vector", 3, 15, 15, 0.5},
      {"one above a vector", 3, 17, 17, 0.7},
      {"head 64", 5, 192, 64, 0.7},
      {"head 80, not a power of two", 4, 240, 80, 0.5},
      {"head 96", 3, 96, 96, 0.3},
      {"head 128", 70, 256, 128, 0.7},
      {"head 256", 3, 512, 256, 0.9},
      {"head wider than the stack buffer", 2, 2100, 2100, 0.5},
      {"all kept", 5, 128, 64, 0.0},
      {"one kept", 5, 64, 64, 0.99},
      {"ties", 9, 128, 64, 0.5, Fill::kTies},
      {"nearly all tied", 9, 128, 64, 0.7, Fill::kMostlyTies},
      {"constant", 9, 128, 64, 0.7, Fill::kConstant},
      {"zeros of both signs", 9, 128, 64, 0.5, Fill::kZeros},
      {"denormals", 9, 128, 64, 0.5, Fill::kDenormal},
      {"ties, published rule", 9, 128, 64, 0.5, Fill::kTies, DType::kFloat32, PruneRule::kKthValue},
      {"constant, published rule", 9, 128, 64, 0.5, Fill::kConstant, DType::kFloat32, PruneRule::kKthValue},
      {"float16", 66, 192, 64, 0.7, Fill::kNormal, DType::kFloat16},
      {"float16 published rule", 66, 192, 64, 0.7, Fill::kNormal, DType::kFloat16, PruneRule::kKthValue},
      {"bfloat16", 66, 192, 64, 0.5, Fill::kNormal, DType::kBFloat16},
      {"float16, head 128", 67, 256, 128, 0.7, Fill::kNormal, DType::kFloat16},
      {"float16, head 256, ties", 3, 256, 256, 0.5, Fill::kTies, DType::kFloat16},
      {"float16, ties, published rule", 9, 128, 128, 0.5, Fill::kTies, DType::kFloat16, PruneRule::kKthValue},
      {"float16, zeros of both signs", 9, 128, 64, 0.5, Fill::kZeros, DType::kFloat16},
      {"float16, infinities", 9, 256, 128, 0.5, Fill::kHuge, DType::kFloat16},
      {"float16 with protected tokens", 70, 128, 64, 0.7, Fill::kNormal, DType::kFloat16, PruneRule::kExact, 3},
      {"float16, padded rows", 9, 128, 64, 0.7, Fill::kNormal, DType::kFloat16, PruneRule::kExact, 0, {1, 3, 1}},
      {"bfloat16, head 256, nearly all tied", 5, 512, 256, 0.7, Fill::kMostlyTies, DType::kBFloat16},
      {"bfloat16, denormals", 5, 128, 128, 0.7, Fill::kDenormal, DType::kBFloat16},
      {"float64", 5, 192, 64, 0.7, Fill::kNormal, DType::kFloat64},
      {"protected tokens", 9, 128, 64, 0.7, Fill::kNormal, DType::kFloat32, PruneRule::kExact, 3},
      {"more protected tokens than tokens", 2, 64, 64, 0.7, Fill::kNormal, DType::kFloat32, PruneRule::kExact, 5},
      {"padded rows, unaligned", 9, 128, 64, 0.7, Fill::kNormal, DType::kFloat32, PruneRule::kExact, 0, {1, 3, 1}},
      {"strided channels", 9, 128, 64, 0.7, Fill::kNormal, DType::kFloat16, PruneRule::kExact, 1, {3, 2, 1}},
  };
  return cases;
}

PruneOptions options_of(const PruneCase& c) { return {c.sparsity, c.rule, c.head_dim, c.protected_tokens, nullptr}; }

class PruneMagnitude : public ImplementationTest {};
INSTANTIATE_TEST_SUITE_P(Cpu, PruneMagnitude, ::testing::ValuesIn(cpu_implementations("prune_magnitude")), test_name);

TEST_P(PruneMagnitude, EqualsTheReferenceBitForBit) {
  for (const PruneCase& c : prune_cases()) {
    SCOPED_TRACE(c.name);
    Matrix x(c.tokens, c.channels, c.dtype, c.layout);
    x.fill(c.fill, kSeed);
    Matrix expected(c.tokens, c.channels, c.dtype);
    Matrix actual(c.tokens, c.channels, c.dtype, c.layout);
    force_implementation("reference");
    const PruneCounts expected_counts = prune_magnitude(x.view(), expected.view(), options_of(c));
    force_implementation(GetParam());
    const PruneCounts counts = prune_magnitude(x.view(), actual.view(), options_of(c));
    EXPECT_EQ(last_implementation(), GetParam());
    EXPECT_TRUE(same_bits(expected, actual));
    EXPECT_TRUE(actual.guards_are_intact());
    EXPECT_EQ(counts.kept, expected_counts.kept);
    EXPECT_EQ(counts.rows, expected_counts.rows);
    Matrix in_place(c.tokens, c.channels, c.dtype, c.layout);
    in_place.copy_from(x);
    prune_magnitude(in_place.view(), in_place.view(), options_of(c));
    EXPECT_TRUE(same_bits(expected, in_place)) << "in place";
  }
}

TEST_P(PruneMagnitude, RanksNaNAboveEverythingAndKeepsItsBits) {
  Matrix x(1, 8, DType::kFloat32);
  const float values[] = {1.0f, std::nanf("7"), 3.0f, -INFINITY, 2.0f, -std::nanf("3"), 0.5f, 4.0f};
  for (int c = 0; c < 8; ++c) std::memcpy(static_cast<float*>(x.view().data) + c, &values[c], sizeof(float));
  Matrix out(1, 8, DType::kFloat32);
  prune_magnitude(x.view(), out.view(), {0.625, PruneRule::kExact, 8, 0, nullptr});
  const bool kept[] = {false, true, false, true, false, true, false, false};
  for (int c = 0; c < 8; ++c) EXPECT_EQ(out.bits(0, c), kept[c] ? x.bits(0, c) : 0u) << "channel " << c;
}

TEST_P(PruneMagnitude, RanksEveryNaNOfSixteenBitsAlike) {
  constexpr std::int64_t kHeadDim = 64;
  Matrix x(1, kHeadDim, DType::kFloat16);
  for (std::int64_t c = 0; c < kHeadDim; ++c) x.set(0, c, 1.0);
  auto* words = static_cast<std::uint16_t*>(x.view().data);
  words[5] = 0xfc00;  // -infinity
  words[9] = 0x7c01;  // signalling, the smallest of the NaNs as bits
  words[20] = 0xffff;
  words[63] = 0x7e00;
  Matrix out(1, kHeadDim, DType::kFloat16);
  const auto kept_with = [&](std::int64_t count) {
    const double sparsity = 1.0 - static_cast<double>(count) / static_cast<double>(kHeadDim);
    prune_magnitude(x.view(), out.view(), {sparsity, PruneRule::kExact, 0, 0, nullptr});
    std::vector<std::int64_t> kept;
    for (std::int64_t c = 0; c < kHeadDim; ++c) {
      if (out.bits(0, c) != 0) kept.push_back(c);
      EXPECT_TRUE(out.bits(0, c) == 0 || out.bits(0, c) == x.bits(0, c)) << "channel " << c;
    }
    return kept;
  };
  EXPECT_EQ(kept_with(2), (std::vector<std::int64_t>{9, 20}));
  EXPECT_EQ(kept_with(4), (std::vector<std::int64_t>{5, 9, 20, 63}));
  EXPECT_EQ(kept_with(5), (std::vector<std::int64_t>{0, 5, 9, 20, 63}));
}

TEST_P(PruneMagnitude, ChannelScoresRankButDoNotChangeValues) {
  for (const std::int64_t head_dim : {4, 36}) {
    Matrix x(2, head_dim, DType::kFloat32);
    x.fill(Fill::kConstant, kSeed);
    std::vector<float> scores(static_cast<std::size_t>(head_dim), 1.0f);
    scores[1] = 3.0f;
    scores[3] = 2.0f;
    Matrix out(2, head_dim, DType::kFloat32);
    const double sparsity = 1.0 - 2.0 / static_cast<double>(head_dim);
    const PruneCounts counts =
        prune_magnitude(x.view(), out.view(), {sparsity, PruneRule::kExact, 0, 0, scores.data()});
    EXPECT_EQ(counts.kept, 4);
    for (std::int64_t c = 0; c < head_dim; ++c) EXPECT_EQ(out.get(1, c), c == 1 || c == 3 ? -1.25 : 0.0);
  }
}

TEST_P(PruneMagnitude, ABatchOfTwoEqualsTwoSingles) {
  Matrix x(6, 64, DType::kFloat16);
  x.fill(Fill::kNormal, kSeed);
  const auto batch_view = [](const Matrix& matrix) {
    TensorView view = matrix.view();
    view.rank = 3;
    view.shape = {2, 3, 64, 0};
    view.strides = {3 * matrix.view().strides[0], matrix.view().strides[0], 1, 0};
    return view;
  };
  Matrix together(6, 64, DType::kFloat16);
  prune_magnitude(batch_view(x), batch_view(together), {0.5, PruneRule::kExact, 32, 1, nullptr});
  Matrix apart(6, 64, DType::kFloat16);
  for (int b = 0; b < 2; ++b) {
    TensorView in = x.view();
    TensorView out = apart.view();
    in.shape[0] = out.shape[0] = 3;
    in.data = static_cast<Half*>(in.data) + b * 3 * in.strides[0];
    out.data = static_cast<Half*>(out.data) + b * 3 * out.strides[0];
    prune_magnitude(in, out, {0.5, PruneRule::kExact, 32, 1, nullptr});
  }
  EXPECT_TRUE(same_bits(apart, together));
}

TEST(PruneRules, KeepAsManyAsPublished) {
  Matrix x(4, 128, DType::kFloat32);
  x.fill(Fill::kNormal, kSeed);
  Matrix out(4, 128, DType::kFloat32);
  const auto kept = [&](double sparsity, PruneRule rule) {
    return prune_magnitude(x.view(), out.view(), {sparsity, rule, 128, 0, nullptr}).kept / 4;
  };
  EXPECT_EQ(kept(0.7, PruneRule::kKthValue), 40);
  EXPECT_EQ(kept(0.5, PruneRule::kKthValue), 65);
  EXPECT_EQ(kept(0.0, PruneRule::kKthValue), 128);
  EXPECT_EQ(kept(0.7, PruneRule::kExact), 39);
  EXPECT_EQ(kept(0.5, PruneRule::kExact), 64);
  EXPECT_EQ(kept_per_row(0.7, 10), 3) << "floor(0.7 * 10) is 7";
}

TEST(PruneRules, TiesGoToTheLowerChannelOrStayTogether) {
  Matrix x(1, 4, DType::kFloat32);
  const double values[] = {1.0, -2.0, 2.0, 2.0};
  for (int c = 0; c < 4; ++c) x.set(0, c, values[c]);
  Matrix out(1, 4, DType::kFloat32);
  prune_magnitude(x.view(), out.view(), {0.5, PruneRule::kExact, 4, 0, nullptr});
  EXPECT_EQ(out.get(0, 1), -2.0);
  EXPECT_EQ(out.get(0, 2), 2.0);
  EXPECT_EQ(out.get(0, 3), 0.0);
  prune_magnitude(x.view(), out.view(), {0.5, PruneRule::kKthValue, 4, 0, nullptr});
  EXPECT_EQ(out.get(0, 3), 2.0);
  EXPECT_EQ(out.get(0, 0), 0.0);
}

TEST(PruneErrors, ShowBothValuesAndChangeNothing) {
  Matrix x(2, 6, DType::kFloat32);
  x.fill(Fill::kNormal, kSeed);
  Matrix out(2, 6, DType::kFloat32);
  const auto message = [&](PruneOptions options) {
    try {
      prune_magnitude(x.view(), out.view(), options);
    } catch (const InvalidArgument& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  EXPECT_EQ(message({0.5, PruneRule::kExact, 4, 0, nullptr}), "head_dim 4 does not divide the 6 channels of x");
  EXPECT_EQ(message({1.0, PruneRule::kExact, 6, 0, nullptr}), "sparsity is 1; it must be at least 0 and below 1");
  EXPECT_NE(message({std::nan(""), PruneRule::kExact, 6, 0, nullptr}).find("nan"), std::string::npos);
  EXPECT_NE(message({0.5, PruneRule::kExact, 6, -1, nullptr}).find("-1"), std::string::npos);
  EXPECT_NE(message({0.5, static_cast<PruneRule>(9), 6, 0, nullptr}).find("9"), std::string::npos);
  for (std::int64_t c = 0; c < 6; ++c) EXPECT_TRUE(std::isnan(out.get(0, c))) << "out was written";
}

}  // namespace
}  // namespace kvpack::test
