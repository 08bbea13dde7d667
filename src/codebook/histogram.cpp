// The histogram in slices of tokens that do not depend on the number of threads, added up in order: what all
// implementations share.
#include <algorithm>
#include <vector>

#include "codebook/implementations.h"
#include "core/parallel.h"

namespace kvpack {

namespace {

constexpr std::int64_t kSliceTokens = 2048;  // a slice's bins are 64 KiB: few enough slices to add up

struct Slice {
  std::vector<double> weights = std::vector<double>(kHistogramBins);
  std::vector<double> moments = std::vector<double>(kHistogramBins);
  HistogramCounts counts;
};

}  // namespace

HistogramCounts accumulate_slices(const HistogramProblem& problem, AccumulateTokens* accumulate) {
  const std::int64_t num_slices = (problem.tokens + kSliceTokens - 1) / kSliceTokens;
  std::vector<Slice> slices(static_cast<std::size_t>(num_slices));
  auto task = [&](std::int64_t i) {
    Slice& slice = slices[static_cast<std::size_t>(i)];
    const std::int64_t end = std::min((i + 1) * kSliceTokens, problem.tokens);
    accumulate(problem, i * kSliceTokens, end, {slice.weights.data(), slice.moments.data(), &slice.counts});
  };
  parallel_for(num_slices, task);
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

}  // namespace kvpack
