// Codebooks and grids of coefficients, fitted to samples and measured on samples. The k-means itself: codebook/kmeans.h.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "codebook/kmeans.h"
#include "core/check.h"
#include "core/parallel.h"
#include "formats/klt_rows/layout.h"
#include "klt/rules.h"
#include "kvpack/klt.h"

namespace kvpack {

namespace {

/// More points cost time and change the third digit of an error: of them, so many at each end stand alone.
constexpr std::int64_t kMostPoints = 1024;
constexpr std::int64_t kTailPoints = 64;

struct Sample {
  float value;
  double weight;
};

void require_samples(const KltSamples& samples) {
  const TensorView& z = samples.z;
  require(z.rank == 2 && z.dtype == DType::kFloat32, "z is ", shape_text(z), " ", name_of(z.dtype),
          "; it is [tokens, coefficients] float32");
  require(z.device.kind == DeviceKind::kCpu, "z is on ", device_text(z.device), "; codebooks are fitted on cpu");
  require(z.shape[0] >= 1, "z has shape ", shape_text(z), "; it needs a token");
  require(z.data != nullptr || z.num_elements() == 0, "z has shape ", shape_text(z), " and no memory");
  require(samples.num_levels >= 1 && samples.levels != nullptr, "num_levels is ", samples.num_levels,
          "; it must be at least 1");
  for (std::int64_t m = 0; m < samples.num_levels; ++m) {
    const std::int32_t levels = samples.levels[m];
    require(levels == 1 || klt_rows::index_of_levels(levels) >= 0, "levels[", m, "] is ", levels,
            "; rows have no such number of levels");
    require(m == 0 || samples.levels[m - 1] < levels, "levels[", m, "] is ", levels, " after ",
            m > 0 ? samples.levels[m - 1] : 0, "; levels ascend");
  }
  for (std::int64_t t = 0; t < z.shape[0]; ++t) {
    for (std::int64_t k = 0; k < z.shape[1]; ++k) {
      const float value = static_cast<const float*>(z.data)[t * z.strides[0] + k * z.strides[1]];
      require(std::isfinite(value), "z[", t, ", ", k, "] is ", value, "; it must be finite");
    }
  }
  if (samples.weights.rank == 0) return;
  require_exact(samples.weights, {"weights"}, DType::kFloat32, {z.shape[0]}, z.device);
  double sum = 0.0;
  for (std::int64_t t = 0; t < z.shape[0]; ++t) {
    const float weight = static_cast<const float*>(samples.weights.data)[t];
    require(std::isfinite(weight) && weight >= 0.0f, "weights[", t, "] is ", weight,
            "; weights are finite and at least 0");
    sum += static_cast<double>(weight);
  }
  require(sum > 0.0, "all ", z.shape[0], " weights are 0; one sample must count");
}

std::int64_t sum_of_levels(const KltSamples& samples) {
  return std::accumulate(samples.levels, samples.levels + samples.num_levels, std::int64_t{0});
}

/// Samples of one coefficient with a weight above 0, ascending.
std::vector<Sample> sorted_samples(const KltSamples& samples, std::int64_t coefficient) {
  const TensorView& z = samples.z;
  const auto* column = static_cast<const float*>(z.data) + coefficient * z.strides[1];
  const auto* weights = samples.weights.rank == 0 ? nullptr : static_cast<const float*>(samples.weights.data);
  std::vector<Sample> sorted;
  sorted.reserve(static_cast<std::size_t>(z.shape[0]));
  for (std::int64_t t = 0; t < z.shape[0]; ++t) {
    const double weight = weights == nullptr ? 1.0 : static_cast<double>(weights[t]);
    if (weight > 0.0) sorted.push_back({column[t * z.strides[0]], weight});
  }
  // The weight decides among equal values: the same sums, whatever the sort does.
  std::sort(sorted.begin(), sorted.end(), [](const Sample& a, const Sample& b) {
    return a.value < b.value || (a.value == b.value && a.weight < b.weight);
  });
  return sorted;
}

/// Adds the samples [first, end) as one point, or to the last point if that has the same value.
void join_run(const std::vector<Sample>& sorted, std::int64_t first, std::int64_t end, WeightedPoints& points) {
  double weight = 0.0;
  double moment = 0.0;
  for (std::int64_t i = first; i < end; ++i) {
    const Sample& sample = sorted[static_cast<std::size_t>(i)];
    weight += sample.weight;
    moment += sample.weight * static_cast<double>(sample.value);
  }
  const double mean = std::clamp(moment / weight, static_cast<double>(sorted[static_cast<std::size_t>(first)].value),
                                 static_cast<double>(sorted[static_cast<std::size_t>(end - 1)].value));
  if (!points.values.empty() && points.values.back() == mean) {
    points.weights.back() += weight;
  } else {
    points.values.push_back(mean);
    points.weights.push_back(weight);
  }
}

/// Points for the fit: one for each different value, or at most kMostPoints runs.
WeightedPoints join_samples(const std::vector<Sample>& sorted) {
  WeightedPoints points;
  const auto count = static_cast<std::int64_t>(sorted.size());
  std::int64_t different = 1;
  for (std::size_t i = 1; i < sorted.size(); ++i) different += sorted[i - 1].value < sorted[i].value ? 1 : 0;
  if (different <= kMostPoints) {
    for (std::int64_t i = 0; i < count; ++i) join_run(sorted, i, i + 1, points);
    return points;
  }
  const std::int64_t runs = kMostPoints - 2 * kTailPoints;
  const std::int64_t inner = count - 2 * kTailPoints;
  for (std::int64_t i = 0; i < kTailPoints; ++i) join_run(sorted, i, i + 1, points);
  for (std::int64_t i = 0; i < runs; ++i) {
    join_run(sorted, kTailPoints + inner * i / runs, kTailPoints + inner * (i + 1) / runs, points);
  }
  for (std::int64_t i = count - kTailPoints; i < count; ++i) join_run(sorted, i, i + 1, points);
  return points;
}

/// Rounds to float32 and lets equal neighbours ascend by one place.
void write_centroids(const WeightedPoints& points, const Clusters& clusters, std::int32_t levels, float* centroids) {
  const auto used = static_cast<std::int32_t>(clusters.firsts.size());
  const auto n = static_cast<std::int64_t>(points.values.size());
  for (std::int32_t i = 0; i < levels; ++i) {
    float value = 0.0f;
    if (i < used) {
      const std::int64_t end = i + 1 < used ? clusters.firsts[static_cast<std::size_t>(i + 1)] : n;
      value = static_cast<float>(mean_of(points, clusters.firsts[static_cast<std::size_t>(i)], end));
    } else {
      value = centroids[i - 1] + std::max(1.0f, std::fabs(centroids[i - 1]));
    }
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    if (i > 0 && !(value > centroids[i - 1])) value = std::nextafter(centroids[i - 1], kInfinity);
    centroids[i] = value;
  }
}

/// Weighted mean squared error of one codebook on sorted samples, by the rule of rows.
double error_of(const std::vector<Sample>& sorted, const float* centroids, std::int32_t levels) {
  double error = 0.0;
  double weight = 0.0;
  std::int32_t code = 0;
  for (const Sample& sample : sorted) {
    while (code + 1 < levels && sample.value > klt_boundary(centroids[code], centroids[code + 1])) ++code;
    const double distance = static_cast<double>(sample.value) - static_cast<double>(centroids[code]);
    error += sample.weight * distance * distance;
    weight += sample.weight;
  }
  return error / weight;
}

}  // namespace

void calibrate_klt_codebooks(const KltSamples& samples, const TensorView& centroids, const TensorView& errors) {
  require_samples(samples);
  const std::int64_t coefficients = samples.z.shape[1];
  const std::int64_t stride = sum_of_levels(samples);
  require_exact(centroids, {"centroids"}, DType::kFloat32, {coefficients, stride}, Device{});
  require_exact(errors, {"errors"}, DType::kFloat64, {coefficients, samples.num_levels}, Device{});
  auto task = [&](std::int64_t k) {
    const std::vector<Sample> sorted = sorted_samples(samples, k);
    const WeightedPoints points = join_samples(sorted);
    const auto different = static_cast<std::int32_t>(points.values.size());
    const std::int32_t most = std::min(samples.levels[samples.num_levels - 1], different);
    const std::vector<Clusters> all = find_clusters_up_to(points, most);
    float* codebook = static_cast<float*>(centroids.data) + k * stride;
    for (std::int64_t m = 0; m < samples.num_levels; ++m) {
      const Clusters& clusters = all[static_cast<std::size_t>(std::min(samples.levels[m], most) - 1)];
      write_centroids(points, clusters, samples.levels[m], codebook);
      static_cast<double*>(errors.data)[k * samples.num_levels + m] = error_of(sorted, codebook, samples.levels[m]);
      codebook += samples.levels[m];
    }
  };
  parallel_for(coefficients, task);
}

namespace {

/// A uniform grid and its weighted squared error on points.
struct GridFit {
  double offset = 0.0;
  double step = 0.0;
  double error = std::numeric_limits<double>::infinity();
};

/// Sums over sorted points up to each one, of which those of any run follow: a round looks at cells, not at points.
struct PointSums {
  explicit PointSums(const WeightedPoints& points) : values(points.values) {
    const std::size_t n = values.size();
    weights.resize(n + 1);
    moments.resize(n + 1);
    squares.resize(n + 1);
    for (std::size_t i = 0; i < n; ++i) {
      weights[i + 1] = weights[i] + points.weights[i];
      moments[i + 1] = moments[i] + points.weights[i] * values[i];
      squares[i + 1] = squares[i] + points.weights[i] * values[i] * values[i];
    }
  }
  const std::vector<double>& values;
  std::vector<double> weights, moments, squares;
};

/// Regression of the points on the codes that `grid` gives them, and the error of `grid`; a grid that gives one code alone
/// stays as it is.
GridFit refit_grid(const PointSums& points, std::int32_t levels, const GridFit& grid) {
  double w = 0.0, c = 0.0, cc = 0.0, v = 0.0, cv = 0.0, error = 0.0;
  auto first = points.values.begin();
  for (std::int32_t i = 0; i < levels; ++i) {
    const double boundary = grid.offset + (i + 0.5) * grid.step;
    const auto end = i + 1 < levels ? std::upper_bound(first, points.values.end(), boundary) : points.values.end();
    const auto from = static_cast<std::size_t>(first - points.values.begin());
    const auto to = static_cast<std::size_t>(end - points.values.begin());
    const double weight = points.weights[to] - points.weights[from];
    const double moment = points.moments[to] - points.moments[from];
    const double centroid = grid.offset + i * grid.step;
    w += weight;
    c += weight * i;
    cc += weight * i * i;
    v += moment;
    cv += moment * i;
    error += points.squares[to] - points.squares[from] - 2.0 * centroid * moment + centroid * centroid * weight;
    first = end;
  }
  const double spread = cc - c * c / w;
  GridFit next{grid.offset, grid.step, error};
  if (spread > 1e-12 * w) {
    const double step = (cv - c * v / w) / spread;
    if (step > 0.0) next = {(v - step * c) / w, step, error};
  }
  return next;
}

/// The best of several starts, each alternated until it no longer falls.
GridFit fit_grid(const WeightedPoints& points, const PointSums& sums, std::int32_t levels) {
  const auto n = static_cast<std::int64_t>(points.values.size());
  const double mean = mean_of(points, 0, n);
  const double low = points.values.front();
  const double high = points.values.back();
  if (levels == 1 || n == 1) return {mean, levels == 1 ? 0.0 : std::max(1.0, std::fabs(mean)), 0.0};
  GridFit best;
  for (const double share : {0.15, 0.25, 0.4, 0.6, 0.8, 1.0}) {
    const double step = (high - low) * share / (levels - 1);
    GridFit grid{std::clamp(mean - step * (levels - 1) / 2.0, low, high), step};
    for (int round = 0; round < 30; ++round) {
      const GridFit next = refit_grid(sums, levels, grid);
      // refit_grid's error is that of the grid it was given.
      if (next.error < best.error) best = {grid.offset, grid.step, next.error};
      if (!(next.step > 0.0) || (next.offset == grid.offset && next.step == grid.step)) break;
      grid = next;
    }
  }
  return best;
}

}  // namespace

void calibrate_klt_grids(const KltSamples& samples, const TensorView& offsets, const TensorView& steps,
                         const TensorView& errors) {
  require_samples(samples);
  const std::int64_t coefficients = samples.z.shape[1];
  require_exact(offsets, {"offsets"}, DType::kFloat32, {coefficients, samples.num_levels}, Device{});
  require_exact(steps, {"steps"}, DType::kFloat32, {coefficients, samples.num_levels}, Device{});
  require_exact(errors, {"errors"}, DType::kFloat64, {coefficients, samples.num_levels}, Device{});
  auto task = [&](std::int64_t k) {
    const std::vector<Sample> sorted = sorted_samples(samples, k);
    const WeightedPoints points = join_samples(sorted);
    const PointSums sums(points);
    for (std::int64_t m = 0; m < samples.num_levels; ++m) {
      const std::int32_t levels = samples.levels[m];
      const GridFit grid = fit_grid(points, sums, levels);
      const std::int64_t place = k * samples.num_levels + m;
      const auto offset = static_cast<float>(grid.offset);
      const auto step = static_cast<float>(grid.step);
      static_cast<float*>(offsets.data)[place] = offset;
      static_cast<float*>(steps.data)[place] = step;
      std::array<float, kKltLevels[0]> centroids{};
      for (std::int32_t i = 0; i < levels; ++i) {
        centroids[static_cast<std::size_t>(i)] = offset + static_cast<float>(i) * step;
      }
      static_cast<double*>(errors.data)[place] = error_of(sorted, centroids.data(), levels);
    }
  };
  parallel_for(coefficients, task);
}

void measure_klt_errors(const KltSamples& samples, const TensorView& centroids, const TensorView& errors) {
  require_samples(samples);
  const std::int64_t coefficients = samples.z.shape[1];
  const std::int64_t stride = sum_of_levels(samples);
  require_exact(centroids, {"centroids"}, DType::kFloat32, {coefficients, stride}, Device{});
  require_exact(errors, {"errors"}, DType::kFloat64, {coefficients, samples.num_levels}, Device{});
  const auto* all = static_cast<const float*>(centroids.data);
  for (std::int64_t k = 0; k < coefficients; ++k) {
    const float* codebook = all + k * stride;
    for (std::int64_t m = 0; m < samples.num_levels; ++m) {
      for (std::int32_t i = 0; i < samples.levels[m]; ++i) {
        require(std::isfinite(codebook[i]) && (i == 0 || codebook[i - 1] < codebook[i]), "centroid ", i,
                " of coefficient ", k, " with ", samples.levels[m], " levels is ", codebook[i],
                "; centroids are finite and ascend strictly");
      }
      codebook += samples.levels[m];
    }
  }
  auto task = [&](std::int64_t k) {
    const std::vector<Sample> sorted = sorted_samples(samples, k);
    const float* codebook = all + k * stride;
    for (std::int64_t m = 0; m < samples.num_levels; ++m) {
      static_cast<double*>(errors.data)[k * samples.num_levels + m] = error_of(sorted, codebook, samples.levels[m]);
      codebook += samples.levels[m];
    }
  };
  parallel_for(coefficients, task);
}

}  // namespace kvpack
