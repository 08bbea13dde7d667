// Transform-coded rows: every implementation against the reference, the law unpack(compress(x)) == simulate(x), the bytes.
#include <gtest/gtest.h>

#include <cmath>

#include "core/half.h"
#include "formats/klt_rows/codec_ref.h"
#include "klt/rules.h"
#include "klt/table.h"
#include "kvpack/kvpack.h"
#include "support/compare.h"
#include "support/implementations.h"
#include "support/klt_tables.h"
#include "support/matrix.h"

namespace kvpack::test {
namespace {

/// Bytes of rows with guards around them.
class Rows {
 public:
  Rows(std::int64_t tokens, std::int64_t row_bytes)
      : bytes_(static_cast<std::size_t>(tokens * row_bytes) + 2 * kGuard, 0xA5),
        tokens_(tokens),
        row_bytes_(row_bytes) {}
  [[nodiscard]] TensorView view() { return make_view(bytes_.data() + kGuard, DType::kUInt8, {tokens_, row_bytes_}); }
  [[nodiscard]] std::uint8_t* row(std::int64_t token) { return bytes_.data() + kGuard + token * row_bytes_; }
  [[nodiscard]] bool guards_are_intact() const {
    for (std::size_t i = 0; i < kGuard; ++i) {
      if (bytes_[i] != 0xA5 || bytes_[bytes_.size() - 1 - i] != 0xA5) return false;
    }
    return true;
  }
  friend bool operator==(const Rows&, const Rows&) = default;

 private:
  static constexpr std::size_t kGuard = 64;
  std::vector<std::uint8_t> bytes_;
  std::int64_t tokens_;
  std::int64_t row_bytes_;
};

class Klt : public ImplementationTest {};
INSTANTIATE_TEST_SUITE_P(Cpu, Klt, ::testing::ValuesIn(cpu_implementations("compress_klt")), test_name);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(Klt);

TEST_P(Klt, EqualsTheReferenceBitForBit) {
  for (const KltCase& one : klt_cases()) {
    for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64}) {
      for (const std::int64_t tokens : {1, 3, 37}) {
        const Layout layout = tokens == 3 ? Layout{2, 3, 1} : Layout{1, 5, 1};
        OwnedKltTable table(one.channels, one.levels, kSeed);
        Matrix x(tokens, one.channels, dtype, layout);
        x.fill(Fill::kNormal, kSeed);
        Rows expected(tokens, table.row_bytes());
        Rows actual(tokens, table.row_bytes());
        Matrix expected_out(tokens, one.channels, dtype);
        Matrix out(tokens, one.channels, dtype, layout);
        Matrix simulated(tokens, one.channels, dtype, layout);
        force_implementation("reference");
        compress_klt(x.view(), table.view(), expected.view());
        unpack_klt(expected.view(), table.view(), {}, expected_out.view());
        force_implementation(GetParam());
        compress_klt(x.view(), table.view(), actual.view());
        EXPECT_EQ(last_implementation(), GetParam());
        ASSERT_EQ(expected, actual) << one.name << ", " << name_of(dtype) << ", " << tokens << " tokens";
        unpack_klt(actual.view(), table.view(), {}, out.view());
        ASSERT_TRUE(same_bits(expected_out, out)) << one.name;
        simulate_klt(x.view(), table.view(), {}, simulated.view());
        ASSERT_TRUE(same_bits(expected_out, simulated)) << one.name;
        EXPECT_TRUE(actual.guards_are_intact());
        EXPECT_TRUE(out.guards_are_intact());
      }
    }
  }
}

TEST_P(Klt, RotatesAsTheReference) {
  for (const std::int64_t width : {64, 32, 6}) {
    OwnedKltTable table(192, mixed_levels(131, 20), kSeed);
    Matrix x(21, 192, DType::kFloat32);
    Matrix angles(21, width, DType::kFloat32);
    Matrix cos(21, width, DType::kFloat32);
    x.fill(Fill::kNormal, kSeed);
    angles.fill(Fill::kNormal, kSeed + 1);
    cos.fill(Fill::kNormal, kSeed + 2);
    const auto packed = [&](const Matrix& m) {
      std::vector<float> values;
      for (std::int64_t t = 0; t < 21; ++t) {
        for (std::int64_t c = 0; c < width; ++c) values.push_back(static_cast<float>(m.get(t, c)));
      }
      return values;
    };
    std::vector<float> cos_values = packed(cos);
    std::vector<float> sin_values = packed(angles);
    const KltRope rope{64, make_view(cos_values.data(), DType::kFloat32, {21, width}),
                       make_view(sin_values.data(), DType::kFloat32, {21, width})};
    Rows rows(21, table.row_bytes());
    compress_klt(x.view(), table.view(), rows.view());
    for (const DType dtype : {DType::kFloat32, DType::kFloat16}) {
      Matrix expected(21, 192, dtype);
      Matrix actual(21, 192, dtype, {2, 1, 3});
      force_implementation("reference");
      unpack_klt(rows.view(), table.view(), rope, expected.view());
      force_implementation(GetParam());
      unpack_klt(rows.view(), table.view(), rope, actual.view());
      ASSERT_TRUE(same_bits(expected, actual)) << "width " << width;
    }
  }
}

