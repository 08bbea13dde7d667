// Codebooks for simulate_quantized: the fixed ones, and those calibrated on samples by exact 1-D k-means.
#pragma once

#include <cstdint>

#include "kvpack/tensor.h"

namespace [[gnu::visibility("default")]] kvpack {

/// Bins of a histogram of normalised values: bin i covers [-1 + 2i/4096, -1 + 2(i+1)/4096), the last one 1 as well.
inline constexpr std::int64_t kHistogramBins = 4096;

/// Writes the NormalFloat codebook of 2^bits values, ascending from -1 to 1 with a 0.
///   2^(b-1) normal quantiles from p = o to 0.5 and 2^(b-1)+1 from 0.5 to 1-o, evenly spaced in p, o = 0.5*(1/32 + 1/30); each
///   half is scaled to reach -1 or 1, and the shared zero is kept once
///   Requires  codebook has room for 2^bits floats, bits 2, 3, 4, 5 or 8
///   Throws    InvalidArgument with both values
///   Source    docs/numerics.md section 4; Dettmers et al. 2023, "QLoRA"; Yoshida 2023, arXiv 2306.06965
void make_nf_codebook(std::int32_t bits, float* codebook);

/// Writes the quantiser of least squared error for a standard normal variable, symmetric and ascending: each centroid is
/// the mean of what is nearest to it (Lloyd and Max).
///   Requires  codebook has room for `levels` floats, levels 1 to 1024
///   Throws    InvalidArgument with both values
///   Source    docs/numerics.md section 4; Max 1960
void make_gaussian_codebook(std::int32_t levels, float* codebook);

/// Fits a codebook to weighted points: the exact minimum of sum w * (v - nearest centroid)^2 over all codebooks.
///   Shapes    values, weights [count], any order; weights null: all 1; points of weight 0 are left out; codebook [levels]
///   Requires  values finite; weights finite and not negative; at least `levels` different values; count * levels up to 2^26
///   Returns   the sum that was minimised
///   Throws    InvalidArgument with both values, for a bad point its place
///   Source    docs/numerics.md section 4; Wang & Song 2011, "Ckmeans.1d.dp"
double calibrate_codebook(const double* values, const double* weights, std::int64_t count, std::int32_t levels,
                          float* codebook);

/// What Q-Norm does to every centroid: centroid * scale + offset.
struct CodebookNorm {
  float scale = 1.0f;
  float offset = 0.0f;
};

/// Fits Q-Norm: afterwards the quantised points have the mean and the standard deviation of the points themselves.
///   Shapes, requirements, errors: as calibrate_codebook; also InvalidArgument when all points meet one centroid
///   Source    docs/numerics.md section 4; Hooper et al. 2024, "KVQuant"
CodebookNorm fit_codebook_norm(const double* values, const double* weights, std::int64_t count, std::int32_t levels,
                               const float* codebook);

/// How samples enter a histogram. Every pointer is host memory.
struct HistogramOptions {
  const float* lower = nullptr;            ///< [channels] calibrated minimum of each channel
  const float* upper = nullptr;            ///< [channels] calibrated maximum; equal to lower: the channel is left out
  const float* channel_weights = nullptr;  ///< [channels] finite, not negative; null: all 1
  std::int64_t protected_tokens = 0;       ///< this many first tokens of every sequence are left out
};

/// What went into a histogram.
struct HistogramCounts {
  std::int64_t counted = 0;  ///< elements in some bin
  std::int64_t outside = 0;  ///< elements beyond [-1, 1]: they would be outliers
};

/// Adds samples to a histogram: y = (x - centre) / half of the channel, as simulate_quantized normalises, with weight
/// channel weight * element weight. Values beyond [-1, 1], protected tokens and constant channels are left out.
///   Shapes    x [tokens, channels] or [batch, tokens, channels], any floating type; element_weights like x and
///             float32, or rank 0: all 1; bin_weights, bin_moments [kHistogramBins] float64, contiguous, added to: sums
///             of w and of w*y, so that a bin's mean is exact
///   Device    CPU
///   Result    the same bits for any number of threads
///   Throws    InvalidArgument with both values, for a value that is not finite its coordinate; nothing is added then
///   Source    docs/numerics.md section 4
HistogramCounts accumulate_histogram(const TensorView& x, const TensorView& element_weights,
                                     const HistogramOptions& options, const TensorView& bin_weights,
                                     const TensorView& bin_moments);

/// Linear-interpolated quantiles of every channel over all tokens of all sequences, as numpy.percentile: position
/// q * (n - 1) and interpolation in float64.
///   Shapes    x [tokens, channels] or [batch, tokens, channels]; quantiles [num_quantiles] within [0, 1];
///             out [num_quantiles, channels] float32, contiguous
///   Device    CPU
///   Throws    InvalidArgument with both values; no tokens left after the protected ones; values that are not finite
void find_channel_quantiles(const TensorView& x, const double* quantiles, std::int64_t num_quantiles,
                            std::int64_t protected_tokens, const TensorView& out);

}  // namespace kvpack
