// Tables of transform-coded rows with made-up numbers, owned.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "kvpack/klt.h"

namespace kvpack::test {

/// A table whose basis is no orthogonal one: a wrong index or order of sums shows.
class OwnedKltTable {
 public:
  OwnedKltTable(std::int64_t channels, std::vector<std::int32_t> levels, std::uint32_t seed,
                std::int64_t row_alignment = 2)
      : levels_(std::move(levels)), channels_(channels), row_alignment_(row_alignment) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const auto coefficients = static_cast<std::int64_t>(levels_.size());
    std::int64_t coded = 0;
    for (const std::int32_t levels_of_one : levels_) {
      if (levels_of_one == 1) continue;
      ++coded;
      std::vector<float> codebook;
      float value = -0.3f * static_cast<float>(levels_of_one) * (0.6f + 0.1f * std::fabs(normal(random)));
      for (std::int32_t i = 0; i < levels_of_one; ++i) {
        value += 0.05f + 1.2f / static_cast<float>(levels_of_one) * std::fabs(normal(random));
        codebook.push_back(value);
      }
      centroids.insert(centroids.end(), codebook.begin(), codebook.end());
    }
    const float size = 1.0f / std::sqrt(static_cast<float>(channels));
    for (std::int64_t i = 0; i < channels; ++i) mean.push_back(normal(random));
    for (std::int64_t i = 0; i < channels * coefficients; ++i) analysis.push_back(normal(random) * size);
    for (std::int64_t i = 0; i < channels * coded; ++i) synthesis.push_back(normal(random) * size);
    for (std::int64_t i = 0; i < coefficients; ++i) in_scale.push_back(i % 5 != 3);
    coded_ = coded;
  }

  [[nodiscard]] KltTable view() {
    KltTable table;
    table.channels = channels_;
    table.coefficients = static_cast<std::int64_t>(levels_.size());
    table.row_alignment = row_alignment_;
    table.levels = levels_.data();
    table.mean = make_view(mean.data(), DType::kFloat32, {channels_});
    table.analysis = make_view(analysis.data(), DType::kFloat32, {channels_, table.coefficients});
    table.synthesis = make_view(synthesis.data(), DType::kFloat32, {coded_, channels_});
    table.in_scale = make_view(in_scale.data(), DType::kInt32, {table.coefficients});
    table.centroids = make_view(centroids.data(), DType::kFloat32, {static_cast<std::int64_t>(centroids.size())});
    return table;
  }
  [[nodiscard]] std::int64_t row_bytes() const {
    return klt_row_bytes(levels_.data(), static_cast<std::int64_t>(levels_.size()), row_alignment_);
  }

  std::vector<float> mean, analysis, synthesis, centroids;
  std::vector<std::int32_t> in_scale;

 private:
  std::vector<std::int32_t> levels_;
  std::int64_t channels_;
  std::int64_t row_alignment_;
  std::int64_t coded_ = 0;
};

/// One combination of sizes, shared by tests of every implementation.
struct KltCase {
  const char* name;
  std::int64_t channels;
  std::vector<std::int32_t> levels;
};

/// `count` coefficients of all numbers of levels, about as many of each.
inline std::vector<std::int32_t> mixed_levels(std::int64_t count, std::int64_t dropped) {
  std::vector<std::int32_t> levels;
  for (std::int64_t k = 0; k < count; ++k) levels.push_back(kKltLevels[k * kNumKltLevels / count]);
  levels.insert(levels.end(), static_cast<std::size_t>(dropped), 1);
  return levels;
}

inline const std::vector<KltCase>& klt_cases() {
  static const std::vector<KltCase> cases{
      {"nothing coded", 16, {}},
      {"scale alone", 8, {1, 1, 1}},
      {"one bit", 1, {2}},
      {"one trit", 3, {3}},
      {"all kinds once", 33, mixed_levels(13, 0)},
      {"two of each, dropped behind", 40, mixed_levels(26, 7)},
      {"a head", 64, mixed_levels(41, 9)},
      {"SmolLM2's three heads", 192, mixed_levels(131, 20)},
      {"full groups of digits", 48, {7, 7, 7, 7, 7, 7, 5, 5, 5, 3, 3, 3, 3, 3}},
      {"trits alone", 80, std::vector<std::int32_t>(80, 3)},
      {"one more than a vector of coefficients", 17, std::vector<std::int32_t>(17, 4)},
      {"more channels than a block of products", 300, mixed_levels(270, 3)},
  };
  return cases;
}

}  // namespace kvpack::test
