// The histogram in the SIMD vocabulary: a row is widened, normalised and placed lane by lane; then its values go into the
// bins one after another, in the order of the reference, since neighbours may meet in one bin. Compiled once per
// instruction set by histogram_cpu.cpp.
//
//   row x   ->  y = (x - centre) / half   ->  place = (y + 1) * 2048      vectors
//                                             bins[place] += weight       one by one

namespace kvpack::KVPACK_ISA {
namespace {

/// The channels' scales side by side, and one row: [channels] each.
struct HistogramRow {
  float* centre;
  float* half;
  float* weight;
  float* y;
  float* place;
};

inline HistogramRow make_row(const HistogramProblem& problem) {
  float* memory = thread_scratch(5 * problem.channels);
  const std::int64_t n = problem.channels;
  const HistogramRow row{memory, memory + n, memory + 2 * n, memory + 3 * n, memory + 4 * n};
  for (std::int64_t c = 0; c < n; ++c) {
    row.centre[c] = problem.scales[c].centre;
    row.half[c] = problem.scales[c].half;
    row.weight[c] = problem.scales[c].weight;
  }
  return row;
}

/// Normalises one token. Channels without a half range get values that nobody reads.
template <typename T>
inline void place_row(const T* x, const HistogramProblem& problem, const HistogramRow& row) {
  constexpr float kBinsPerUnit = static_cast<float>(kHistogramBins / 2);
  std::int64_t c = 0;
  if (problem.x_channel_stride == 1) {
    for (; c + kLanes <= problem.channels; c += kLanes) {
      const F32 y = div(sub(load(x + c), load(row.centre + c)), load(row.half + c));
      store(row.y + c, y);
      store(row.place + c, mul(add(y, set1(1.0f)), set1(kBinsPerUnit)));
    }
  }
  for (; c < problem.channels; ++c) {
    row.y[c] = (to_float(x[c * problem.x_channel_stride]) - row.centre[c]) / row.half[c];
    row.place[c] = (row.y[c] + 1.0f) * kBinsPerUnit;
  }
}

/// Puts one token into the bins.
template <bool kWeighted>
inline void count_row(const float* weights, const HistogramProblem& problem, const HistogramRow& row,
                      HistogramBins bins) {
  for (std::int64_t c = 0; c < problem.channels; ++c) {
    if (row.half[c] == 0.0f) continue;
    const float y = row.y[c];
    if (!(y >= -1.0f && y <= 1.0f)) {
      ++bins.counts->outside;
      continue;
    }
    const auto place = static_cast<std::int32_t>(row.place[c]);
    const std::int32_t bin = place < kHistogramBins ? place : static_cast<std::int32_t>(kHistogramBins) - 1;
    double weight = static_cast<double>(row.weight[c]);
    if constexpr (kWeighted) weight *= static_cast<double>(weights[c * problem.weights_channel_stride]);
    bins.weights[bin] += weight;
    bins.moments[bin] += weight * static_cast<double>(y);
    ++bins.counts->counted;
  }
}

void accumulate_tokens(const HistogramProblem& problem, std::int64_t first, std::int64_t end, HistogramBins bins) {
  const HistogramRow row = make_row(problem);
  with_float_type(problem.dtype, [&]<typename T>() {
    for (std::int64_t t = first; t < end; ++t) {
      place_row(static_cast<const T*>(problem.x) + t * problem.x_token_stride, problem, row);
      if (problem.element_weights == nullptr) {
        count_row<false>(nullptr, problem, row, bins);
      } else {
        count_row<true>(problem.element_weights + t * problem.weights_token_stride, problem, row, bins);
      }
    }
  });
}

}  // namespace

HistogramCounts accumulate_histogram(const HistogramProblem& problem) {
  return accumulate_slices(problem, accumulate_tokens);
}

}  // namespace kvpack::KVPACK_ISA
