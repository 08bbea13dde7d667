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

/// Where a slice of tokens is added to: [kHistogramBins] each.
struct HistogramBins {
  double* weights;
  double* moments;
  HistogramCounts* counts;
};

/// Adds tokens [first, end) to the bins, token by token and channel by channel: sums are rounded in this order.
using AccumulateTokens = void(const HistogramProblem& problem, std::int64_t first, std::int64_t end,
                              HistogramBins bins);

/// Runs `accumulate` on slices of tokens, in parallel, and adds the slices up in their order.
HistogramCounts accumulate_slices(const HistogramProblem& problem, AccumulateTokens* accumulate);

namespace reference {
HistogramCounts accumulate_histogram(const HistogramProblem& problem);
}
namespace scalar {
HistogramCounts accumulate_histogram(const HistogramProblem& problem);
}
namespace avx2 {
HistogramCounts accumulate_histogram(const HistogramProblem& problem);
}
namespace avx512 {
HistogramCounts accumulate_histogram(const HistogramProblem& problem);
}

}  // namespace kvpack
