// The case table of simulated uniform quantisation: shapes around every tile and vector size, groups, strides, types; and
// the comparison with the reference.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "kvpack/kvpack.h"
#include "support/compare.h"
#include "support/matrix.h"

namespace kvpack::test {

struct UniformCase {
  const char* name;  // why it is here
  std::int64_t tokens;
  std::int64_t channels;
  Fill fill = Fill::kNormal;
  DType dtype = DType::kFloat32;
  Layout layout = {};
  UniformOptions options = {};
};

inline std::string describe(const UniformCase& c) {
  return std::string(c.name) + ", " + name_of(c.fill) + ", " + kvpack::name_of(c.dtype) + ", bits " +
         std::to_string(c.options.bits) + ", axis " + std::to_string(static_cast<int>(c.options.axis)) + ", group " +
         std::to_string(c.options.group) + ", outliers " + std::to_string(c.options.outlier_fraction) + ", compat " +
         std::to_string(c.options.compat) + ", offset " + std::to_string(static_cast<int>(c.options.offset));
}

inline UniformOptions uniform_options(std::int32_t bits, double outliers = 0.0, std::int64_t group = 0,
                                      std::int64_t protected_tokens = 0, Causality causality = Causality::kOracle) {
  UniformOptions options;
  options.bits = bits;
  options.outlier_fraction = outliers;
  options.group = group;
  options.protected_tokens = protected_tokens;
  options.causality = causality;
  return options;
}

inline const std::vector<UniformCase>& uniform_cases() {
  constexpr Fill kNormal = Fill::kNormal;
  constexpr DType kF32 = DType::kFloat32;
  static const std::vector<UniformCase> cases{
      {"no token", 0, 64},
      {"one element", 1, 1},
      {"one token", 1, 192, kNormal, kF32, {}, uniform_options(4, 0.01)},
      {"one channel", 130, 1, kNormal, kF32, {}, uniform_options(4, 0.01)},
      {"below a vector", 31, 15, kNormal, kF32, {}, uniform_options(3, 0.1)},
      {"one above a vector", 33, 17, kNormal, kF32, {}, uniform_options(3, 0.1)},
      {"one below a tile", 65, 63, kNormal, kF32, {}, uniform_options(2)},
      {"a tile", 64, 64, kNormal, kF32, {}, uniform_options(2, 0.01)},
      {"one above a tile", 63, 65, kNormal, kF32, {}, uniform_options(8, 0.01)},
      {"several tiles and tasks", 700, 200, kNormal, kF32, {}, uniform_options(4)},
      {"several tiles and tasks with outliers", 700, 200, kNormal, kF32, {}, uniform_options(4, 0.01)},
      {"long vectors, tails of many", 2500, 40, kNormal, kF32, {}, uniform_options(4, 0.02)},
      {"wide rows", 3, 4000, kNormal, kF32, {}, uniform_options(4, 0.02)},
      {"long tails: selection instead", 200, 48, kNormal, kF32, {}, uniform_options(4, 0.5)},
      {"drifting channels overflow the lists", 2000, 32, Fill::kDrift, kF32, {}, uniform_options(4, 0.01)},
      {"groups of 32", 100, 80, kNormal, kF32, {}, uniform_options(2, 0.0, 32)},
      {"groups of 32 with outliers", 100, 80, kNormal, kF32, {}, uniform_options(2, 0.1, 32)},
      {"groups of one", 5, 7, kNormal, kF32, {}, uniform_options(2, 0.0, 1)},
      {"group larger than the vector", 20, 24, kNormal, kF32, {}, uniform_options(2, 0.0, 1000)},
      {"protected tokens", 90, 70, kNormal, kF32, {}, uniform_options(4, 0.01, 0, 4)},
      {"protected tokens eat a group", 90, 70, kNormal, kF32, {}, uniform_options(4, 0.0, 32, 33)},
      {"all protected", 9, 70, kNormal, kF32, {}, uniform_options(4, 0.0, 0, 9)},
      {"causal", 200, 70, kNormal, kF32, {}, uniform_options(4, 0.0, 0, 0, Causality::kCausal)},
      {"causal, group 32, protected", 200, 70, kNormal, kF32, {}, uniform_options(4, 0.1, 32, 5, Causality::kCausal)},
      {"causal without a complete group", 63, 70, kNormal, kF32, {}, uniform_options(4, 0.0, 0, 0, Causality::kCausal)},
      {"float16", 130, 72, kNormal, DType::kFloat16, {}, uniform_options(4, 0.01)},
      {"bfloat16", 130, 72, kNormal, DType::kBFloat16, {}, uniform_options(4, 0.01)},
      {"float64", 130, 72, kNormal, DType::kFloat64, {}, uniform_options(4, 0.01)},
      {"float64 constant vectors", 40, 72, Fill::kConstant, DType::kFloat64, {}, uniform_options(4)},
      {"padded rows, unaligned", 70, 72, kNormal, kF32, {1, 5, 1}, uniform_options(4, 0.01)},
      {"strided channels", 70, 72, kNormal, kF32, {2, 3, 1}, uniform_options(4, 0.01)},
      {"strided channels, float16", 70, 72, kNormal, DType::kFloat16, {3, 0, 1}, uniform_options(4, 0.0, 0, 2)},
  };
  return cases;
}

/// Runs simulate(x, out), which returns UniformCounts, on the reference and on an implementation, apart and in place:
/// bits, counts and what lies around must be the same.
template <typename Simulate>
void expect_equal_to_reference(const UniformCase& c, const std::string& implementation, Simulate simulate) {
  Matrix x(c.tokens, c.channels, c.dtype, c.layout);
  x.fill(c.fill, kSeed);
  Matrix expected(c.tokens, c.channels, c.dtype);
  Matrix actual(c.tokens, c.channels, c.dtype, c.layout);
  force_implementation("reference");
  const UniformCounts expected_counts = simulate(x.view(), expected.view());
  force_implementation(implementation);
  const UniformCounts counts = simulate(x.view(), actual.view());
  EXPECT_EQ(last_implementation(), implementation);
  EXPECT_TRUE(same_bits(expected, actual));
  EXPECT_TRUE(actual.guards_are_intact());
  EXPECT_EQ(counts.quantized, expected_counts.quantized);
  EXPECT_EQ(counts.vectors, expected_counts.vectors);
  EXPECT_EQ(counts.outliers, expected_counts.outliers);
  Matrix in_place(c.tokens, c.channels, c.dtype, c.layout);
  in_place.copy_from(x);
  simulate(in_place.view(), in_place.view());
  EXPECT_TRUE(same_bits(expected, in_place)) << "in place";
}

}  // namespace kvpack::test
