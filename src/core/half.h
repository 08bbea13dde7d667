// The two 16-bit floating-point types as bits, with exact scalar conversions. SIMD conversions live in isa/.
#pragma once

#include <bit>
#include <cstdint>

namespace kvpack {

/// IEEE binary16 as stored.
struct Half {
  std::uint16_t bits;
};

/// Upper half of a binary32 as stored.
struct BFloat16 {
  std::uint16_t bits;
};

/// Widens exactly; NaN payloads keep their bits.
inline float to_float(Half value) noexcept {
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x0400u) return std::bit_cast<float>(sign | ((magnitude << 13) + 0x38000000u));
  // Subnormal halves are multiples of 2^-24, which binary32 holds exactly.
  const float scaled = static_cast<float>(magnitude) * 0x1p-24f;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(scaled) | sign);
}

inline float to_float(BFloat16 value) noexcept {
  return std::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}

inline float to_float(float value) noexcept { return value; }

/// float64 is computed in float32 like every other type: docs/numerics.md section 4.
inline float to_float(double value) noexcept { return static_cast<float>(value); }

/// Rounds to nearest, ties to even; overflow gives infinity, NaN stays a NaN.
inline void from_float(float value, Half& out) noexcept {
  const std::uint32_t word = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>((word >> 16) & 0x8000u);
  const std::uint32_t magnitude = word & 0x7fffffffu;
  std::uint32_t half = 0;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  } else {
    // Adding 0.5 leaves a multiple of 2^-24 in the low mantissa bits, rounded by the hardware's RNE.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    half = std::bit_cast<std::uint32_t>(shifted) - 0x3f000000u;
  }
  out.bits = static_cast<std::uint16_t>(sign | half);
}

inline void from_float(float value, BFloat16& out) noexcept {
  const std::uint32_t word = std::bit_cast<std::uint32_t>(value);
  if ((word & 0x7fffffffu) > 0x7f800000u) {
    out.bits = static_cast<std::uint16_t>((word >> 16) | 0x40u);
    return;
  }
  out.bits = static_cast<std::uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
}

inline void from_float(float value, float& out) noexcept { out = value; }
inline void from_float(float value, double& out) noexcept { out = static_cast<double>(value); }

}  // namespace kvpack
