// Exact weighted k-means in one dimension. Optimal clusters are runs of sorted points, so the best k clusters of the first
// i points are the best k-1 of the first j and one run more; the best j never falls as i grows, so halving finds all of
// them in n log n steps (Wang & Song 2011; Gronlund et al. 2017).
#include "codebook/kmeans.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/check.h"
#include "kvpack/codebook.h"
#include "quantize/codebook.h"

namespace kvpack {

namespace {

/// Sums up to each point, of which any run's error follows. Values are taken from their mean: squares of large means
/// would leave no digits for the difference.
class RunErrors {
 public:
  explicit RunErrors(const WeightedPoints& points) {
    const std::size_t n = points.values.size();
    const double centre = mean_of(points, 0, static_cast<std::int64_t>(n));
    weights_.resize(n + 1);
    moments_.resize(n + 1);
    squares_.resize(n + 1);
    for (std::size_t i = 0; i < n; ++i) {
      const double value = points.values[i] - centre;
      const double weight = points.weights[i];
      weights_[i + 1] = weights_[i] + weight;
      moments_[i + 1] = moments_[i] + weight * value;
      squares_[i + 1] = squares_[i] + weight * value * value;
    }
  }
  /// Sum of w * (v - mean)^2 over points [first, end), which are not empty.
  [[nodiscard]] double of(std::int64_t first, std::int64_t end) const {
    const auto a = static_cast<std::size_t>(first);
    const auto b = static_cast<std::size_t>(end);
    const double weight = weights_[b] - weights_[a];
    const double moment = moments_[b] - moments_[a];
    const double error = squares_[b] - squares_[a] - moment * (moment / weight);
    return error > 0.0 ? error : 0.0;
  }

 private:
  std::vector<double> weights_;
  std::vector<double> moments_;
  std::vector<double> squares_;
};

/// One row of the dynamic programme: `previous[j]` is the least error of the first j points in one cluster fewer.
struct Row {
  const RunErrors& errors;
  const std::vector<double>& previous;
  std::vector<double>& least;
  std::int32_t* cuts;  // [n + 1] where the last cluster of the first i points begins
  std::int64_t clusters;

  /// Fills ends [first, last], whose best cuts lie within [low, high].
  void fill(std::int64_t first, std::int64_t last, std::int64_t low, std::int64_t high) const {
    if (first > last) return;
    const std::int64_t end = first + (last - first) / 2;
    double best = std::numeric_limits<double>::infinity();
    std::int64_t best_cut = std::max(low, clusters - 1);
    for (std::int64_t cut = best_cut; cut <= std::min(high, end - 1); ++cut) {
      const double error = previous[static_cast<std::size_t>(cut)] + errors.of(cut, end);
      if (error < best) {
        best = error;
        best_cut = cut;
      }
    }
    least[static_cast<std::size_t>(end)] = best;
    cuts[end] = static_cast<std::int32_t>(best_cut);
    fill(first, end - 1, low, best_cut);
    fill(end + 1, last, best_cut, high);
  }
};

}  // namespace

double mean_of(const WeightedPoints& points, std::int64_t first, std::int64_t end) {
  double weight = 0.0;
  double moment = 0.0;
  for (auto i = static_cast<std::size_t>(first); i < static_cast<std::size_t>(end); ++i) {
    weight += points.weights[i];
    moment += points.weights[i] * points.values[i];
  }
  // Rounding may carry the mean past the last value of a run of few points.
  return std::clamp(moment / weight, points.values[static_cast<std::size_t>(first)],
                    points.values[static_cast<std::size_t>(end - 1)]);
}

WeightedPoints gather_points(const double* values, const double* weights, std::int64_t count, std::int32_t levels) {
  require(levels >= 1 && levels <= kMaxCentroids, "levels is ", levels, "; it is 1 to ", kMaxCentroids);
  require(count >= 0 && (values != nullptr || count == 0), "values is a null pointer for ", count, " points");
  std::vector<std::int64_t> order;
  for (std::int64_t i = 0; i < count; ++i) {
    const double weight = weights == nullptr ? 1.0 : weights[i];
    require(std::isfinite(values[i]), "values[", i, "] is ", values[i], "; values are finite");
    require(std::isfinite(weight) && weight >= 0.0, "weights[", i, "] is ", weight,
            "; weights are finite and at least 0");
    if (weight > 0.0) order.push_back(i);
  }
  std::sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) { return values[a] < values[b]; });
  WeightedPoints points;
  for (const std::int64_t i : order) {
    const double weight = weights == nullptr ? 1.0 : weights[i];
    if (!points.values.empty() && points.values.back() == values[i]) {
      points.weights.back() += weight;
    } else {
      points.values.push_back(values[i]);
      points.weights.push_back(weight);
    }
  }
  const auto different = static_cast<std::int64_t>(points.values.size());
  require(different >= levels, "there are ", different, " different values of positive weight among ", count,
          " points; ", levels, " centroids need at least ", levels);
  constexpr std::int64_t kMostCells = std::int64_t{1} << 26;
  require(different * levels <= kMostCells, different, " different values times ", levels, " centroids is ",
          different * levels, "; at most ", kMostCells, " is possible: make a histogram of them");
  return points;
}

