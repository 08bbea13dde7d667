// What every implementation of the histogram receives, and the list of them.
#pragma once

#include <cstdint>

#include "kvpack/codebook.h"

namespace kvpack {

/// How one channel is normalised, in the arithmetic of quantize/codebook.h.
struct ChannelScale {
  float centre;
  float half;  // 0: the channel is left out
  float weight;
};

/// One sequence without its protected tokens, after all checks.
struct HistogramProblem {
  const void* x = nullptr;  // [tokens, channels]
  DType dtype = DType::kFloat32;
  std::int64_t tokens = 0;
  std::int64_t channels = 0;
  std::int64_t x_token_stride = 0;  // elements
  std::int64_t x_channel_stride = 1;
  const float* element_weights = nullptr;  // [tokens, channels], or null
  std::int64_t weights_token_stride = 0;
  std::int64_t weights_channel_stride = 1;
  const ChannelScale* scales = nullptr;  // [channels]
  double* bin_weights = nullptr;         // [kHistogramBins], added to
  double* bin_moments = nullptr;
};

using HistogramFunction = HistogramCounts (*)(const HistogramProblem&);

namespace reference {
HistogramCounts accumulate_histogram(const HistogramProblem& problem);
}

}  // namespace kvpack
