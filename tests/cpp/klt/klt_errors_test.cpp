// Bad input of transform-coded rows: each refusal names the place and both values, and nothing is written before it.
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "klt/table.h"
#include "kvpack/kvpack.h"
#include "support/compare.h"
#include "support/klt_tables.h"
#include "support/matrix.h"
#include "support/tiles.h"

namespace kvpack::test {
namespace {

/// The message of a table after a change.
template <typename Change>
std::string refusal_of_table(Change&& change) {
  OwnedKltTable owned(20, mixed_levels(15, 2), kSeed);
  KltTable table = owned.view();
  change(owned, table);
  return refusal([&] { check_klt_table(table); });
}

TEST(KltTable, IsRefusedWithThePlaceAndBothValues) {
  const auto expect = [](const std::string& message, const char* words) {
    EXPECT_NE(message.find(words), std::string::npos) << message << "\nlacks: " << words;
  };
  expect(refusal_of_table([](OwnedKltTable&, KltTable&) {}), "accepted");
  expect(refusal_of_table([](OwnedKltTable& o, KltTable&) { o.mean[3] = NAN; }), "table.mean[0, 3] is nan");
  expect(refusal_of_table([](OwnedKltTable& o, KltTable&) { o.analysis[17 * 2 + 5] = INFINITY; }),
         "table.analysis[2, 5] is inf");
  expect(refusal_of_table([](OwnedKltTable& o, KltTable&) { o.synthesis[20 * 3 + 1] = -INFINITY; }),
         "table.synthesis[3, 1] is -inf");
  expect(refusal_of_table([](OwnedKltTable& o, KltTable&) { o.centroids[2] = NAN; }),
         "centroid 2 of coefficient 0 is nan");
  expect(refusal_of_table([](OwnedKltTable& o, KltTable&) { o.centroids[65] = o.centroids[64]; }),
         "centroid 1 of coefficient 1 is");
  expect(refusal_of_table([](OwnedKltTable& o, KltTable&) { o.in_scale[4] = 2; }), "in_scale[4] is 2");
  expect(refusal_of_table([](OwnedKltTable& o, KltTable&) { o.in_scale.assign(17, 0); }), "in_scale is 0 for all 17");
  expect(refusal_of_table([](OwnedKltTable&, KltTable& t) { t.channels = 21; }), "table.mean has shape [20]");
  expect(refusal_of_table([](OwnedKltTable&, KltTable& t) { t.channels = 0; }), "channels is 0");
  expect(refusal_of_table([](OwnedKltTable&, KltTable& t) { t.channels = 4097; }), "channels is 4097");
  expect(refusal_of_table([](OwnedKltTable&, KltTable& t) { t.coefficients = 16; }), "[20, 17]");
  expect(refusal_of_table([](OwnedKltTable&, KltTable& t) { t.coefficients = -1; }), "coefficients is -1");
  expect(refusal_of_table([](OwnedKltTable&, KltTable& t) { t.row_alignment = 3; }), "row_alignment is 3");
  expect(refusal_of_table([](OwnedKltTable&, KltTable& t) { t.levels = nullptr; }), "levels is a null pointer");
  expect(refusal_of_table([](OwnedKltTable&, KltTable& t) { t.mean.dtype = DType::kFloat16; }), "float16");
  const std::vector<std::int32_t> wrong{9, 3};
  const std::vector<std::int32_t> ascending{3, 4};
  expect(refusal([&] { (void)klt_row_bytes(wrong.data(), 2, 2); }), "levels[0] is 9; it is 1, 2, 3, 4, 5, 6, 7, 8, 10");
  expect(refusal([&] { (void)klt_row_bytes(ascending.data(), 2, 2); }), "levels[1] is 4 after 3");
  expect(refusal([] { (void)klt_level_bits(11); }), "levels is 11");
}

TEST(KltInput, IsRefusedBeforeAnythingIsWritten) {
  OwnedKltTable owned(20, mixed_levels(15, 2), kSeed);
  const KltTable table = owned.view();
  const std::int64_t bytes = owned.row_bytes();
  for (const double bad : {static_cast<double>(NAN), static_cast<double>(INFINITY), 1e300}) {
    Matrix x(6, 20, DType::kFloat64);
    x.fill(Fill::kNormal, kSeed);
    x.set(4, 13, bad);
    std::vector<std::uint8_t> rows(static_cast<std::size_t>(6 * bytes), 7);
    const TensorView row_view = make_view(rows.data(), DType::kUInt8, {6, bytes});
    const std::string message = refusal([&] { compress_klt(x.view(), table, row_view); });
    EXPECT_NE(message.find("sequence 0, token 4, channel 13"), std::string::npos) << message;
    EXPECT_EQ(rows, std::vector<std::uint8_t>(rows.size(), 7));
    Matrix out(6, 20, DType::kFloat64);
    EXPECT_NE(refusal([&] { simulate_klt(x.view(), table, {}, out.view()); }).find("token 4"), std::string::npos);
    EXPECT_TRUE(std::isnan(out.get(0, 0)));
    EXPECT_EQ(refusal([&] { simulate_klt(x.view(), table, {5}, out.view()); }), "accepted");
  }
  Matrix x(6, 20, DType::kFloat32);
  x.fill(Fill::kNormal, kSeed);
  std::vector<std::uint8_t> rows(static_cast<std::size_t>(6 * bytes + 6));
  const auto compress_to = [&](TensorView view) { return refusal([&] { compress_klt(x.view(), table, view); }); };
  EXPECT_NE(compress_to(make_view(rows.data(), DType::kUInt8, {6, bytes + 1})).find("rows has rows of"),
            std::string::npos);
  EXPECT_NE(compress_to(make_view(rows.data(), DType::kUInt8, {5, bytes})).find("[5, "), std::string::npos);
  EXPECT_NE(compress_to(make_view(rows.data(), DType::kInt8, {6, bytes})).find("int8"), std::string::npos);
  TensorView apart = make_view(rows.data(), DType::kUInt8, {6, bytes});
  apart.strides[0] = bytes + 1;
  EXPECT_NE(compress_to(apart).find("without gaps"), std::string::npos);
  Matrix narrow(6, 19, DType::kFloat32);
  narrow.fill(Fill::kNormal, kSeed);
  EXPECT_NE(refusal([&] { simulate_klt(narrow.view(), table, {}, narrow.view()); }).find("19 channels"),
            std::string::npos);
  EXPECT_NE(refusal([&] { simulate_klt(x.view(), table, {-1}, x.view()); }).find("protected_tokens is -1"),
            std::string::npos);
}

TEST(KltRope, ThatDoesNotFitIsRefused) {
  OwnedKltTable owned(20, mixed_levels(15, 2), kSeed);
  std::vector<std::uint8_t> rows(static_cast<std::size_t>(3 * owned.row_bytes()));
  Matrix out(3, 20, DType::kFloat32);
  std::vector<float> angles(60);
  const auto unpack_with = [&](std::int64_t head_dim, std::int64_t tokens, std::int64_t width) {
    const TensorView view = make_view(angles.data(), DType::kFloat32, {tokens, width});
    return refusal([&] {
      unpack_klt(make_view(rows.data(), DType::kUInt8, {3, owned.row_bytes()}), owned.view(), {head_dim, view, view},
                 out.view());
    });
  };
  EXPECT_EQ(unpack_with(10, 3, 10), "accepted");
  EXPECT_NE(unpack_with(6, 3, 6).find("head_dim is 6"), std::string::npos);
  EXPECT_NE(unpack_with(-4, 3, 4).find("head_dim is -4"), std::string::npos);
  EXPECT_NE(unpack_with(10, 3, 12).find("width 12"), std::string::npos);
  EXPECT_NE(unpack_with(10, 3, 5).find("width 5"), std::string::npos);
  EXPECT_NE(unpack_with(10, 2, 10).find("[2, 10]"), std::string::npos);
}

TEST(HostileRows, DecodeToSomethingAndAreNamed) {
  std::mt19937 random(kSeed);
  for (const KltCase& one : klt_cases()) {
    OwnedKltTable owned(one.channels, one.levels, kSeed);
    const std::int64_t bytes = owned.row_bytes();
    std::vector<std::uint8_t> rows(static_cast<std::size_t>(40 * bytes));
    for (std::uint8_t& byte : rows) byte = static_cast<std::uint8_t>(random());
    // An allocation of exactly these bytes: AddressSanitizer sees any read beyond.
    const TensorView view = make_view(rows.data(), DType::kUInt8, {40, bytes});
    Matrix out(40, one.channels, DType::kFloat32);
    EXPECT_NO_THROW(unpack_klt(view, owned.view(), {}, out.view())) << one.name;
    EXPECT_TRUE(out.guards_are_intact());
    const std::string message = refusal([&] { check_klt(view, owned.view()); });
    if (message != "accepted") {
      EXPECT_NE(message.find("sequence 0, token "), std::string::npos) << message;
    }
  }
}

TEST(HostileRows, SayWhatIsWrong) {
  // 8 bits of r, 7 digits of base 3 in 8 and 4 bits, 12 bits of padding.
  OwnedKltTable owned(9, std::vector<std::int32_t>(7, 3), kSeed);
  ASSERT_EQ(owned.row_bytes(), 4);
  std::vector<std::uint8_t> rows{0x78, 242, 8, 0, 0x78, 242, 8, 0};
  const auto check = [&] {
    return refusal([&] { check_klt(make_view(rows.data(), DType::kUInt8, {2, 4}), owned.view()); });
  };
  EXPECT_EQ(check(), "accepted");
  rows[5] = 243;
  EXPECT_EQ(check(), "row of sequence 0, token 1: the digits at bit 8 are 243; they must be below 243");
  rows[5] = 0;
  rows[6] = 9;
  EXPECT_EQ(check(), "row of sequence 0, token 1: the digits at bit 16 are 9; they must be below 9");
  rows[6] = 0x10;
  EXPECT_EQ(check(), "row of sequence 0, token 1: bit 20 is 1; it is padding and must be 0");
  rows[6] = 0;
  rows[0] = 0xf8;
  EXPECT_EQ(check(), "row of sequence 0, token 0: its scale is inf; it must be finite and at least 0");
  rows[0] = 0xf9;
  EXPECT_NE(check().find("its scale is nan"), std::string::npos);
}

}  // namespace
}  // namespace kvpack::test
