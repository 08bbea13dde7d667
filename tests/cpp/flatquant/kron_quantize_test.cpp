// kron_quantize: every implementation against float64, forms and encodings, clips, grids, rows that are not finite.
#include <gtest/gtest.h>

#include <cstdint>

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

class KronQuantize : public ImplementationTest {};
INSTANTIATE_TEST_SUITE_P(Cpu, KronQuantize, ::testing::ValuesIn(all_implementations()), test_name);

void run(const Matrix& x, const CaseMatrices& matrices, const OutputBuffers& out, double clip_max = 1.0,
         double clip_min = 1.0) {
  const KronOutput output{out.rows(), clip_max, clip_min};
  kron_quantize(x.view(), matrices.transform, {&output, 1}, {});
}

/// What the judge says of one row.
struct ExactRow {
  double scale;
  double zero;
  std::vector<double> codes;
};

ExactRow exact_row(const std::vector<double>& y, double clip_max, double clip_min, bool is_affine) {
  double high = 0.0;
  double low = 0.0;
  for (const double value : y) {
    high = std::max(high, value * clip_max);
    low = std::min(low, value * clip_min);
  }
  ExactRow row;
  row.scale = is_affine ? (high - low) / 15.0 : std::max(high, -low) / 7.0;
  if (row.scale == 0.0) row.scale = 1.0;
  row.zero = is_affine ? std::nearbyint(-low / row.scale) - 8.0 : 0.0;
  for (const double value : y) {
    row.codes.push_back(std::clamp(std::nearbyint(value / row.scale) + row.zero, -8.0, 7.0));
  }
  return row;
}

struct Mistakes {
  std::int64_t codes = 0;
  std::int64_t off = 0;
};

/// Compares one call with the judge: scales within the type's rounding, codes off by one at most.
void judge(const KronCase& shape, DType dtype, bool is_affine, double clip_max, double clip_min, bool with_diagonal,
           Mistakes& mistakes) {
  const std::int64_t n = shape.rows * shape.columns;
  constexpr std::int64_t kTokens = 5;
  const CaseMatrices matrices(shape, dtype, with_diagonal, kSeed);
  Matrix x(kTokens, n, dtype, {1, 3, 1});
  fill_activations(x, kSeed + 1);
  const OutputBuffers out(DType::kInt8, kTokens, n, is_affine);
  run(x, matrices, out, clip_max, clip_min);
  EXPECT_EQ(last_implementation(), KronQuantize::GetParam());
  EXPECT_TRUE(out.guards_are_intact()) << shape.why;
  for (std::int64_t t = 0; t < kTokens; ++t) {
    std::vector<double> row;
    Matrix rounded(1, 1, dtype);
    for (std::int64_t i = 0; i < n; ++i) {
      rounded.set(0, 0, x.get(t, i) * (with_diagonal ? matrices.diagonal.get(0, i) : 1.0));
      row.push_back(rounded.get(0, 0));
    }
    const ExactRow exact = exact_row(exact_transform(shape, matrices, row), clip_max, clip_min, is_affine);
    const double scale = static_cast<double>(out.scales.as<float>()[t]);
    ASSERT_NEAR(scale, exact.scale, exact.scale * kron_scale_tolerance(dtype)) << shape.why << ", token " << t;
    const double zero = is_affine ? static_cast<double>(out.zeros.as<float>()[t]) : 0.0;
    ASSERT_NEAR(zero, exact.zero, 1.0) << shape.why;
    const double shift = zero - exact.zero;
    for (std::int64_t i = 0; i < n; ++i) {
      const double expected = std::clamp(exact.codes[static_cast<std::size_t>(i)] + shift, -8.0, 7.0);
      const double difference = std::fabs(out.code(t, i, n) - expected);
      ASSERT_LE(difference, 1.0) << shape.why << ", token " << t << ", element " << i;
      mistakes.off += difference != 0.0;
      ++mistakes.codes;
    }
  }
}

TEST_P(KronQuantize, AgreesWithFloat64InEveryShapeAndType) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
    Mistakes mistakes;
    for (const KronCase& shape : kron_cases()) judge(shape, dtype, false, 1.0, 1.0, false, mistakes);
    EXPECT_LE(static_cast<double>(mistakes.off), kron_share_off(dtype) * static_cast<double>(mistakes.codes))
        << kvpack::name_of(dtype) << ": " << mistakes.off << " of " << mistakes.codes << " codes are off by one";
  }
}