TEST_P(Klt, SurvivesNumbersAtTheEdge) {
  // Scales that float16 cannot hold, sums that overflow, zeros, denormals: the same bytes everywhere.
  for (const Fill fill : {Fill::kHuge, Fill::kDenormal, Fill::kZeros, Fill::kConstant}) {
    OwnedKltTable table(40, mixed_levels(26, 7), kSeed);
    if (fill == Fill::kZeros) table.mean.assign(40, 0.0f);
    Matrix x(9, 40, DType::kFloat32);
    x.fill(fill, kSeed);
    Rows expected(9, table.row_bytes());
    Rows actual(9, table.row_bytes());
    force_implementation("reference");
    compress_klt(x.view(), table.view(), expected.view());
    force_implementation(GetParam());
    compress_klt(x.view(), table.view(), actual.view());
    EXPECT_EQ(expected, actual) << name_of(fill);
    EXPECT_NO_THROW(check_klt(actual.view(), table.view()));
  }
}

TEST(KltReference, SimulatesWhatItCompresses) {
  const Forced forced("reference");
  for (const KltCase& one : klt_cases()) {
    for (const std::int64_t alignment : {2, 16}) {
      OwnedKltTable table(one.channels, one.levels, kSeed, alignment);
      Matrix x(11, one.channels, DType::kFloat32);
      x.fill(Fill::kNormal, kSeed);
      Rows rows(11, table.row_bytes());
      Matrix unpacked(11, one.channels, DType::kFloat32);
      Matrix simulated(11, one.channels, DType::kFloat32);
      compress_klt(x.view(), table.view(), rows.view());
      EXPECT_NO_THROW(check_klt(rows.view(), table.view())) << one.name;
      unpack_klt(rows.view(), table.view(), {}, unpacked.view());
      simulate_klt(x.view(), table.view(), {}, simulated.view());
      EXPECT_TRUE(same_bits(unpacked, simulated)) << one.name;
      simulate_klt(x.view(), table.view(), {}, x.view());
      EXPECT_TRUE(same_bits(unpacked, x)) << one.name << " in place";
      EXPECT_TRUE(rows.guards_are_intact());
    }
  }
}

TEST(KltReference, KeepsProtectedTokensOfEverySequence) {
  OwnedKltTable table(16, mixed_levels(13, 0), kSeed);
  Matrix whole(14, 16, DType::kFloat32);
  whole.fill(Fill::kNormal, kSeed);
  Matrix out(14, 16, DType::kFloat32);
  const auto as_batch = [](const Matrix& matrix) {
    TensorView view = matrix.view();
    view.rank = 3;
    view.shape = {2, 7, 16, 0};
    view.strides = {7 * view.strides[0], view.strides[0], 1, 0};
    return view;
  };
  simulate_klt(as_batch(whole), table.view(), {3}, as_batch(out));
  for (std::int64_t t = 0; t < 14; ++t) {
    bool same = true;
    for (std::int64_t c = 0; c < 16; ++c) same = same && whole.bits(t, c) == out.bits(t, c);
    EXPECT_EQ(same, t % 7 < 3) << "token " << t;
  }
}

TEST(KltRows, EveryCodeComesBack) {
  for (const KltCase& one : klt_cases()) {
    const klt_rows::RowLayout layout =
        klt::layout_of(one.levels.data(), static_cast<std::int64_t>(one.levels.size()), 2);
    std::vector<std::uint8_t> row(static_cast<std::size_t>(layout.row_bytes));
    for (std::uint32_t round = 0; round < 64; ++round) {
      klt_rows::TokenCodes token;
      token.scale.bits = static_cast<std::uint16_t>(klt_scale_bits(round * 247u / 63u));
      for (std::int32_t k = 0; k < layout.coded; ++k) {
        token.codes.push_back((round * 7u + static_cast<std::uint32_t>(k) * 13u + round / 3u) %
                              static_cast<std::uint32_t>(one.levels[static_cast<std::size_t>(k)]));
      }
      klt_rows::write_row(layout, token, row.data());
      const klt_rows::TokenCodes read = klt_rows::read_row(layout, row.data());
      ASSERT_EQ(read.codes, token.codes) << one.name;
      if (layout.coded > 0) {
        ASSERT_EQ(read.scale.bits, token.scale.bits);
      }
      ASSERT_EQ(static_cast<int>(klt_rows::check_row(layout, row.data()).fault), 0) << one.name;
    }
  }
}

TEST(KltScale, IsTheNearestOfItsCodes) {
  for (std::uint32_t bits = 0; bits < 0x7c00u; ++bits) {
    const float r = to_float(Half{static_cast<std::uint16_t>(bits)});
    const std::uint32_t code = klt_scale_code(bits);
    ASSERT_LT(code, kKltScaleCodes);
    const auto distance = [&](std::uint32_t other) {
      return std::abs(to_float(Half{static_cast<std::uint16_t>(klt_scale_bits(other))}) - r);
    };
    for (const std::uint32_t other : {code == 0 ? 0u : code - 1, std::min(code + 1, kKltScaleCodes - 1)}) {
      ASSERT_LE(distance(code), distance(other)) << r;
      ASSERT_TRUE(other == code || distance(code) < distance(other) || code % 2 == 0) << r;
    }
  }
}

TEST(KltRows, TakeAtMostTwoPerCentMoreThanTheBound) {
  for (const std::int32_t levels : kKltLevels) {
    const std::vector<std::int32_t> many(960, levels);
    const double bound = 960.0 * std::log2(levels);
    const double bits = 8.0 * static_cast<double>(klt_row_bytes(many.data(), 960, 2)) - klt_rows::kScaleBits;
    EXPECT_GE(bits, bound - 1e-9) << levels;
    EXPECT_LE(bits, bound * 1.02) << levels;
    EXPECT_NEAR(klt_level_bits(levels) * 960.0, bits, 16.0) << levels;
  }
}

}  // namespace
}  // namespace kvpack::test
