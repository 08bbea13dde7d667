// How a value meets a codebook: THE rule, one function for every side. docs/numerics.md section 4. Each line is one IEEE
// rounding in float32.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/portable.h"
#include "quantize/uniform.h"

namespace kvpack {

inline constexpr std::int32_t kMaxCentroids = 256;

/// A codebook as every implementation reads it. Centroid k is the nearest one where exactly k boundaries lie below y:
///   centroids     -1     -0.2      0.3      1         values: the same after Q-Norm
///   boundaries       -0.6     0.05     0.65           y = 0.05 has one boundary below it: ties go to the lower
struct CodebookTable {
  std::int32_t levels = 0;
  float boundaries[kMaxCentroids] = {};  // [levels - 1] used; boundary k lies between centroids k and k + 1
  float values[kMaxCentroids] = {};      // [levels] what a code comes back as, in normalised units
};

/// Number of the nearest centroid, by halving. Levels are a power of two.
KVPACK_HOST_DEVICE inline std::int32_t nearest_centroid(float y, const float* boundaries, std::int32_t levels) {
  std::int32_t index = 0;
  for (std::int32_t step = levels / 2; step > 0; step /= 2) index += y > boundaries[index + step - 1] ? step : 0;
  return index;
}

/// The affine stage of a vector that spans [low, high], in the fields of a uniform grid: qs holds the half range (0: no
/// usable one), offset the centre. `compat` returns the centre of a vector without a half range, 0 of one beyond float32.
KVPACK_HOST_DEVICE inline UniformGrid make_codebook_grid(float low, float high, bool compat) {
  const float half = (high - low) * 0.5f;
  const float centre = (high + low) * 0.5f;
  const bool has_centre = fabsf(centre) <= 3.402823466e+38f;
  const bool usable = half > 0.0f && half <= 3.402823466e+38f && has_centre;
  // + 0: a vector of zeros of both signs has one centre, whichever of them a side meets first.
  return usable ? UniformGrid{half, centre}
                : UniformGrid{0.0f, compat && half == 0.0f && has_centre ? centre + 0.0f : 0.0f};
}

/// The affine stage from a sum of squares.
KVPACK_HOST_DEVICE inline UniformGrid make_rms_grid(float sum_of_squares, std::int64_t count) {
  const float rms = sqrtf(sum_of_squares / static_cast<float>(count));
  return rms > 0.0f && rms <= 3.402823466e+38f ? UniformGrid{rms, 0.0f} : UniformGrid{0.0f, 0.0f};
}

/// Sums of squares run in this many strands, element i in strand i mod kStrands, each in order; then strand i takes in
/// strand i + 16, i + 8, i + 4, i + 2, i + 1. A register, a warp and plain code can all follow that.
inline constexpr std::int32_t kStrands = 32;

KVPACK_HOST_DEVICE inline float join_strands(float* strands) {
  for (std::int32_t half = kStrands / 2; half > 0; half /= 2) {
    for (std::int32_t i = 0; i < half; ++i) strands[i] = strands[i] + strands[i + half];
  }
  return strands[0];
}

/// The grid of a vector whose dense part spans [low, high], with a codebook or without.
KVPACK_HOST_DEVICE inline UniformGrid make_range_grid(float low, float high, const QuantizeOptions& options) {
  return options.codebook != nullptr ? make_codebook_grid(low, high, options.compat)
                                     : make_grid(low, high, largest_code(options.bits), options.offset, options.compat);
}

/// Quantises and dequantises one value; `grid` is that of make_codebook_grid or make_rms_grid and not degenerate.
KVPACK_HOST_DEVICE inline float simulate_with_codebook(float x, UniformGrid grid, const float* boundaries,
                                                       const float* values, std::int32_t levels) {
  const float y = (x - grid.offset) / grid.qs;
  return values[nearest_centroid(y, boundaries, levels)] * grid.qs + grid.offset;
}

}  // namespace kvpack
