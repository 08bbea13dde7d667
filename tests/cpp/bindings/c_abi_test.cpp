// The C interface: error numbers and texts, null pointers, and structures that lie as Python mirrors them.
#include "kvpack/c_abi.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <string>

#include "kvpack/version.h"

namespace {

kvpack_tensor tensor_of(float* data, std::int64_t tokens, std::int64_t channels) {
  return {data, 2, 0, 0, 2, {tokens, channels, 0, 0}, {channels, 1, 0, 0}};
}

TEST(CAbi, RunsAnOperationAndCounts) {
  float data[] = {1, -4, 2, 3};
  const kvpack_tensor x = tensor_of(data, 1, 4);
  const kvpack_prune_options options{0.5, 0, 0, 4, 0, nullptr};
  kvpack_prune_counts counts{};
  ASSERT_EQ(kvpack_prune_magnitude(&x, &x, &options, &counts, nullptr), KVPACK_OK) << kvpack_last_error();
  EXPECT_EQ(counts.kept, 2);
  EXPECT_EQ(data[0], 0.0f);
  EXPECT_EQ(data[1], -4.0f);
}

TEST(CAbi, TurnsExceptionsIntoNumbersAndKeepsTheirText) {
  float data[4] = {};
  kvpack_tensor x = tensor_of(data, 2, 2);
  kvpack_uniform_options options{};
  options.bits = 7;
  EXPECT_EQ(kvpack_simulate_uniform(&x, &x, &options, nullptr, nullptr), KVPACK_INVALID_ARGUMENT);
  EXPECT_NE(std::string(kvpack_last_error()).find("bits is 7"), std::string::npos);
  EXPECT_EQ(kvpack_simulate_uniform(nullptr, &x, &options, nullptr, nullptr), KVPACK_INVALID_ARGUMENT);
  EXPECT_EQ(kvpack_simulate_uniform(&x, &x, nullptr, nullptr, nullptr), KVPACK_INVALID_ARGUMENT);
  x.rank = 9;
  EXPECT_EQ(kvpack_simulate_uniform(&x, &x, &options, nullptr, nullptr), KVPACK_INVALID_ARGUMENT);
}

TEST(CAbi, AnswersInText) {
  const char* text = nullptr;
  ASSERT_EQ(kvpack_list_implementations(&text), KVPACK_OK);
  EXPECT_EQ(text[0], '[');
  ASSERT_EQ(kvpack_explain("simulate_uniform", 0, &text), KVPACK_OK);
  EXPECT_NE(std::string(text).find("simulate_uniform on cpu runs"), std::string::npos);
  EXPECT_EQ(kvpack_abi_version(), KVPACK_ABI_VERSION);
  EXPECT_STREQ(kvpack_version(), KVPACK_VERSION);
}

TEST(CAbi, StructuresLieAsPythonMirrorsThem) {
  // python/kvpack/_native.py lists the same fields; tests/python/test_native.py checks these sizes from its side.
  EXPECT_EQ(sizeof(kvpack_tensor), 88u);
  EXPECT_EQ(sizeof(kvpack_prune_options), 40u);
  EXPECT_EQ(sizeof(kvpack_uniform_options), 48u);
  EXPECT_EQ(sizeof(kvpack_quantize_options), 96u);
  EXPECT_EQ(offsetof(kvpack_quantize_options, num_thresholds), 88u);
  EXPECT_EQ(sizeof(kvpack_histogram_options), 32u);
  EXPECT_EQ(sizeof(kvpack_histogram_counts), 16u);
  EXPECT_EQ(sizeof(kvpack_int4_rows), 272u);
  EXPECT_EQ(sizeof(kvpack_kron_transform), 264u);
  EXPECT_EQ(sizeof(kvpack_kron_output), 288u);
  EXPECT_EQ(sizeof(kvpack_klt_table), 472u);
  EXPECT_EQ(offsetof(kvpack_klt_table, mean), 32u);
  EXPECT_EQ(sizeof(kvpack_klt_samples), 192u);
  EXPECT_EQ(sizeof(kvpack_klt_allocation), 72u);
  EXPECT_EQ(sizeof(kvpack_tile64), 552u);
  EXPECT_EQ(offsetof(kvpack_tile64, bitmaps), 24u);
  EXPECT_EQ(sizeof(kvpack_tile64_options), 32u);
  EXPECT_EQ(sizeof(kvpack_attend_options), 24u);
  EXPECT_EQ(offsetof(kvpack_uniform_options, outlier_fraction), 24u);
  EXPECT_EQ(offsetof(kvpack_prune_options, channel_scores), 32u);
}

}  // namespace
