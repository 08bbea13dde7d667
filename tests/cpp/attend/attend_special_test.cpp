// Attention on tiles where numbers end: infinite scores, NaN, tiles at and past the payload's end. Every implementation
// does the same, the reference included.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "support/implementations.h"
#include "support/tiles.h"

namespace kvpack::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<std::string> all_implementations() {
  std::vector<std::string> names = cpu_implementations("attend_tile64");
  names.insert(names.begin(), "reference");
  return names;
}
class SpecialAttend : public ImplementationTest {};
INSTANTIATE_TEST_SUITE_P(Cpu, SpecialAttend, ::testing::ValuesIn(all_implementations()), test_name);

constexpr std::int64_t kTokens = 70;
constexpr std::int64_t kHeadDim = 64;

/// One KV head of 70 tokens and one query row.
struct Head {
  explicit Head(std::int32_t bits, DType query_type = DType::kFloat16)
      : keys(CacheKind::kKey, bits, 1, kTokens, kHeadDim, DType::kFloat16),
        values(CacheKind::kValue, bits, 1, kTokens, kHeadDim, DType::kFloat16),
        q(1, kHeadDim, query_type),
        out(1, kHeadDim, query_type),
        weights(1, kTokens, query_type),
        scores(1, kTokens, query_type) {
    dense_keys.fill(Fill::kPositive, kSeed);
    dense_values.fill(Fill::kPositive, kSeed + 1);
    q.fill(Fill::kConstant, kSeed);
    weights.fill(Fill::kConstant, kSeed);
  }
  void pack() {
    const Forced forced("reference");
    compress(as_batches(dense_keys, 1), {}, keys);
    compress(as_batches(dense_values, 1), {}, values);
  }
  void attend(const TensorView& recent = {}) {
    const TensorView q_view = make_view(q.view().data, q.view().dtype, {1, 1, 1, kHeadDim});
    attend_tile64(keys.view(), values.view(), q_view, recent, recent, {},
                  make_view(out.view().data, out.view().dtype, {1, 1, 1, kHeadDim}), lse.view(), {});
  }
  void multiply(CacheKind kind) {
    const bool is_key = kind == CacheKind::kKey;
    const DType type = q.view().dtype;
    const TensorView of_channels = make_view((is_key ? q : out).view().data, type, {1, 1, kHeadDim});
    const TensorView of_tokens = make_view((is_key ? scores : weights).view().data, type, {1, 1, kTokens});
    if (is_key) multiply_keys(keys.view(), of_channels, of_tokens, {});
    if (!is_key) multiply_values(values.view(), of_tokens, of_channels, {});
  }
  Matrix dense_keys{kTokens, kHeadDim, DType::kFloat16};
  Matrix dense_values{kTokens, kHeadDim, DType::kFloat16};
  Tiles keys, values;
  Matrix q, out, weights, scores;
  Part lse{DType::kFloat32, {1, 1, 1}};
};

TEST_P(SpecialAttend, NoScoreAboveMinusInfinityIsAsNoTokens) {
  Head head(16);
  for (std::int64_t t = 0; t < kTokens; ++t) head.dense_keys.set(t, 3, kInfinity);  // queries are negative
  head.pack();
  force_implementation(GetParam());
  Matrix recent(2, kHeadDim, DType::kFloat16);
  recent.fill(Fill::kPositive, kSeed);
  for (std::int64_t t = 0; t < 2; ++t) recent.set(t, 5, kInfinity);
  for (const bool has_recent : {false, true}) {
    SCOPED_TRACE(has_recent ? "with a window" : "tiles alone");
    head.attend(has_recent ? make_view(recent.view().data, DType::kFloat16, {1, 1, 2, kHeadDim}) : TensorView{});
    EXPECT_EQ(*head.lse.as<float>(), -kInfinity);
    for (std::int64_t c = 0; c < kHeadDim; ++c) ASSERT_EQ(head.out.get(0, c), 0.0) << "channel " << c;
  }
}

TEST_P(SpecialAttend, AScoreOfMinusInfinityHasNoWeight) {
  Head head(16);
  for (std::int64_t t = 0; t < kTokens; ++t) {
    if (t != 66) head.dense_keys.set(t, 3, kInfinity);
  }
  head.pack();
  force_implementation(GetParam());
  head.attend();
  EXPECT_TRUE(std::isfinite(*head.lse.as<float>()));
  for (std::int64_t c = 0; c < kHeadDim; ++c) ASSERT_EQ(head.out.get(0, c), head.dense_values.get(66, c));
}

TEST_P(SpecialAttend, InfiniteAndUndefinedScoresGiveNaN) {
  for (const float value : {-kInfinity, NAN}) {
    SCOPED_TRACE(value);
    Head head(16);
    head.dense_keys.set(65, 3, value);  // -infinity times a negative query
    head.pack();
    force_implementation(GetParam());
    head.attend();
    EXPECT_TRUE(std::isnan(*head.lse.as<float>()));
    EXPECT_TRUE(std::isnan(head.out.get(0, 0)) && std::isnan(head.out.get(0, 63)));
  }
}