TEST_P(KronQuantize, ClipsScalesDiagonalsAndAffineGridsAgreeWithFloat64) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
    Mistakes mistakes;
    for (const KronCase& shape : kron_cases()) {
      if (shape.rows * shape.columns > 6000) continue;
      judge(shape, dtype, false, 0.8, 0.6, true, mistakes);
      judge(shape, dtype, true, 0.9, 0.7, false, mistakes);
      judge(shape, dtype, true, 1.0, 1.0, true, mistakes);
    }
    EXPECT_LE(static_cast<double>(mistakes.off), kron_share_off(dtype) * static_cast<double>(mistakes.codes))
        << kvpack::name_of(dtype) << ": " << mistakes.off << " of " << mistakes.codes;
  }
}

TEST_P(KronQuantize, FormsAndEncodingsHoldTheSameCodes) {
  const KronCase shape{"", 12, 20};
  const std::int64_t n = 240;
  for (const bool is_affine : {false, true}) {
    const CaseMatrices matrices(shape, DType::kFloat32, false, kSeed);
    Matrix x(9, n, DType::kFloat32);
    fill_activations(x, kSeed);
    const OutputBuffers plain(DType::kInt8, 9, n, is_affine);
    run(x, matrices, plain, 0.7, 0.9);
    for (const DType form : {DType::kInt32, DType::kUInt8}) {
      for (const CodeEncoding encoding : {CodeEncoding::kTwosComplement, CodeEncoding::kOffset}) {
        const OutputBuffers packed(form, 9, n, is_affine, encoding);
        run(x, matrices, packed, 0.7, 0.9);
        EXPECT_TRUE(packed.guards_are_intact());
        EXPECT_TRUE(packed.scales.same_bytes(plain.scales));
        for (std::int64_t t = 0; t < 9; ++t) {
          for (std::int64_t i = 0; i < n; ++i) ASSERT_EQ(packed.code(t, i, n), plain.code(t, i, n)) << t << ", " << i;
        }
      }
    }
  }
}

TEST_P(KronQuantize, WritesTheWordOfTheHeader) {
  // No transform; scale 1 by a maximum of 7. Element i stands in bits 4*i: 7, -1, 0, 3, -8 (clamped: -7), 2, 1, -2.
  float data[8] = {7, -1, 0, 3, -7, 2, 1, -2};
  const OutputBuffers two(DType::kInt32, 1, 8, false);
  const OutputBuffers offset(DType::kInt32, 1, 8, false, CodeEncoding::kOffset);
  for (const OutputBuffers* out : {&two, &offset}) {
    const KronOutput output{out->rows(), 1.0, 1.0};
    kron_quantize(make_view(data, DType::kFloat32, {1, 8}), {}, {&output, 1}, {});
  }
  EXPECT_EQ(two.codes.as<std::uint32_t>()[0], 0xE12930F7u);
  EXPECT_EQ(offset.codes.as<std::uint32_t>()[0], 0xE12930F7u ^ 0x88888888u);
  EXPECT_EQ(two.scales.as<float>()[0], 1.0f);
}

TEST_P(KronQuantize, SeveralOutputsEqualSeveralCalls) {
  const KronCase shape{"", 16, 28};
  const std::int64_t n = 448;
  const CaseMatrices matrices(shape, DType::kBFloat16, true, kSeed);
  Matrix x(11, n, DType::kBFloat16);
  fill_activations(x, kSeed);
  const OutputBuffers first(DType::kInt32, 11, n, true);
  const OutputBuffers second(DType::kInt32, 11, n, true);
  const OutputBuffers third(DType::kInt32, 11, n, true);
  const KronOutput outputs[] = {{first.rows(), 1.0, 1.0}, {second.rows(), 0.6, 0.9}, {third.rows(), 0.25, 0.125}};
  kron_quantize(x.view(), matrices.transform, outputs, {});
  const OutputBuffers* all[] = {&first, &second, &third};
  for (std::size_t i = 0; i < 3; ++i) {
    const OutputBuffers alone(DType::kInt32, 11, n, true);
    run(x, matrices, alone, outputs[i].clip_max, outputs[i].clip_min);
    EXPECT_TRUE(alone.codes.same_bytes(all[i]->codes)) << i;
    EXPECT_TRUE(alone.scales.same_bytes(all[i]->scales)) << i;
    EXPECT_TRUE(alone.zeros.same_bytes(all[i]->zeros)) << i;
  }
}

