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
  kOracle = 0,      ///< statistics over the whole sequence, future included (the published dynamic mode)
  kCausal = 1,      ///< per channel: complete groups of at most 64 tokens, the incomplete last group stays exact
  kCalibrated = 2,  ///< ranges from outside, found on other text: simulate_quantized with `lower` and `upper`
};

/// What one vector is divided by before its values meet the codebook. The numbers are part of the C ABI.
enum class ScaleRule : std::int32_t {
  kRange = 0,  ///< centre (max + min)/2, half range (max - min)/2: values lie in [-1, 1]
  kRms = 1,    ///< centre 0, scale sqrt(mean x^2): for Gaussian codebooks; needs a codebook, knows no outliers
};

/// Tokens that share statistics per channel in causal mode.
inline constexpr std::int64_t kCausalGroupTokens = 64;

/// Parameters of simulated uniform quantisation. Trivially copyable.
struct UniformOptions {
  std::int32_t bits = 4;  ///< 2, 3, 4, 5, 8 or 16; 16 copies every bit
  Axis axis = Axis::kPerChannel;
  std::int64_t group = 0;  ///< elements of a vector that share a scale; 0: all of them
  OffsetRule offset = OffsetRule::kFloating;
  Causality causality = Causality::kOracle;
  double outlier_fraction = 0.0;      ///< share of each vector kept exact, half at each end; 0 is dense only
  std::int64_t protected_tokens = 0;  ///< this many first tokens of every sequence come back unchanged
  bool compat = false;                ///< the old tool to the bit: qs = (1/(max-min))*(2^b-1), constants become 0
};

/// The one quantiser for accuracy studies, in its stages: affine (a vector's range or rms), codebook (a uniform grid or
/// centroids), outliers, protected tokens. A transform, where a method has one, is an operation of its own:
/// transform.h. NUQ, NF, Q-Norm, KVQuant int, KIVI and TurboQuant-like methods are settings of it. Trivially copyable.
/// Every pointer is host memory, whatever the device of x, and is read during the call only.
struct QuantizeOptions : UniformOptions {
  ScaleRule scale = ScaleRule::kRange;
  const float* codebook = nullptr;  ///< [num_centroids] ascending, in normalised units; null: a uniform grid
  std::int32_t num_centroids = 0;   ///< 2^bits with a codebook, else 0
  float norm_scale = 1.0f;          ///< Q-Norm: a value becomes centroid * norm_scale + norm_offset
  float norm_offset = 0.0f;
  const float* lower = nullptr;     ///< [num_thresholds] calibrated minimum of each channel (per token: of each token)
  const float* upper = nullptr;     ///< [num_thresholds] calibrated maximum; read in calibrated mode only
  std::int64_t num_thresholds = 0;  ///< channels (per token: tokens) in calibrated mode, else 0
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
///   Protected tokens belong to no vector: they are in no statistic (compat, whole channels, oracle: they are in the quantiles,
///             the median, and without outliers in the range, as in the published tool)
///   Requires  finite values; out is x itself or does not overlap it
///   Throws    InvalidArgument with both values, for a value that is not finite its coordinate; when out is not x, out
///             may be partly written by then, x never
///   Source    docs/numerics.md section 4; Hooper et al. 2024, "KVQuant"
UniformCounts simulate_uniform(const TensorView& x, const TensorView& out, const UniformOptions& options,
                               void* stream = nullptr);

/// Quantises and dequantises x: simulate_uniform with codebooks, other scales and calibrated ranges.
///   codebook  y = (x - centre) / half; the nearest centroid, ties to the lower; out = (c*norm_scale + norm_offset) * half
///             + centre
///   rms       centre 0, half = sqrt(mean of x^2 over the vector)
///   calibrated  min and max of a vector are its `lower` and `upper`; with outlier_fraction > 0 elements strictly beyond
///             them come back exactly, else they go to the nearest end. `compat`: range, 1/range, qs, off, centre and half
///             range are each rounded to float16, as the published tool does with its float16 thresholds
///   Shapes, types, what is exact, errors: as simulate_uniform
///   Throws    InvalidArgument also for centroids that are not finite and strictly ascending, thresholds that are not
///             finite or whose lower lies above its upper, wrong sizes, rms with outliers or without a codebook
///   Source    docs/numerics.md section 4; Hooper et al. 2024, "KVQuant"; Zandieh et al. 2025, "TurboQuant"
UniformCounts simulate_quantized(const TensorView& x, const TensorView& out, const QuantizeOptions& options,
                                 void* stream = nullptr);

}  // namespace kvpack
