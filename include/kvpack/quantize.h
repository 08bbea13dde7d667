// Stage 3 of the pipeline, simulated: values are quantised and come back as floating point.
#pragma once

#include <cstdint>

#include "kvpack/tensor.h"

namespace [[gnu::visibility("default")]] kvpack {

/// Along which axis one scale is shared. The numbers are part of the C ABI.
enum class Axis : std::int32_t {
  kPerChannel = 0,  ///< a vector is one channel over tokens (keys)
  kPerToken = 1,    ///< a vector is one token over channels (values)
};

/// How the offset of a uniform grid is kept. The numbers are part of the C ABI.
enum class OffsetRule : std::int32_t {
  kFloating = 0,  ///< off = min * qs stays floating point: the grid touches min and max
  kClamp = 1,     ///< off = clamp(RNE(min * qs), -(2^b - 1), 0): an integer zero point
};

/// How much of the future a statistic may see. The numbers are part of the C ABI.
enum class Causality : std::int32_t {
  kOracle = 0,  ///< statistics over the whole sequence, future included (the published dynamic mode)
  kCausal = 1,  ///< per channel: complete groups of at most 64 tokens, the incomplete last group stays exact
};

/// Tokens that share statistics per channel in causal mode.
inline constexpr std::int64_t kCausalGroupTokens = 64;

/// Parameters of simulated uniform quantisation. Trivially copyable.
struct UniformOptions {
  std::int32_t bits = 4;  ///< 2, 3, 4, 8 or 16; 16 copies every bit
  Axis axis = Axis::kPerChannel;
  std::int64_t group = 0;  ///< elements of a vector that share a scale; 0: all of them
  OffsetRule offset = OffsetRule::kFloating;
  Causality causality = Causality::kOracle;
  double outlier_fraction = 0.0;      ///< share of each vector kept exact, half at each end; 0 is dense only
  std::int64_t protected_tokens = 0;  ///< this many first tokens of every sequence come back unchanged
  bool compat = false;                ///< the old tool to the bit: qs = (1/(max-min))*(2^b-1), constants become 0
};

/// What quantisation did, for honest byte counts.
struct UniformCounts {
  std::int64_t quantized = 0;  ///< elements that went through the grid (outliers included)
  std::int64_t vectors = 0;    ///< groups that own a scale and an offset
  std::int64_t outliers = 0;   ///< elements kept exact by the dense-and-sparse rule
};

/// Quantises and dequantises x with one uniform grid per vector.
///   qs = (2^b - 1) / (max - min); off = min * qs; q = clip(RNE(qs*x - off), 0, 2^b - 1); out = (q + off) / qs
///   Dense and sparse: with t = 1 - outlier_fraction/2, elements >= the linear quantile t or <= the quantile 1-t of their
///   vector come back exactly and leave the statistics; the vector's lower median takes their place there.
///   Shapes    x, out [tokens, channels] or [batch, tokens, channels], same shape, type and device
///   Types     float16, bfloat16, float32, float64 at any non-negative strides; computed in float32
///   Exact     outliers, protected tokens and vectors whose grid degenerates (constant) come back bit for bit
///   Protected tokens belong to no vector: they are in no statistic
///   Requires  finite values; out is x itself or does not overlap it
///   Throws    InvalidArgument with both values, for a value that is not finite its coordinate; when out is not x, out
///             may be partly written by then, x never
///   Source    docs/numerics.md section 4; Hooper et al. 2024, "KVQuant"
UniformCounts simulate_uniform(const TensorView& x, const TensorView& out, const UniformOptions& options,
                               void* stream = nullptr);

}  // namespace kvpack
