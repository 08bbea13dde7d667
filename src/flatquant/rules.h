// THE arithmetic of int4 rows, shared by every backend: from a row's range to its grid, from a value to its code, from a
// code to its four bits. All float32, every line one rounding. docs/numerics.md section 6.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/portable.h"
#include "kvpack/kron.h"

namespace kvpack {

inline constexpr float kLowestCode = -8.0f;
inline constexpr float kHighestCode = 7.0f;
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

/// Largest and smallest value of a transformed row, 0 included: 0 <= highest, lowest <= 0. A NaN or an infinity anywhere must
/// reach it as one that is not finite: fmaxf and SIMD maxima drop NaN, so implementations look at magnitudes as integers.
struct RowRange {
  float highest = 0.0f;
  float lowest = 0.0f;
  bool is_finite = true;
};

/// What one row is quantised with. A row that is not finite has scale NaN, and inverse and zero 0.
struct RowGrid {
  float scale = 1.0f;
  float inverse = 1.0f;  // 1 / scale, rounded: codes are made by multiplying
  float zero = 0.0f;
};

/// The grid of one row for one output. The smallest normal number is the limit because 1 / scale is finite from there on
/// and because a GPU may flush what is below.
KVPACK_HOST_DEVICE inline RowGrid make_row_grid(const RowRange& range, float clip_max, float clip_min, bool is_affine) {
  constexpr float kSmallestNormal = 0x1p-126f;
  constexpr float kLargest = 0x1.fffffep127f;
  const float high = clip_max * range.highest;
  const float low = clip_min * range.lowest;
  const float span = is_affine ? high - low : (high > -low ? high : -low);
  if (!range.is_finite || !(span <= kLargest)) return {kNaN, 0.0f, 0.0f};
  float scale = span / (is_affine ? 15.0f : 7.0f);
  if (scale < kSmallestNormal) scale = 1.0f;
  const float inverse = 1.0f / scale;
  return {scale, inverse, is_affine ? nearbyintf(-low * inverse) + kLowestCode : 0.0f};
}

/// The code of one finite value, -8 .. 7: RNE(value / scale) + zero, clamped. Clamping before or after the rounding is the
/// same: the bounds are whole numbers.
KVPACK_HOST_DEVICE inline int code_of(float value, const RowGrid& grid) {
  const float rounded = nearbyintf(value * grid.inverse) + grid.zero;
  const float above = rounded > kLowestCode ? rounded : kLowestCode;
  return static_cast<int>(above < kHighestCode ? above : kHighestCode);
}

/// The four bits of a code.
KVPACK_HOST_DEVICE inline std::uint32_t nibble_of(int code, CodeEncoding encoding) {
  return (static_cast<std::uint32_t>(code) & 0xfu) ^ (encoding == CodeEncoding::kOffset ? 0x8u : 0x0u);
}

/// The code of four bits.
KVPACK_HOST_DEVICE inline int code_of_nibble(std::uint32_t nibble, CodeEncoding encoding) {
  const std::uint32_t twos_complement = (nibble & 0xfu) ^ (encoding == CodeEncoding::kOffset ? 0x8u : 0x0u);
  return static_cast<int>(twos_complement ^ 0x8u) - 8;
}

/// One element of linear_w4a4 before the last rounding.
KVPACK_HOST_DEVICE inline float linear_value(std::int32_t sum, float x_scale, float weight_scale) {
  return static_cast<float>(sum) * (x_scale * weight_scale);
}

}  // namespace kvpack