namespace {

/// Follows the cuts back from the last point.
Clusters trace_cuts(const std::vector<std::int32_t>& cuts, std::int64_t points, std::int32_t levels, double error) {
  Clusters clusters;
  clusters.error = error;
  clusters.firsts.resize(static_cast<std::size_t>(levels));
  std::int64_t end = points;
  for (std::int32_t k = levels; k >= 1; --k) {
    end = cuts[static_cast<std::size_t>((k - 1) * (points + 1) + end)];
    clusters.firsts[static_cast<std::size_t>(k - 1)] = end;
  }
  return clusters;
}

/// The dynamic programme: calls done(k, cuts, error) after the row of k clusters, k = 1 .. levels.
template <typename Done>
void cut_points(const WeightedPoints& points, std::int32_t levels, Done&& done) {
  const auto n = static_cast<std::int64_t>(points.values.size());
  const RunErrors errors(points);
  const auto row_size = static_cast<std::size_t>(n + 1);
  std::vector<double> previous(row_size, std::numeric_limits<double>::infinity());
  for (std::int64_t end = 1; end <= n; ++end) previous[static_cast<std::size_t>(end)] = errors.of(0, end);
  std::vector<std::int32_t> cuts(row_size * static_cast<std::size_t>(levels), 0);
  done(1, cuts, previous.back());
  for (std::int32_t k = 2; k <= levels; ++k) {
    std::vector<double> least(row_size, std::numeric_limits<double>::infinity());
    const Row row{errors, previous, least, cuts.data() + static_cast<std::size_t>(k - 1) * row_size, k};
    row.fill(k, n, k - 1, n - 1);
    previous.swap(least);
    done(k, cuts, previous.back());
  }
}

}  // namespace

Clusters find_clusters(const WeightedPoints& points, std::int32_t levels) {
  const auto n = static_cast<std::int64_t>(points.values.size());
  Clusters clusters;
  cut_points(points, levels, [&](std::int32_t k, const std::vector<std::int32_t>& cuts, double error) {
    if (k == levels) clusters = trace_cuts(cuts, n, k, error);
  });
  return clusters;
}

std::vector<Clusters> find_clusters_up_to(const WeightedPoints& points, std::int32_t levels) {
  const auto n = static_cast<std::int64_t>(points.values.size());
  std::vector<Clusters> all;
  cut_points(points, levels, [&](std::int32_t k, const std::vector<std::int32_t>& cuts, double error) {
    all.push_back(trace_cuts(cuts, n, k, error));
  });
  return all;
}

double calibrate_codebook(const double* values, const double* weights, std::int64_t count, std::int32_t levels,
                          float* codebook) {
  require(codebook != nullptr, "codebook is a null pointer");
  const WeightedPoints points = gather_points(values, weights, count, levels);
  const Clusters clusters = find_clusters(points, levels);
  std::vector<float> centroids(static_cast<std::size_t>(levels));
  for (std::size_t k = 0; k < centroids.size(); ++k) {
    const std::int64_t end =
        k + 1 < centroids.size() ? clusters.firsts[k + 1] : static_cast<std::int64_t>(points.values.size());
    centroids[k] = static_cast<float>(mean_of(points, clusters.firsts[k], end));
    require(k == 0 || centroids[k - 1] < centroids[k], "centroids ", k > 0 ? k - 1 : 0, " and ", k, " are both ",
            centroids[k], " in float32: the values lie too close for ", levels, " centroids");
  }
  std::copy(centroids.begin(), centroids.end(), codebook);
  return clusters.error;
}

CodebookNorm fit_codebook_norm(const double* values, const double* weights, std::int64_t count, std::int32_t levels,
                               const float* codebook) {
  require(codebook != nullptr, "codebook is a null pointer");
  const WeightedPoints points = gather_points(values, weights, count, 1);
  require(levels >= 1 && levels <= kMaxCentroids, "levels is ", levels, "; it is 1 to ", kMaxCentroids);
  for (std::int32_t k = 0; k < levels; ++k) {
    require(std::isfinite(codebook[k]) && (k == 0 || codebook[k - 1] < codebook[k]), "codebook[", k, "] is ",
            codebook[k], "; centroids are finite and ascend strictly");
  }
  WeightedPoints quantized = points;
  std::int32_t k = 0;
  for (double& value : quantized.values) {
    while (k + 1 < levels && std::fabs(value - static_cast<double>(codebook[k + 1])) <
                                 std::fabs(value - static_cast<double>(codebook[k]))) {
      ++k;
    }
    value = static_cast<double>(codebook[k]);
  }
  const auto n = static_cast<std::int64_t>(points.values.size());
  const auto deviation = [n](const WeightedPoints& of, double mean) {
    double weight = 0.0;
    double squares = 0.0;
    for (std::size_t i = 0; i < static_cast<std::size_t>(n); ++i) {
      weight += of.weights[i];
      squares += of.weights[i] * (of.values[i] - mean) * (of.values[i] - mean);
    }
    return std::sqrt(squares / weight);
  };
  const double mean = mean_of(points, 0, n);
  const double quantized_mean = mean_of(quantized, 0, n);
  const double spread = deviation(quantized, quantized_mean);
  require(spread > 0.0, "all ", n, " different values meet the centroid ", quantized.values.front(),
          "; Q-Norm needs two centroids in use");
  const double scale = deviation(points, mean) / spread;
  return {static_cast<float>(scale), static_cast<float>(mean - quantized_mean * scale)};
}

}  // namespace kvpack
