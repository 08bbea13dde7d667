// The histogram of normalised values: tokens in slices that do not depend on the number of threads, added up in order.
#include <algorithm>
#include <vector>

#include "codebook/implementations.h"
#include "core/divide_up.h"
#include "core/half.h"
#include "core/parallel.h"
#include "core/with_type.h"

namespace kvpack::reference {

namespace {

constexpr std::int64_t kSliceTokens = 2048;  // a slice's bins are 64 KiB: few enough slices to add up

struct Slice {
  std::vector<double> weights = std::vector<double>(kHistogramBins);
  std::vector<double> moments = std::vector<double>(kHistogramBins);
  HistogramCounts counts;
};

template <typename T>
void accumulate(const HistogramProblem& problem, std::int64_t first, std::int64_t end, Slice& slice) {
  constexpr float kBinsPerUnit = static_cast<float>(kHistogramBins / 2);
  for (std::int64_t t = first; t < end; ++t) {
    const T* x = static_cast<const T*>(problem.x) + t * problem.x_token_stride;
    const float* weights = problem.element_weights + t * problem.weights_token_stride;
    for (std::int64_t c = 0; c < problem.channels; ++c) {
      const ChannelScale& scale = problem.scales[c];
      if (scale.half == 0.0f) continue;
      const float y = (to_float(x[c * problem.x_channel_stride]) - scale.centre) / scale.half;
      if (!(y >= -1.0f && y <= 1.0f)) {
        ++slice.counts.outside;
        continue;
      }
      // (y + 1) * 2048 is exact but for y + 1, whose rounding moves a value by one bin at most, never its moment.
      const auto bin = std::min(static_cast<std::size_t>((y + 1.0f) * kBinsPerUnit), std::size_t{kHistogramBins - 1});
      const float element = problem.element_weights == nullptr ? 1.0f : weights[c * problem.weights_channel_stride];
      const double weight = static_cast<double>(scale.weight) * static_cast<double>(element);
      slice.weights[bin] += weight;
      slice.moments[bin] += weight * static_cast<double>(y);
      ++slice.counts.counted;
    }
  }
}

}  // namespace

HistogramCounts accumulate_histogram(const HistogramProblem& problem) {
  const std::int64_t num_slices = divide_up(problem.tokens, kSliceTokens);
  std::vector<Slice> slices(static_cast<std::size_t>(num_slices));
  with_float_type(problem.dtype, [&]<typename T>() {
    auto task = [&](std::int64_t i) {
      accumulate<T>(problem, i * kSliceTokens, std::min((i + 1) * kSliceTokens, problem.tokens),
                    slices[static_cast<std::size_t>(i)]);
    };
    parallel_for(num_slices, task);
  });
  HistogramCounts counts;
  for (const Slice& slice : slices) {
    for (std::size_t bin = 0; bin < slice.weights.size(); ++bin) {
      problem.bin_weights[bin] += slice.weights[bin];
      problem.bin_moments[bin] += slice.moments[bin];
    }
    counts.counted += slice.counts.counted;
    counts.outside += slice.counts.outside;
  }
  return counts;
}

}  // namespace kvpack::reference
