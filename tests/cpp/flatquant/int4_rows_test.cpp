// What reads codes: dequantising and the linear layer bit for bit, the way back, and the two sides of n.
#include <gtest/gtest.h>

#include "flatquant/flatquant_cases.h"
#include "support/compare.h"
#include "support/implementations.h"
#include "support/tolerances.h"

namespace kvpack::test {
namespace {

constexpr DType kForms[] = {DType::kInt8, DType::kInt32, DType::kUInt8};
constexpr DType kTypes[] = {DType::kFloat16, DType::kBFloat16, DType::kFloat32};

std::vector<std::string> with_reference(const char* operation) {
  std::vector<std::string> names = cpu_implementations(operation);
  names.insert(names.begin(), "reference");
  return names;
}

/// Random codes, scales and, for activations, zeros.
void fill_rows(OutputBuffers& rows, std::int64_t num_rows, std::int64_t n, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_int_distribution<int> code(-8, 7);
  std::uniform_real_distribution<float> scale(0.01f, 2.0f);
  const DType form = rows.codes.view().dtype;
  std::memset(rows.codes.view().data, 0,
              static_cast<std::size_t>(rows.codes.view().num_elements() * element_bytes(form)));
  for (std::int64_t t = 0; t < num_rows; ++t) {
    for (std::int64_t i = 0; i < n; ++i) {
      const int q = code(random);
      const auto nibble = static_cast<unsigned>(rows.encoding == CodeEncoding::kOffset ? q + 8 : q & 15);
      if (form == DType::kInt8) rows.codes.as<std::int8_t>()[t * n + i] = static_cast<std::int8_t>(q);
      if (form == DType::kInt32) rows.codes.as<std::uint32_t>()[t * (n / 8) + i / 8] |= nibble << (4 * (i % 8));
      if (form == DType::kUInt8) {
        auto& byte = rows.codes.as<std::uint8_t>()[t * (n / 2) + i / 2];
        byte = static_cast<std::uint8_t>(byte | nibble << (4 * (i % 2)));
      }
    }
    rows.scales.as<float>()[t] = scale(random);
    rows.zeros.as<float>()[t] = static_cast<float>(code(random));
  }
}

class DequantizeInt4 : public ImplementationTest {};
INSTANTIATE_TEST_SUITE_P(Cpu, DequantizeInt4, ::testing::ValuesIn(with_reference("dequantize_int4")), test_name);

TEST_P(DequantizeInt4, GivesCodeMinusZeroTimesScaleInEveryForm) {
  for (const DType form : kForms) {
    for (const CodeEncoding encoding : {CodeEncoding::kTwosComplement, CodeEncoding::kOffset}) {
      if (form == DType::kInt8 && encoding == CodeEncoding::kOffset) continue;
      for (const std::int64_t n : {8, 16, 40, 64, 200, 1032}) {
        for (const DType dtype : kTypes) {
          const bool has_zeros = n % 16 == 0;
          OutputBuffers rows(form, 3, n, has_zeros, encoding);
          fill_rows(rows, 3, n, kSeed);
          rows.scales.as<float>()[1] = NAN;
          Matrix out(3, n, dtype);
          TensorView view = out.view();
          dequantize_int4(rows.rows(), view);
          EXPECT_EQ(last_implementation(), GetParam());
          EXPECT_TRUE(out.guards_are_intact());
          Matrix expected(1, 1, dtype);
          for (std::int64_t t = 0; t < 3; ++t) {
            for (std::int64_t i = 0; i < n; ++i) {
              const float zero = has_zeros ? rows.zeros.as<float>()[t] : 0.0f;
              const float value = (static_cast<float>(rows.code(t, i, n)) - zero) * rows.scales.as<float>()[t];
              expected.set(0, 0, static_cast<double>(value));
              if (t == 1) {
                ASSERT_TRUE(std::isnan(out.get(t, i)));
              } else {
                ASSERT_EQ(out.bits(t, i), expected.bits(0, 0)) << "n " << n << ", " << t << ", " << i;
              }
            }
          }
        }
      }
    }
  }
}

class LinearW4A4 : public ImplementationTest {};
INSTANTIATE_TEST_SUITE_P(Cpu, LinearW4A4, ::testing::ValuesIn(with_reference("linear_w4a4")), test_name);

struct LinearCase {
  std::int64_t tokens;
  std::int64_t n;
  std::int64_t out_features;
};

TEST_P(LinearW4A4, IsExactInEveryFormAndType) {
  const LinearCase cases[] = {{1, 8, 1},     {1, 64, 5},    {3, 40, 17},   {4, 136, 64}, {17, 200, 33},
                              {20, 136, 40}, {300, 64, 40}, {2, 1032, 48}, {70, 512, 96}};
  for (const LinearCase& size : cases) {
    for (const DType x_form : kForms) {
      for (const DType weight_form : kForms) {
        const bool has_zeros = size.n % 3 == 1;
        OutputBuffers x(x_form, size.tokens, size.n, has_zeros,
                        x_form == DType::kInt32 ? CodeEncoding::kOffset : CodeEncoding::kTwosComplement);
        OutputBuffers weight(weight_form, size.out_features, size.n, false,
                             weight_form == DType::kUInt8 ? CodeEncoding::kOffset : CodeEncoding::kTwosComplement);
        fill_rows(x, size.tokens, size.n, kSeed);
        fill_rows(weight, size.out_features, size.n, kSeed + 1);
        const DType dtype = kTypes[static_cast<std::size_t>(size.n + size.tokens) % 3];
        const bool has_bias = size.tokens != 4;
        Matrix bias(1, size.out_features, dtype);
        bias.fill(Fill::kNormal, kSeed);
        TensorView bias_view = bias.view();
        bias_view.rank = 1;
        bias_view.shape = {size.out_features, 0, 0, 0};
        bias_view.strides = {1, 0, 0, 0};
        Matrix out(size.tokens, size.out_features, dtype);
        linear_w4a4(x.rows(), weight.rows(), has_bias ? bias_view : TensorView{}, out.view(), {});
        EXPECT_EQ(last_implementation(), GetParam());
        EXPECT_TRUE(out.guards_are_intact());
        Matrix expected(1, 1, dtype);
        for (std::int64_t t = 0; t < size.tokens; ++t) {
          const int zero = has_zeros ? static_cast<int>(x.zeros.as<float>()[t]) : 0;
          for (std::int64_t o = 0; o < size.out_features; ++o) {
            int sum = 0;
            for (std::int64_t c = 0; c < size.n; ++c) sum += (x.code(t, c, size.n) - zero) * weight.code(o, c, size.n);
            float value = static_cast<float>(sum) * (x.scales.as<float>()[t] * weight.scales.as<float>()[o]);
            if (has_bias) value += static_cast<float>(bias.get(0, o));
            expected.set(0, 0, static_cast<double>(value));
            ASSERT_EQ(out.bits(t, o), expected.bits(0, 0))
                << size.tokens << " x " << size.n << " x " << size.out_features << " at " << t << ", " << o;
          }
        }
      }
    }
  }
}

TEST_P(LinearW4A4, ARowOfScaleNanIsNanAndNoOther) {
  OutputBuffers x(DType::kInt32, 3, 64, false);
  OutputBuffers weight(DType::kInt32, 20, 64, false);
  fill_rows(x, 3, 64, kSeed);
  fill_rows(weight, 20, 64, kSeed);
  x.scales.as<float>()[1] = NAN;
  Matrix out(3, 20, DType::kFloat32);
  linear_w4a4(x.rows(), weight.rows(), {}, out.view(), {});
  for (std::int64_t t = 0; t < 3; ++t) {
    for (std::int64_t o = 0; o < 20; ++o) EXPECT_EQ(std::isnan(out.get(t, o)), t == 1);
  }
}

class UndoTransform : public ImplementationTest {};
INSTANTIATE_TEST_SUITE_P(Cpu, UndoTransform, ::testing::ValuesIn(with_reference("undo_transform")), test_name);

TEST_P(UndoTransform, AgreesWithFloat64ByNormInEveryShape) {
  for (const DType dtype : kTypes) {
    for (const KronCase& shape : kron_cases()) {
      const std::int64_t n = shape.rows * shape.columns;
      if (n > 12000) continue;
      for (const bool with_diagonal : {false, true}) {
        const CaseMatrices matrices(shape, dtype, with_diagonal, kSeed);
        Matrix y(3, n, dtype, {1, 2, 1});
        y.fill(Fill::kNormal, kSeed);
        Matrix out(3, n, dtype, {1, 5, 0});
        undo_transform(y.view(), matrices.transform, out.view());
        EXPECT_EQ(last_implementation(), GetParam());
        EXPECT_TRUE(out.guards_are_intact()) << shape.why;
        double error = 0.0;
        double norm = 0.0;
        for (std::int64_t t = 0; t < 3; ++t) {
          std::vector<double> row;
          for (std::int64_t i = 0; i < n; ++i) row.push_back(y.get(t, i));
          row = exact_transform(shape, matrices, row);
          for (std::int64_t i = 0; i < n; ++i) {
            const double exact = row[static_cast<std::size_t>(i)] * (with_diagonal ? matrices.diagonal.get(0, i) : 1.0);
            error += std::pow(out.get(t, i) - exact, 2);
            norm += exact * exact;
          }
        }
        ASSERT_LE(std::sqrt(error), undo_transform_tolerance(dtype) * std::sqrt(norm)) << shape.why;
      }
    }
  }
}

TEST(DecomposeDim, GivesTheSidesOfThePaper) {
  using Sides = std::pair<std::int64_t, std::int64_t>;
  EXPECT_EQ(get_decompose_dim(896), Sides(28, 32));
  EXPECT_EQ(get_decompose_dim(4096), Sides(64, 64));
  EXPECT_EQ(get_decompose_dim(5120), Sides(64, 80));
  EXPECT_EQ(get_decompose_dim(8192), Sides(64, 128));
  EXPECT_EQ(get_decompose_dim(11008), Sides(86, 128));
  EXPECT_EQ(get_decompose_dim(13824), Sides(108, 128));
  EXPECT_EQ(get_decompose_dim(14336), Sides(112, 128));
  EXPECT_EQ(get_decompose_dim(28672), Sides(128, 224));
  EXPECT_EQ(get_decompose_dim(1), Sides(1, 1));
  EXPECT_EQ(get_decompose_dim(2), Sides(1, 2));
  EXPECT_EQ(get_decompose_dim(10), Sides(2, 5));
  EXPECT_EQ(get_decompose_dim(13), Sides(1, 13));
}

TEST(DecomposeDim, FindsTheFirstDifferenceOfSquares) {
  for (std::int64_t n = 1; n < 3000; ++n) {
    const auto [low, high] = get_decompose_dim(n);
    ASSERT_EQ(low * high, n);
    ASSERT_LE(low, high);
    if (n % 4 == 2) continue;
    for (std::int64_t a = 1;; ++a) {
      const auto b =
          static_cast<std::int64_t>(std::llround(std::sqrt(static_cast<double>(std::max<std::int64_t>(a * a - n, 0)))));
      if (a * a - b * b != n) continue;
      ASSERT_EQ(low, a - b) << n;
      break;
    }
  }
}

}  // namespace
}  // namespace kvpack::test