/// The NaN of GPUs has all bits set, which rounding by adding would make a zero.
TEST_P(SpecialAttend, NoNaNIsLostInRounding) {
  for (const std::int32_t bits : {1, 2, 4, 8, 16}) {
    for (const DType type : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
      SCOPED_TRACE(std::to_string(bits) + " bits, " + name_of(type));
      Head head(bits, type);
      head.pack();
      for (Tiles* tiles : {&head.keys, &head.values}) {
        // Keys: channel 0 of the first 64 tokens; values: token 0.
        if (bits == 16) tiles->payload.as<std::uint16_t>()[0] = 0x7fff;
        if (bits != 16) tiles->scales.as<std::uint32_t>()[0] = 0x7fffffff;
      }
      force_implementation(GetParam());
      head.multiply(CacheKind::kKey);
      head.multiply(CacheKind::kValue);
      EXPECT_TRUE(std::isnan(head.scores.get(0, 0)));
      EXPECT_EQ(std::isnan(head.scores.get(0, 63)), bits != 16);
      EXPECT_TRUE(std::isfinite(head.scores.get(0, 64)));
      EXPECT_TRUE(std::isnan(head.out.get(0, 0)));
    }
  }
}

TEST_P(SpecialAttend, PrunedElementsOfATileWithoutAGridAreZeros) {
  for (const std::int32_t bits : {1, 2, 4, 8}) {
    SCOPED_TRACE(bits);
    Head head(bits);
    for (std::int64_t t = 1; t < kTokens; t += 2) head.dense_keys.set(t, 0, 0.0);
    for (std::int64_t c = 1; c < kHeadDim; c += 2) head.dense_values.set(0, c, 0.0);
    head.dense_keys.set(4, 0, NAN);
    head.dense_values.set(0, 4, NAN);
    head.pack();
    force_implementation(GetParam());
    head.multiply(CacheKind::kKey);
    head.multiply(CacheKind::kValue);
    for (std::int64_t t = 0; t < kTokens; ++t) {
      EXPECT_EQ(std::isnan(head.scores.get(0, t)), t % 2 == 0 && t < 64) << "token " << t;
    }
    for (std::int64_t c = 0; c < kHeadDim; ++c) {
      EXPECT_EQ(std::isnan(head.out.get(0, c)), c % 2 == 0) << "channel " << c;
    }
  }
}

TEST_P(SpecialAttend, TilesPastTheEndAreRefusedBeforeAnythingIsWritten) {
  for (const std::int32_t bits : {2, 16}) {
    SCOPED_TRACE(bits);
    Head head(bits);
    head.pack();
    Tile64 keys = head.keys.view();
    Tile64 values = head.values.view();
    // Of 16 bits the last tile has 6 survivors (70 tokens) and two halves of padding, which the payload must hold too.
    keys.payload.shape[0] = head.keys.used - 1;
    values.payload.shape[0] = head.values.used - 1;
    force_implementation(GetParam());
    const TensorView q = make_view(head.q.view().data, DType::kFloat16, {1, 1, kHeadDim});
    const TensorView p = make_view(head.weights.view().data, DType::kFloat16, {1, 1, kTokens});
    const TensorView out = make_view(head.out.view().data, DType::kFloat16, {1, 1, kHeadDim});
    const TensorView scores = make_view(head.scores.view().data, DType::kFloat16, {1, 1, kTokens});
    const std::string said[] = {refusal([&] { multiply_keys(keys, q, scores, {}); }),
                                refusal([&] { multiply_values(values, p, out, {}); }),
                                refusal([&] { check_tile64(keys); }),
                                refusal([&] { unpack_tile64(keys, as_batches(head.dense_keys, 1)); }), refusal([&] {
                                  attend_tile64(keys, values, make_view(q.data, q.dtype, {1, 1, 1, kHeadDim}), {}, {},
                                                {}, make_view(out.data, out.dtype, {1, 1, 1, kHeadDim}), {}, {});
                                })};
    for (const std::string& message : said) {
      EXPECT_NE(message.find("payload, which has"), std::string::npos) << message;
    }
    for (std::int64_t t = 0; t < kTokens; ++t) ASSERT_TRUE(std::isnan(head.scores.get(0, t))) << "written";
    for (std::int64_t c = 0; c < kHeadDim; ++c) ASSERT_TRUE(std::isnan(head.out.get(0, c))) << "written";
  }
}

TEST_P(SpecialAttend, ATileWithoutSurvivorsMayPointAnywhere) {
  for (const std::int32_t bits : {2, 16}) {
    SCOPED_TRACE(bits);
    Head head(bits);
    for (std::int64_t t = 0; t < kTokens; ++t) head.dense_keys.set(t, 7, 0.0);
    head.pack();
    force_implementation(GetParam());
    head.multiply(CacheKind::kKey);
    const double before = head.scores.get(0, 5);
    for (const std::int32_t offset : {INT32_MIN, -1, INT32_MAX}) {
      head.keys.offsets.as<std::int32_t>()[7] = offset;
      head.multiply(CacheKind::kKey);
      EXPECT_EQ(head.scores.get(0, 5), before) << offset;
    }
  }
}

}  // namespace
}  // namespace kvpack::test