TEST_P(KronQuantize, RowsThatAreNotFiniteTouchNoOther) {
  const KronCase shape{"", 16, 20};
  const std::int64_t n = 320;
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
    for (const bool is_affine : {false, true}) {
      const CaseMatrices matrices(shape, dtype, false, kSeed);
      Matrix x(21, n, dtype);
      fill_activations(x, kSeed);
      const OutputBuffers clean(DType::kInt8, 21, n, is_affine);
      run(x, matrices, clean);
      x.set(3, 0, NAN);
      x.set(8, n - 1, INFINITY);
      x.set(20, 17, -INFINITY);
      const OutputBuffers out(DType::kInt8, 21, n, is_affine);
      run(x, matrices, out);
      for (std::int64_t t = 0; t < 21; ++t) {
        const bool is_bad = t == 3 || t == 8 || t == 20;
        const float scale = out.scales.as<float>()[t];
        EXPECT_TRUE(is_bad ? std::isnan(scale) : scale == clean.scales.as<float>()[t]) << t;
        EXPECT_TRUE(!is_bad || !is_affine || out.zeros.as<float>()[t] == 0.0f) << t;
        for (std::int64_t i = 0; i < n; ++i) ASSERT_EQ(out.code(t, i, n), is_bad ? 0 : clean.code(t, i, n)) << t;
      }
    }
  }
}

TEST_P(KronQuantize, RowsOfZerosAndOfTinyNumbersHaveScaleOne) {
  const KronCase shape{"", 8, 16};
  const CaseMatrices matrices(shape, DType::kFloat32, false, kSeed);
  Matrix x(2, 128, DType::kFloat32);
  x.fill(Fill::kNothing, kSeed);
  for (std::int64_t i = 0; i < 128; ++i) x.set(1, i, 1e-40);
  const OutputBuffers out(DType::kInt32, 2, 128, false, CodeEncoding::kOffset);
  run(x, matrices, out);
  for (std::int64_t t = 0; t < 2; ++t) {
    EXPECT_EQ(out.scales.as<float>()[t], 1.0f);
    for (std::int64_t i = 0; i < 128; ++i) EXPECT_EQ(out.code(t, i, 128), 0);
  }
}

TEST_P(KronQuantize, EveryNumberOfTokensGivesTheSameRows) {
  // A row's codes do not depend on how many others stand beside it.
  const KronCase shape{"", 16, 32};
  const std::int64_t n = 512;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    const CaseMatrices matrices(shape, dtype, false, kSeed);
    Matrix x(70, n, dtype);
    fill_activations(x, kSeed);
    const OutputBuffers all(DType::kInt8, 70, n, false);
    run(x, matrices, all);
    for (const std::int64_t tokens : {0, 1, 2, 3, 5, 16, 33}) {
      const OutputBuffers out(DType::kInt8, tokens, n, false);
      const KronOutput output{out.rows(), 1.0, 1.0};
      TensorView part = x.view();
      part.shape[0] = tokens;
      kron_quantize(part, matrices.transform, {&output, 1}, {});
      EXPECT_TRUE(out.guards_are_intact());
      for (std::int64_t t = 0; t < tokens; ++t) {
        for (std::int64_t i = 0; i < n; ++i) ASSERT_EQ(out.code(t, i, n), all.code(t, i, n)) << tokens << ", " << t;
      }
    }
  }
}

TEST_P(KronQuantize, ThreadsDoNotChangeALoneToken) {
  // Large enough for its products to be shared out: 96 x 88 x (96 + 88) multiplications.
  const KronCase shape{"", 96, 88};
  const std::int64_t n = 96 * 88;
  for (const DType dtype : {DType::kFloat16, DType::kFloat32}) {
    const CaseMatrices matrices(shape, dtype, false, kSeed);
    Matrix x(1, n, dtype);
    fill_activations(x, kSeed);
    const OutputBuffers alone(DType::kInt32, 1, n, false);
    set_num_threads(1);
    run(x, matrices, alone);
    for (const int threads : {2, 3, 7}) {
      const OutputBuffers shared(DType::kInt32, 1, n, false);
      set_num_threads(threads);
      run(x, matrices, shared);
      EXPECT_TRUE(shared.codes.same_bytes(alone.codes)) << threads;
      EXPECT_TRUE(shared.scales.same_bytes(alone.scales)) << threads;
    }
    set_num_threads(0);
  }
}

}  // namespace
}  // namespace kvpack::test
