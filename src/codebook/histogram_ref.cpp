// Reference of the histogram of normalised values: one value after another.
#include <algorithm>

#include "codebook/implementations.h"
#include "core/half.h"
#include "core/with_type.h"

namespace kvpack::reference {

namespace {

void accumulate_tokens(const HistogramProblem& problem, std::int64_t first, std::int64_t end, HistogramBins bins) {
  constexpr float kBinsPerUnit = static_cast<float>(kHistogramBins / 2);
  with_float_type(problem.dtype, [&]<typename T>() {
    for (std::int64_t t = first; t < end; ++t) {
      const T* x = static_cast<const T*>(problem.x) + t * problem.x_token_stride;
      const float* weights = problem.element_weights + t * problem.weights_token_stride;
      for (std::int64_t c = 0; c < problem.channels; ++c) {
        const ChannelScale& scale = problem.scales[c];
        if (scale.half == 0.0f) continue;
        const float y = (to_float(x[c * problem.x_channel_stride]) - scale.centre) / scale.half;
        if (!(y >= -1.0f && y <= 1.0f)) {
          ++bins.counts->outside;
          continue;
        }
        // (y + 1) * 2048 is exact but for y + 1, whose rounding moves a value by one bin at most, never its moment.
        const auto bin = std::min(static_cast<std::size_t>((y + 1.0f) * kBinsPerUnit), std::size_t{kHistogramBins - 1});
        const float element = problem.element_weights == nullptr ? 1.0f : weights[c * problem.weights_channel_stride];
        const double weight = static_cast<double>(scale.weight) * static_cast<double>(element);
        bins.weights[bin] += weight;
        bins.moments[bin] += weight * static_cast<double>(y);
        ++bins.counts->counted;
      }
    }
  });
}

}  // namespace

HistogramCounts accumulate_histogram(const HistogramProblem& problem) {
  return accumulate_slices(problem, accumulate_tokens);
}

}  // namespace kvpack::reference
