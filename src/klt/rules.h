// How coefficients become codes: THE rules, one function for every side. docs/numerics.md. Each line is one IEEE rounding in
// float32.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/half.h"
#include "core/portable.h"

namespace kvpack {

/// The squares of coefficients run in this many strands, coefficient k in strand k mod kKltStrands, each in order; then strand
/// i takes in strand i + 16, i + 8, i + 4, i + 2, i + 1 (join_strands of quantize/codebook.h).
inline constexpr std::int32_t kKltStrands = 32;

/// Bits of a float16 that r goes without, and how many codes of r are finite.
inline constexpr std::int32_t kKltScaleShift = 7;
inline constexpr std::uint32_t kKltScaleCodes = 0xf8;

/// The rms of `count` coefficients before it becomes a float16: what float16 cannot hold becomes its largest number, NaN too.
KVPACK_HOST_DEVICE inline float klt_rms(float sum_of_squares, std::int32_t count) {
  const float rms = sqrtf(sum_of_squares / static_cast<float>(count));
  return rms <= 65504.0f ? rms : 65504.0f;
}

/// r as a row keeps it: the upper half of a float16 without its sign, 5 bits of exponent and 3 of mantissa, ties to even.
/// `half_bits` are those of a finite float16 from 0 on; what would round to infinity becomes the largest r, 61440.
KVPACK_HOST_DEVICE inline std::uint32_t klt_scale_code(std::uint32_t half_bits) {
  const std::uint32_t rounded = (half_bits + 0x3fu + (half_bits >> kKltScaleShift & 1u)) >> kKltScaleShift;
  return rounded < kKltScaleCodes ? rounded : kKltScaleCodes - 1;
}

/// The bits of the float16 that a code of r stands for.
KVPACK_HOST_DEVICE inline std::uint32_t klt_scale_bits(std::uint32_t code) { return code << kKltScaleShift; }

/// What a coefficient is multiplied by before it meets its codebook; `scale` is r as a row holds it.
KVPACK_HOST_DEVICE inline float klt_inverse_scale(float scale) { return scale > 0.0f ? 1.0f / scale : 0.0f; }

/// The boundary between two centroids; a code is how many of them lie below the value, so ties go to the lower centroid.
KVPACK_HOST_DEVICE inline float klt_boundary(float lower, float upper) { return lower * 0.5f + upper * 0.5f; }

/// Code of a normalised coefficient; 0 for NaN. `centroids` are those of its codebook.
KVPACK_HOST_DEVICE inline std::uint32_t klt_code(float y, const float* centroids, std::int32_t levels) {
  std::uint32_t code = 0;
  for (std::int32_t j = 0; j + 1 < levels; ++j) code += y > klt_boundary(centroids[j], centroids[j + 1]) ? 1u : 0u;
  return code;
}

}  // namespace kvpack
