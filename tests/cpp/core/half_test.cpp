// Scalar 16-bit conversions: all halves there and back, and rounding at every kind of border.
#include "core/half.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace kvpack {
namespace {

std::uint16_t half_of(float value) {
  Half half{};
  from_float(value, half);
  return half.bits;
}

std::uint16_t bfloat_of(float value) {
  BFloat16 bfloat{};
  from_float(value, bfloat);
  return bfloat.bits;
}

TEST(Half, EveryNumberComesBackFromFloat) {
  for (std::uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const Half half{static_cast<std::uint16_t>(bits)};
    const float value = to_float(half);
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(to_float(Half{half_of(value)}))) << std::hex << bits;
    } else {
      EXPECT_EQ(half_of(value), half.bits) << std::hex << bits;
    }
  }
}

TEST(Half, WidensKnownNumbers) {
  EXPECT_EQ(to_float(Half{0x3c00}), 1.0f);
  EXPECT_EQ(to_float(Half{0xc500}), -5.0f);
  EXPECT_EQ(to_float(Half{0x7bff}), 65504.0f);
  EXPECT_EQ(to_float(Half{0x0001}), 0x1p-24f);
  EXPECT_TRUE(std::signbit(to_float(Half{0x8000})));
}

TEST(Half, RoundsToNearestWithTiesToEven) {
  EXPECT_EQ(half_of(1.0f + 0x1p-11f), 0x3c00);      // half way, even below
  EXPECT_EQ(half_of(1.0f + 3 * 0x1p-11f), 0x3c02);  // half way, even above
  EXPECT_EQ(half_of(1.0f + 0x1p-11f + 0x1p-20f), 0x3c01);
  EXPECT_EQ(half_of(65519.0f), 0x7bff);
  EXPECT_EQ(half_of(65520.0f), 0x7c00);
  EXPECT_EQ(half_of(0x1p-25f), 0x0000);  // half of the smallest: to even
  EXPECT_EQ(half_of(-0x1.8p-24f), 0x8002);
  EXPECT_EQ(half_of(std::numeric_limits<float>::infinity()), 0x7c00);
}

TEST(BFloat16, RoundsToNearestWithTiesToEvenAndKeepsNaN) {
  EXPECT_EQ(bfloat_of(1.0f), 0x3f80);
  EXPECT_EQ(bfloat_of(1.0f + 0x1p-8f), 0x3f80);
  EXPECT_EQ(bfloat_of(1.0f + 3 * 0x1p-8f), 0x3f82);
  EXPECT_EQ(bfloat_of(3.4e38f), 0x7f80);
  EXPECT_TRUE(std::isnan(to_float(BFloat16{bfloat_of(std::nanf(""))})));
}

}  // namespace
}  // namespace kvpack
