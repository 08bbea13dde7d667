// The producers in front of the transform: against the transform of what they should produce, computed in float64 here.
#include <gtest/gtest.h>

#include <functional>

#include "flatquant/flatquant_cases.h"
#include "support/compare.h"
#include "support/implementations.h"
#include "support/tolerances.h"

namespace kvpack::test {
namespace {

std::vector<std::string> all_implementations() {
  std::vector<std::string> names = cpu_implementations("kron_quantize");
  names.insert(names.begin(), "reference");
  return names;
}

class Producers : public ImplementationTest {};
INSTANTIATE_TEST_SUITE_P(Cpu, Producers, ::testing::ValuesIn(all_implementations()), test_name);

constexpr std::int64_t kTokens = 6;

TensorView vector_of(const Matrix& row) {
  TensorView view = row.view();
  view.rank = 1;
  view.shape = {row.channels(), 0, 0, 0};
  view.strides = {1, 0, 0, 0};
  return view;
}

/// `fused` writes to its argument; `produced` says what the transform should have received.
void compare(const KronCase& shape, DType dtype, const std::function<double(std::int64_t, std::int64_t)>& produced,
             const CaseMatrices& matrices, const std::function<void(const KronOutput&)>& fused) {
  const std::int64_t n = shape.rows * shape.columns;
  Matrix x(kTokens, n, dtype);
  for (std::int64_t t = 0; t < kTokens; ++t) {
    for (std::int64_t i = 0; i < n; ++i) x.set(t, i, produced(t, i));
  }
  const OutputBuffers expected(DType::kInt8, kTokens, n, false);
  const OutputBuffers actual(DType::kInt8, kTokens, n, false);
  const KronOutput composed{expected.rows(), 0.9, 0.8};
  KronTransform transform = matrices.transform;
  transform.diagonal = {};
  kron_quantize(x.view(), transform, {&composed, 1}, {});
  fused({actual.rows(), 0.9, 0.8});
  EXPECT_EQ(last_implementation(), Producers::GetParam());
  EXPECT_TRUE(actual.guards_are_intact());
  std::int64_t off = 0;
  for (std::int64_t t = 0; t < kTokens; ++t) {
    const double scale = static_cast<double>(expected.scales.as<float>()[t]);
    ASSERT_NEAR(static_cast<double>(actual.scales.as<float>()[t]), scale, scale * kron_scale_tolerance(dtype));
    for (std::int64_t i = 0; i < n; ++i) {
      const int difference = std::abs(actual.code(t, i, n) - expected.code(t, i, n));
      ASSERT_LE(difference, 1) << t << ", " << i;
      off += difference;
    }
  }
  // One element of 16 bits that rounds the other way moves what it is mixed into by a fraction of a code.
  EXPECT_LE(static_cast<double>(off), std::max(1.0, kron_share_off(dtype) * static_cast<double>(kTokens * n)));
}

TEST_P(Producers, AreTheTransformOfWhatTheyProduce) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
    for (const KronCase& shape : {KronCase{"", 7, 9}, KronCase{"", 16, 20}, KronCase{"", 64, 64}}) {
      for (const bool with_diagonal : {false, true}) {
        const std::int64_t n = shape.rows * shape.columns;
        const CaseMatrices matrices(shape, dtype, with_diagonal, kSeed);
        Matrix x(kTokens, n, dtype, {1, 3, 1});
        Matrix up(kTokens, n, dtype, {1, 8, 0});
        Matrix weight(1, n, dtype);
        fill_activations(x, kSeed);
        up.fill(Fill::kNormal, kSeed + 1);
        weight.fill(Fill::kPositive, kSeed + 2);
        const auto factor = [&](std::int64_t i) { return with_diagonal ? matrices.diagonal.get(0, i) : 1.0; };
        constexpr double kEpsilon = 1e-3;
        std::vector<double> norms;
        for (std::int64_t t = 0; t < kTokens; ++t) {
          double squares = 0.0;
          for (std::int64_t i = 0; i < n; ++i) squares += x.get(t, i) * x.get(t, i);
          norms.push_back(1.0 / std::sqrt(squares / static_cast<double>(n) + kEpsilon));
        }
        compare(
            shape, dtype,
            [&](std::int64_t t, std::int64_t i) {
              return x.get(t, i) * norms[static_cast<std::size_t>(t)] * weight.get(0, i) * factor(i);
            },
            matrices,
            [&](const KronOutput& output) {
              rmsnorm_kron_quantize(x.view(), vector_of(weight), kEpsilon, matrices.transform, {&output, 1}, {});
            });
        compare(
            shape, dtype,
            [&](std::int64_t t, std::int64_t i) {
              return x.get(t, i) / (1.0 + std::exp(-x.get(t, i))) * up.get(t, i) * factor(i);
            },
            matrices,
            [&](const KronOutput& output) {
              silu_mul_kron_quantize(x.view(), up.view(), matrices.transform, {&output, 1}, {});
            });
      }
    }
  }
}

TEST_P(Producers, RowsThatAreNotFiniteStayVisible) {
  const KronCase shape{"", 8, 8};
  const CaseMatrices matrices(shape, DType::kFloat32, false, kSeed);
  Matrix x(4, 64, DType::kFloat32);
  Matrix up(4, 64, DType::kFloat32);
  x.fill(Fill::kNormal, kSeed);
  up.fill(Fill::kNormal, kSeed);
  x.set(0, 3, NAN);
  x.set(1, 3, -INFINITY);
  up.set(2, 63, INFINITY);
  const OutputBuffers out(DType::kInt8, 4, 64, false);
  const KronOutput output{out.rows(), 1.0, 1.0};
  silu_mul_kron_quantize(x.view(), up.view(), matrices.transform, {&output, 1}, {});
  for (std::int64_t t = 0; t < 4; ++t) EXPECT_EQ(std::isnan(out.scales.as<float>()[t]), t < 3) << t;
}

}  // namespace
}  // namespace kvpack::test
