// Every way to cut sorted points into clusters, for the proof that dynamic programming finds the best.
#include "codebook/kmeans.h"

namespace kvpack::reference {

namespace {

double error_of(const WeightedPoints& points, std::int64_t first, std::int64_t end) {
  const double mean = mean_of(points, first, end);
  double error = 0.0;
  for (auto i = static_cast<std::size_t>(first); i < static_cast<std::size_t>(end); ++i) {
    error += points.weights[i] * (points.values[i] - mean) * (points.values[i] - mean);
  }
  return error;
}

/// Tries every first point of the clusters from number `k` on; `chosen` holds those before, whose error is `so_far`.
void try_cuts(const WeightedPoints& points, std::size_t k, double so_far, std::vector<std::int64_t>& chosen,
              Clusters& best) {
  const auto n = static_cast<std::int64_t>(points.values.size());
  const auto levels = chosen.size();
  if (k == levels) {
    const double error = so_far + error_of(points, chosen[k - 1], n);
    if (best.firsts.empty() || error < best.error) best = {chosen, error};
    return;
  }
  for (std::int64_t first = chosen[k - 1] + 1; first + static_cast<std::int64_t>(levels - k) <= n; ++first) {
    chosen[k] = first;
    try_cuts(points, k + 1, so_far + error_of(points, chosen[k - 1], first), chosen, best);
  }
}

}  // namespace

Clusters find_clusters(const WeightedPoints& points, std::int32_t levels) {
  Clusters best;
  std::vector<std::int64_t> chosen(static_cast<std::size_t>(levels), 0);
  try_cuts(points, 1, 0.0, chosen, best);
  return best;
}

}  // namespace kvpack::reference
