// Comparing predictions: every implementation against the float64 reference, ties, infinities, bad targets.
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "kvpack/kvpack.h"
#include "support/implementations.h"
#include "support/matrix.h"
#include "support/tolerances.h"

namespace kvpack::test {
namespace {

struct Comparison {
  std::vector<double> nll;
  std::vector<double> kl;
  std::vector<double> top1;
};

Comparison compare(const Matrix& reference, const Matrix& logits, std::vector<std::int64_t> targets) {
  const auto n = static_cast<std::int64_t>(targets.size());
  const double unwritten = std::nan("");
  Comparison result{std::vector<double>(targets.size(), unwritten), std::vector<double>(targets.size(), unwritten),
                    std::vector<double>(targets.size(), unwritten)};
  compare_logits(reference.view(), logits.view(), make_view(targets.data(), DType::kInt64, {n}),
                 make_view(result.nll.data(), DType::kFloat64, {n}), make_view(result.kl.data(), DType::kFloat64, {n}),
                 make_view(result.top1.data(), DType::kFloat64, {n}));
  return result;
}

class CompareLogits : public ImplementationTest {};
INSTANTIATE_TEST_SUITE_P(Cpu, CompareLogits, ::testing::ValuesIn(cpu_implementations("compare_logits")), test_name);

TEST_P(CompareLogits, AgreesWithFloat64) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
    for (const std::int64_t vocabulary : {1, 2, 15, 16, 17, 1000, 5003}) {
      Matrix reference(19, vocabulary, dtype, {1, 3, 1});
      Matrix logits(19, vocabulary, dtype, {1, 5, 0});
      reference.fill(Fill::kNormal, 1);
      logits.fill(Fill::kNormal, 2);
      std::vector<std::int64_t> targets;
      for (std::int64_t i = 0; i < 19; ++i) targets.push_back(i * 7 % vocabulary);
      force_implementation("reference");
      const Comparison expected = compare(reference, logits, targets);
      force_implementation(GetParam());
      const Comparison actual = compare(reference, logits, targets);
      EXPECT_EQ(last_implementation(), GetParam());
      for (std::size_t i = 0; i < targets.size(); ++i) {
        const double scale = 1.0 + 0.1 * std::max(expected.nll[i], expected.kl[i]);
        EXPECT_NEAR(actual.nll[i], expected.nll[i], kLogitsTolerance * scale) << vocabulary << " at " << i;
        EXPECT_NEAR(actual.kl[i], expected.kl[i], kLogitsTolerance * scale) << vocabulary << " at " << i;
        EXPECT_EQ(actual.top1[i], expected.top1[i]) << vocabulary << " at " << i;
      }
    }
  }
}

TEST_P(CompareLogits, IdenticalRowsHaveNoDivergenceAtAll) {
  Matrix logits(4, 777, DType::kFloat32);
  logits.fill(Fill::kNormal, 3);
  const Comparison result = compare(logits, logits, {0, 1, 2, 776});
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(result.kl[i], 0.0);
    EXPECT_EQ(result.top1[i], 1.0);
  }
}

TEST_P(CompareLogits, TheFirstOfTiedLogitsIsTheTopToken) {
  Matrix reference(1, 40, DType::kFloat32);
  Matrix logits(1, 40, DType::kFloat32);
  for (std::int64_t v = 0; v < 40; ++v) {
    reference.set(0, v, v == 9 || v == 38 ? 3.0 : 0.0);
    logits.set(0, v, v == 38 || v == 39 ? 3.0 : 0.0);
  }
  EXPECT_EQ(compare(reference, logits, {0}).top1[0], 0.0);
  logits.set(0, 9, 3.0);
  EXPECT_EQ(compare(reference, logits, {0}).top1[0], 1.0);
}

TEST_P(CompareLogits, MaskedTokensAddNothing) {
  Matrix reference(1, 50, DType::kFloat32);
  reference.fill(Fill::kNormal, 4);
  for (const std::int64_t masked : {3, 17, 49}) reference.set(0, masked, -HUGE_VAL);
  const Comparison result = compare(reference, reference, {0});
  EXPECT_EQ(result.kl[0], 0.0);
  EXPECT_TRUE(std::isfinite(result.nll[0]));
}

TEST(CompareLogitsErrors, ATargetOutsideTheVocabularyIsNamed) {
  Matrix logits(2, 5, DType::kFloat32);
  logits.fill(Fill::kNormal, 5);
  for (const std::int64_t bad : {-1, 5}) {
    try {
      (void)compare(logits, logits, {0, bad});
      ADD_FAILURE() << bad << " was accepted";
    } catch (const InvalidArgument& error) {
      EXPECT_EQ(std::string(error.what()), "target 1 is " + std::to_string(bad) + "; the vocabulary has 5 tokens");
    }
  }
}

TEST(CompareLogitsErrors, ShapesAndTypesThatDifferAreShown) {
  Matrix a(2, 5, DType::kFloat32);
  Matrix b(2, 6, DType::kFloat32);
  Matrix c(2, 5, DType::kFloat16);
  EXPECT_THROW((void)compare(a, b, {0, 0}), InvalidArgument);
  EXPECT_THROW((void)compare(a, c, {0, 0}), InvalidArgument);
  EXPECT_THROW((void)compare(a, a, {0, 0, 0}), InvalidArgument);
}

}  // namespace
}  // namespace kvpack::test
