// Bytes that were written once: this version reads them to the same values and writes them again. And the example of
// docs/formats/tile64_f16.md and tile64_q.md, digit by digit.
#include <gtest/gtest.h>

#include <fstream>
#include <map>

#include "formats/tile64_decoder.h"
#include "support/tiles.h"

namespace kvpack::test {
namespace {

/// One section of a golden file.
struct Golden {
  CacheKind kind;
  std::int32_t bits;
  std::map<std::string, std::vector<std::byte>> parts;
};

std::vector<Golden> read_golden(const std::string& name) {
  std::ifstream file(std::string(KVPACK_GOLDEN_DIR) + "/" + name);
  std::vector<Golden> sections;
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with('#')) continue;
    const std::string word = line.substr(0, line.find(' '));
    const std::string rest = line.substr(line.find(' ') + 1);
    if (word == "tiles") {
      sections.push_back({rest[0] == '0' ? CacheKind::kKey : CacheKind::kValue, std::stoi(rest.substr(2)), {}});
      continue;
    }
    std::vector<std::byte>& bytes = sections.back().parts[word];
    for (int left = std::stoi(rest); left > 0 && std::getline(file, line); --left) {
      for (std::size_t i = 0; i + 1 < line.size(); i += 2) {
        bytes.push_back(static_cast<std::byte>(std::stoi(line.substr(i, 2), nullptr, 16)));
      }
    }
  }
  return sections;
}

/// The matrix that the header of the golden files describes.
Matrix& fill_golden(Matrix& x) {
  for (std::int64_t row = 0; row < x.tokens(); ++row) {
    for (std::int64_t c = 0; c < x.channels(); ++c) {
      const std::int64_t number = 977 * (row / 66) + 37 * (row % 66) + 61 * c;
      x.set(row, c, static_cast<double>(number % 127 - 63) / 16.0);
    }
  }
  return x;
}

class GoldenTile64 : public ::testing::TestWithParam<const char*> {};
std::string file_stem(const ::testing::TestParamInfo<const char*>& param) {
  return std::string(param.param, std::strlen(param.param) - 4);
}
INSTANTIATE_TEST_SUITE_P(Versions, GoldenTile64, ::testing::Values("tile64_f16_v1.txt", "tile64_q_v1.txt"), file_stem);

TEST_P(GoldenTile64, BytesAreWrittenAgainAndReadToTheSameValues) {
  const std::vector<Golden> sections = read_golden(GetParam());
  ASSERT_GE(sections.size(), 2u) << "in " << KVPACK_GOLDEN_DIR;
  Matrix x(132, 64, DType::kFloat16);
  fill_golden(x);
  for (const Golden& golden : sections) {
    SCOPED_TRACE((golden.kind == CacheKind::kKey ? "keys, " : "values, ") + std::to_string(golden.bits) + " bits");
    Tiles tiles(golden.kind, golden.bits, 2, 66, 64, DType::kFloat16);
    Tile64Options options;
    options.sparsity = 0.9;
    compress(as_batches(x, 2), options, tiles);
    Tiles read(golden.kind, golden.bits, 2, 66, 64, DType::kFloat16);
    const std::pair<const char*, Part*> parts[] = {{"bitmaps", &read.bitmaps}, {"offsets", &read.offsets},
                                                   {"payload", &read.payload}, {"starts", &read.starts},
                                                   {"scales", &read.scales},   {"zeros", &read.zeros}};
    for (const auto& [name, part] : parts) {
      const auto found = golden.parts.find(name);
      if (found == golden.parts.end()) continue;
      ASSERT_LE(found->second.size(), part->bytes()) << name;
      std::copy(found->second.begin(), found->second.end(), part->data());
      if (part == &read.payload) {
        read.used = static_cast<std::int64_t>(found->second.size()) / element_bytes(read.payload.view().dtype);
      }
    }
    EXPECT_TRUE(same_tiles(read, tiles));
    EXPECT_EQ(refusal([&] { check_tile64(read.view()); }), "accepted");
    Matrix out(132, 64, DType::kFloat32);
    unpack_tile64(read.view(), as_batches(out, 2));
    for (std::int64_t row = 0; row < 132; ++row) {
      for (std::int64_t c = 0; c < 64; ++c) {
        ASSERT_EQ(static_cast<float>(out.get(row, c)), decode_element(read.view(), row / 66, row % 66, c));
      }
    }
  }
}

/// One token of 64 channels, of which 0, 3 and 62 are not zero.
TEST(Tile64Example, IsThatOfTheFormatPages) {
  Matrix x(1, 64, DType::kFloat16);
  x.fill(Fill::kNothing, kSeed);
  x.set(0, 0, 1.5);
  x.set(0, 3, -2.0);
  x.set(0, 62, 0.25);
  Tiles halves(CacheKind::kValue, 16, 1, 1, 64, DType::kFloat16);
  compress(as_batches(x, 1), {}, halves);
  EXPECT_EQ(halves.bitmaps.as<std::uint64_t>()[0], 0x9000000000000002u);
  EXPECT_EQ(halves.used, 8);
  const std::uint16_t expected[] = {0x3e00, 0xc000, 0x3400, 0, 0, 0, 0, 0};
  for (int i = 0; i < 8; ++i) EXPECT_EQ(halves.payload.as<std::uint16_t>()[i], expected[i]);
  EXPECT_EQ(halves.offsets.as<std::int32_t>()[0], 0);
  EXPECT_EQ(halves.offsets.as<std::int32_t>()[1], 4);
  EXPECT_EQ(halves.starts.as<std::int32_t>()[0], 0);

  Tiles codes(CacheKind::kValue, 2, 1, 1, 64, DType::kFloat16);
  compress(as_batches(x, 1), {}, codes);
  EXPECT_EQ(codes.bitmaps.as<std::uint64_t>()[0], 0x9000000000000002u);
  EXPECT_EQ(codes.used, 1);
  EXPECT_EQ(codes.payload.as<std::uint32_t>()[0], 0x23u);
  EXPECT_EQ(codes.scales.as<float>()[0], 3.5f / 3.0f);
  EXPECT_EQ(codes.zeros.as<float>()[0], 2.0f);
  Matrix out(1, 64, DType::kFloat32);
  unpack_tile64(codes.view(), as_batches(out, 1));
  EXPECT_EQ(out.get(0, 0), static_cast<double>(3.5f / 3.0f));
  EXPECT_EQ(out.get(0, 3), static_cast<double>(-2.0f * (3.5f / 3.0f)));
  EXPECT_EQ(out.get(0, 62), 0.0);
}

}  // namespace
}  // namespace kvpack::test
