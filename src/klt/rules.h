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

/// The rms of `count` coefficients before it becomes a float16: what float16 cannot hold becomes its largest number, NaN too.
KVPACK_HOST_DEVICE inline float klt_rms(float sum_of_squares, std::int32_t count) {
  const float rms = sqrtf(sum_of_squares / static_cast<float>(count));
  return rms <= 65504.0f ? rms : 65504.0f;
}

/// What a coefficient is multiplied by before it meets its codebook; `scale` is r as float16 holds it.
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
