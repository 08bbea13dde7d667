// Exact weighted k-means in one dimension: sorted points, and the two ways to cut them into clusters.
#pragma once

#include <cstdint>
#include <vector>

namespace kvpack {

/// Different values with positive weight, ascending.
struct WeightedPoints {
  std::vector<double> values;
  std::vector<double> weights;
};

/// Sorts, merges equal values and drops weight 0. Throws InvalidArgument for what no codebook can be fitted to.
WeightedPoints gather_points(const double* values, const double* weights, std::int64_t count, std::int32_t levels);

/// First point of each cluster and the sum of w * (v - mean of the cluster)^2.
struct Clusters {
  std::vector<std::int64_t> firsts;
  double error = 0.0;
};

/// The best cut into `levels` clusters, by dynamic programming with divide and conquer: O(levels * n * log n).
Clusters find_clusters(const WeightedPoints& points, std::int32_t levels);

/// The same for 1, 2, ... levels at once: the programme for many clusters passes all that have fewer.
std::vector<Clusters> find_clusters_up_to(const WeightedPoints& points, std::int32_t levels);

namespace reference {
/// The best cut by trying every cut. For tests: n over levels of them.
Clusters find_clusters(const WeightedPoints& points, std::int32_t levels);
}  // namespace reference

/// Mean of points [first, end).
double mean_of(const WeightedPoints& points, std::int64_t first, std::int64_t end);

}  // namespace kvpack
