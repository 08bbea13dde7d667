// The tile formats: every implementation against the reference, the reference against a second decoder, sizes and bounds.
#include <gtest/gtest.h>

#include "formats/tile64_cases.h"
#include "formats/tile64_decoder.h"
#include "support/implementations.h"
#include "support/tiles.h"

namespace kvpack::test {
namespace {

std::string trace_of(const TileCase& c, CacheKind kind, std::int32_t bits) {
  return std::string(c.name) + (kind == CacheKind::kKey ? ", keys, " : ", values, ") + std::to_string(bits) + " bits";
}

/// Runs body(case, kind, bits, input) for all of them.
template <typename Body>
void for_each_case(Body&& body) {
  for (const TileCase& c : tile_cases()) {
    const TileInput input(c);
    // Waking threads for a block or two costs more than the block, on a busy machine a hundred times.
    set_num_threads(c.batches * c.tokens > 256 ? 0 : 1);
    for (const CacheKind kind : kAllKinds) {
      for (const std::int32_t bits : kAllBits) {
        SCOPED_TRACE(trace_of(c, kind, bits));
        body(c, kind, bits, input);
      }
    }
  }
  set_num_threads(0);
}

class CompressTile64 : public ImplementationTest {};
INSTANTIATE_TEST_SUITE_P(Cpu, CompressTile64, ::testing::ValuesIn(cpu_implementations("compress_tile64")), test_name);
class UnpackTile64 : public ImplementationTest {};
INSTANTIATE_TEST_SUITE_P(Cpu, UnpackTile64, ::testing::ValuesIn(cpu_implementations("unpack_tile64")), test_name);

TEST_P(CompressTile64, EqualsTheReferenceBitForBit) {
  for_each_case([&](const TileCase& c, CacheKind kind, std::int32_t bits, const TileInput& input) {
    Tiles expected(kind, bits, c.batches, c.tokens, c.head_dim, c.dtype);
    force_implementation("reference");
    compress(input.view(), input.options(), expected);
    force_implementation(GetParam());
    // Exactly as much payload as is needed: whoever writes further meets the guards.
    Tiles actual(kind, bits, c.batches, c.tokens, c.head_dim, c.dtype, expected.used);
    compress(input.view(), input.options(), actual);
    EXPECT_EQ(last_implementation(), GetParam());
    EXPECT_TRUE(same_tiles(expected, actual));
    EXPECT_TRUE(actual.guards_are_intact());
    if (expected.used == 0) return;
    Tiles small(kind, bits, c.batches, c.tokens, c.head_dim, c.dtype, expected.used - 1);
    EXPECT_NE(refusal([&] { compress(input.view(), input.options(), small); }), "accepted");
    for (std::size_t i = 0; i < small.bitmaps.bytes(); ++i) ASSERT_EQ(small.bitmaps.data()[i], std::byte{0xFF});
  });
}

TEST_P(UnpackTile64, EqualsTheReferenceBitForBit) {
  for_each_case([&](const TileCase& c, CacheKind kind, std::int32_t bits, const TileInput& input) {
    force_implementation("reference");
    Tiles measured(kind, bits, c.batches, c.tokens, c.head_dim, c.dtype);
    compress(input.view(), input.options(), measured);
    Tiles tiles(kind, bits, c.batches, c.tokens, c.head_dim, c.dtype, measured.used);
    compress(input.view(), input.options(), tiles);
    for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
      Matrix expected(input.matrix.tokens(), input.matrix.channels(), dtype, c.layout);
      Matrix actual(input.matrix.tokens(), input.matrix.channels(), dtype, c.layout);
      force_implementation("reference");
      unpack_tile64(tiles.view(), input.view_of(expected));
      force_implementation(GetParam());
      unpack_tile64(tiles.view(), input.view_of(actual));
      EXPECT_EQ(last_implementation(), GetParam());
      EXPECT_TRUE(same_bits(expected, actual)) << name_of(dtype);
      EXPECT_TRUE(actual.guards_are_intact());
    }
  });
}

TEST_P(UnpackTile64, KeepsTheBitsOfSignallingNaNs) {
  for (const DType stored : {DType::kFloat16, DType::kBFloat16}) {
    Matrix x(70, 64, stored);
    x.fill(Fill::kNormal, kSeed);
    auto* elements = static_cast<std::uint16_t*>(x.view().data);
    for (int i = 0; i < 70 * 64; i += 13) {
      const int sign = i % 2 == 0 ? 0 : 0x8000;
      elements[i] = static_cast<std::uint16_t>((stored == DType::kFloat16 ? 0x7c01 : 0x7f81) | sign | i % 32);
    }
    for (const CacheKind kind : kAllKinds) {
      Tiles tiles(kind, 16, 1, 70, 64, stored);
      force_implementation("reference");
      compress(as_batches(x, 1), {}, tiles);
      for (const DType type : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
        SCOPED_TRACE(std::string(name_of(stored)) + " to " + name_of(type));
        Matrix expected(70, 64, type);
        Matrix actual(70, 64, type);
        force_implementation("reference");
        unpack_tile64(tiles.view(), as_batches(expected, 1));
        force_implementation(GetParam());
        unpack_tile64(tiles.view(), as_batches(actual, 1));
        EXPECT_TRUE(same_bits(expected, actual));
        EXPECT_TRUE(type != stored || same_bits(x, actual));
      }
    }
  }
}

TEST(Tile64, ASecondDecoderReadsTheSameValues) {
  const Forced forced("reference");
  for_each_case([&](const TileCase& c, CacheKind kind, std::int32_t bits, const TileInput& input) {
    Tiles tiles(kind, bits, c.batches, c.tokens, c.head_dim, c.dtype);
    compress(input.view(), input.options(), tiles);
    Matrix out(c.batches * c.tokens, c.head_dim, DType::kFloat32);
    if (c.batches > 0) unpack_tile64(tiles.view(), as_batches(out, c.batches));
    for (std::int64_t row = 0; row < out.tokens(); ++row) {
      for (std::int64_t channel = 0; channel < c.head_dim; ++channel) {
        const float value = decode_element(tiles.view(), row / c.tokens, row % c.tokens, channel);
        ASSERT_EQ(out.bits(row, channel), std::bit_cast<std::uint32_t>(value)) << row << " " << channel;
      }
    }
  });
}

TEST(Tile64, SixteenBitsGiveBackWhatPruningGives) {
  for_each_case([&](const TileCase& c, CacheKind kind, std::int32_t bits, const TileInput& input) {
    if (bits != 16 || c.dtype == DType::kFloat32 || c.scores != 0 || c.heads != 0 || c.batches == 0) return;
    Tiles tiles(kind, bits, c.batches, c.tokens, c.head_dim, c.dtype);
    compress(input.view(), input.options(), tiles);
    Matrix out(c.batches * c.tokens, c.head_dim, c.dtype);
    unpack_tile64(tiles.view(), as_batches(out, c.batches));
    Matrix pruned(c.batches * c.tokens, c.head_dim, c.dtype);
    pruned.copy_from(input.matrix);
    if (c.sparsity > 0.0)
      prune_magnitude(input.matrix.view(), pruned.view(), {c.sparsity, c.rule, c.head_dim, 0, nullptr});
    for (std::int64_t t = 0; t < out.tokens(); ++t) {
      for (std::int64_t channel = 0; channel < c.head_dim; ++channel) {
        // A zero that survived pruning has no bit: -0 comes back as +0.
        ASSERT_EQ(out.bits(t, channel), pruned.get(t, channel) == 0.0 ? 0 : pruned.bits(t, channel));
      }
    }
  });
}

TEST(Tile64, NothingExceedsTheBoundAndEverythingPassesTheCheck) {
  for_each_case([&](const TileCase& c, CacheKind kind, std::int32_t bits, const TileInput& input) {
    const std::int64_t kept = c.rule == PruneRule::kExact ? kept_per_row(c.sparsity, c.head_dim) : c.head_dim;
    const std::int64_t bound = tile64_payload_bound(bits, c.batches, c.tokens, c.head_dim, kept);
    Tiles tiles(kind, bits, c.batches, c.tokens, c.head_dim, c.dtype, bound);
    compress(input.view(), input.options(), tiles);
    EXPECT_LE(tiles.used, bound);
    const bool holds_bad_grids = c.fill == Fill::kSpecial || c.fill == Fill::kHuge;
    const std::string said = refusal([&] { check_tile64(tiles.view()); });
    if (bits == 16 || !holds_bad_grids) {
      EXPECT_EQ(said, "accepted");
    } else {
      EXPECT_NE(said.find("finite"), std::string::npos) << said;
    }
  });
}

TEST(Tile64, BoundsAreWhatTheProofSays) {
  EXPECT_EQ(tile64_payload_bound(16, 1, 64, 64, 64), 64 * 64) << "dense";
  EXPECT_EQ(tile64_payload_bound(16, 2, 128, 128, 39), 2 * (128 * 39 + 7 * 256)) << "each tile one short of 8 more";
  EXPECT_EQ(tile64_payload_bound(2, 1, 64, 64, 64), 64 * 4) << "dense";
  EXPECT_EQ(tile64_payload_bound(2, 1, 128, 128, 20), (128 * 20 + 15 * 256) / 16);
  EXPECT_EQ(tile64_payload_bound(2, 1, 1, 128, 20), 20) << "a word for each survivor of a single token";
  EXPECT_EQ(tile64_payload_bound(4, 5, 0, 128, 20), 0);
  EXPECT_EQ(tile64_payload_bound(8, 3, 70, 64, 0), 0);
}

}  // namespace
}  // namespace kvpack::test
