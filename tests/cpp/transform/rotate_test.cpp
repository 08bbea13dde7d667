// Rotation: every implementation against the reference, its way back, and the same random matrix everywhere.
#include <gtest/gtest.h>

#include <cmath>

#include "kvpack/kvpack.h"
#include "support/compare.h"
#include "support/implementations.h"
#include "support/matrix.h"

namespace kvpack::test {
namespace {

class Rotate : public ImplementationTest {};
INSTANTIATE_TEST_SUITE_P(Cpu, Rotate, ::testing::ValuesIn(cpu_implementations("rotate")), test_name);

std::vector<float> random_rotation(std::int64_t head_dim, std::uint64_t seed) {
  std::vector<float> matrix(static_cast<std::size_t>(head_dim * head_dim));
  make_random_rotation(seed, make_view(matrix.data(), DType::kFloat32, {head_dim, head_dim}));
  return matrix;
}

TEST_P(Rotate, EqualsTheReferenceBitForBitInEveryShape) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64}) {
    for (const std::int64_t head_dim : {1, 7, 16, 33, 64, 80, 128}) {
      for (const Layout layout : {Layout{}, Layout{1, 5, 1}, Layout{2, 3, 1}}) {
        for (const Direction direction : {Direction::kForward, Direction::kInverse}) {
          std::vector<float> matrix = random_rotation(head_dim, 4);
          const TensorView rotation = make_view(matrix.data(), DType::kFloat32, {head_dim, head_dim});
          Matrix x(19, 3 * head_dim, dtype, layout);
          x.fill(Fill::kNormal, kSeed);
          Matrix expected(19, 3 * head_dim, dtype);
          Matrix actual(19, 3 * head_dim, dtype, layout);
          force_implementation("reference");
          rotate(x.view(), rotation, expected.view(), direction);
          force_implementation(GetParam());
          rotate(x.view(), rotation, actual.view(), direction);
          EXPECT_EQ(last_implementation(), GetParam());
          ASSERT_TRUE(same_bits(expected, actual)) << "head_dim " << head_dim << ", " << kvpack::name_of(dtype);
          EXPECT_TRUE(actual.guards_are_intact());
          rotate(x.view(), rotation, x.view(), direction);
          ASSERT_TRUE(same_bits(expected, x)) << "in place, head_dim " << head_dim;
        }
      }
    }
  }
}

TEST(RandomRotation, IsTheSameOnEveryMachine) {
  // Golden: integers, + - * / and sqrt alone decide these bits.
  const std::vector<float> expected{0x1.11bbe2p-5f, 0x1.fd3756p-1f, 0x1.93ff70p-4f,  -0x1.fcd0acp-1f, 0x1.71d7e6p-6f,
                                    0x1.beaf26p-4f, 0x1.b322c6p-4f, -0x1.a0691cp-4f, 0x1.fa6f4cp-1f};
  EXPECT_EQ(random_rotation(3, 0), expected);
}

TEST(RandomRotation, IsOrthogonal) {
  for (const std::int64_t head_dim : {1, 2, 80, 256}) {
    const std::vector<float> matrix = random_rotation(head_dim, 77);
    for (std::int64_t a = 0; a < head_dim; ++a) {
      for (std::int64_t b = 0; b <= a; ++b) {
        double product = 0.0;
        for (std::int64_t i = 0; i < head_dim; ++i) {
          product += static_cast<double>(matrix[static_cast<std::size_t>(a * head_dim + i)]) *
                     static_cast<double>(matrix[static_cast<std::size_t>(b * head_dim + i)]);
        }
        ASSERT_NEAR(product, a == b ? 1.0 : 0.0, 1e-6) << a << ", " << b;
      }
    }
  }
}

}  // namespace
}  // namespace kvpack::test
