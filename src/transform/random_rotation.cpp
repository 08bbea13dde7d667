// A random orthogonal matrix that is the same on every machine: integers for randomness, IEEE arithmetic for the rest.
#include <cmath>
#include <vector>

#include "core/check.h"
#include "transform/implementations.h"

namespace kvpack {

namespace {

/// SplitMix64 (Steele, Lea & Flood 2014).
struct SplitMix64 {
  std::uint64_t state;
  std::uint64_t next() {
    state += 0x9e3779b97f4a7c15u;
    std::uint64_t z = state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  /// Nearly normal: the sum of twelve uniform numbers has variance 1. No logarithm, whose last bit libraries disagree on.
  double normal() {
    std::int64_t sum = 0;
    for (int i = 0; i < 12; ++i) sum += static_cast<std::int64_t>(next() >> 32);
    return static_cast<double>(sum) * 0x1p-32 - 6.0;
  }
};

double dot(const double* a, const double* b, std::int64_t count) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

}  // namespace

void make_random_rotation(std::uint64_t seed, const TensorView& rotation) {
  require(rotation.rank == 2 && rotation.shape[0] == rotation.shape[1] && rotation.shape[0] >= 1 &&
              rotation.shape[0] <= kMaxRotatedHead,
          "rotation has shape ", shape_text(rotation), "; it is [head_dim, head_dim] with head_dim 1 to ",
          kMaxRotatedHead);
  const std::int64_t dim = rotation.shape[0];
  require_exact(rotation, {"rotation"}, DType::kFloat32, {dim, dim}, Device{});
  SplitMix64 random{seed};
  std::vector<double> rows(static_cast<std::size_t>(dim * dim));
  for (std::int64_t i = 0; i < dim; ++i) {
    double* row = rows.data() + i * dim;
    double kept = 0.0;
    // A row that nearly lies among those before it would lose its digits: draw another.
    while (kept < 1e-3) {
      for (std::int64_t j = 0; j < dim; ++j) row[j] = random.normal();
      const double drawn = std::sqrt(dot(row, row, dim));
      for (int pass = 0; pass < 2; ++pass) {
        for (std::int64_t k = 0; k < i; ++k) {
          const double* other = rows.data() + k * dim;
          const double share = dot(row, other, dim);
          for (std::int64_t j = 0; j < dim; ++j) row[j] -= share * other[j];
        }
      }
      const double norm = std::sqrt(dot(row, row, dim));
      kept = drawn > 0.0 ? norm / drawn : 0.0;
      for (std::int64_t j = 0; j < dim && norm > 0.0; ++j) row[j] /= norm;
    }
  }
  auto* target = static_cast<float*>(rotation.data);
  for (std::size_t i = 0; i < rows.size(); ++i) target[i] = static_cast<float>(rows[i]);
}

}  // namespace kvpack
