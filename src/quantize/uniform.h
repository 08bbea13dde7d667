// How a uniform grid is computed and rounded: THE rule, one function for every side. docs/numerics.md section 4.
// Each line is one IEEE rounding in float32. The build forbids contraction (-ffp-contract=off, --fmad=false): a fused
// multiply-add in `x * qs - offset` would move codes.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/portable.h"
#include "kvpack/quantize.h"

namespace kvpack {

/// One vector's grid: code = clip(RNE(x * qs - offset), 0, levels), value = (code + offset) / qs.
struct UniformGrid {
  float qs;      // codes per unit; 0 marks a degenerate grid, whose values come back exactly (compat: as 0)
  float offset;  // in codes
};

/// A vector's grid and thresholds: what turns each of its elements into its result. 16 bytes, one load on the GPU.
struct alignas(16) VectorGrid {
  float qs;      // with a codebook: the half range
  float offset;  // with a codebook: the centre
  float upper;   // x >= upper comes back exactly
  float lower;   // x <= lower too
};

/// 2^bits - 1: the largest code.
KVPACK_HOST_DEVICE inline float largest_code(std::int32_t bits) { return static_cast<float>((1 << bits) - 1); }

/// An offset by its rule; kFloating leaves it.
KVPACK_HOST_DEVICE inline float offset_of(float offset, float levels, OffsetRule rule) {
  if (rule == OffsetRule::kFloating) return offset;
  const float rounded = nearbyintf(offset);
  const float raised = rounded > -levels ? rounded : -levels;
  return raised < 0.0f ? raised : 0.0f;
}

/// The grid of a vector whose dense part spans [low, high].
KVPACK_HOST_DEVICE inline UniformGrid make_grid(float low, float high, float levels, OffsetRule rule, bool compat) {
  const float range = high - low;
  const float qs = compat ? (1.0f / range) * levels : levels / range;
  const float offset = offset_of(low * qs, levels, rule);
  // A constant vector has qs infinite; ranges beyond float32 at either end leave no grid either.
  const bool usable = qs > 0.0f && qs <= 3.402823466e+38f && fabsf(offset) <= 3.402823466e+38f;
  return usable ? UniformGrid{qs, offset} : UniformGrid{0.0f, 0.0f};
}

/// Quantises and dequantises one value on a grid that is not degenerate.
KVPACK_HOST_DEVICE inline float simulate_value(float x, UniformGrid grid, float levels) {
  const float scaled = x * grid.qs;
  const float rounded = nearbyintf(scaled - grid.offset);
  // Written as comparisons, not fmaxf: a code of -0 must become +0 on every side, or signs of zeros would differ.
  const float raised = rounded > 0.0f ? rounded : 0.0f;
  const float code = raised < levels ? raised : levels;
  return (code + grid.offset) / grid.qs;
}

}  // namespace kvpack
