// Rows that another encoder wrote once: every implementation reads and writes them. Tables are made so that x shows the codes:
// identity matrices, centroid i of a coefficient is i, and r is the first coefficient, whose code is 1.
#include <gtest/gtest.h>

#include <fstream>
#include <sstream>

#include "core/half.h"
#include "kvpack/kvpack.h"
#include "support/implementations.h"
#include "support/klt_tables.h"

namespace kvpack::test {
namespace {

struct GoldenRow {
  std::int64_t alignment = 0;
  float scale = 0.0f;
  std::vector<std::int32_t> levels;
  std::vector<float> codes;
  std::vector<std::uint8_t> bytes;
};

std::vector<GoldenRow> read_golden() {
  std::ifstream file(std::string(KVPACK_GOLDEN_DIR) + "/klt_rows_v2.txt");
  std::vector<GoldenRow> rows;
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with('#')) continue;
    std::istringstream words(line);
    std::string name, scale, levels, codes, bytes;
    GoldenRow row;
    words >> name >> row.alignment >> scale >> levels >> codes >> bytes;
    row.scale = to_float(Half{static_cast<std::uint16_t>(std::stoi(scale, nullptr, 16))});
    std::istringstream groups(levels);
    for (std::string group; std::getline(groups, group, ',');) {
      const std::size_t cross = group.find('x');
      const auto count = static_cast<std::size_t>(std::stoi(group.substr(cross + 1)));
      row.levels.insert(row.levels.end(), count, std::stoi(group.substr(0, cross)));
    }
    std::istringstream numbers(codes);
    for (std::string code; std::getline(numbers, code, ',');) row.codes.push_back(std::stof(code));
    for (std::size_t i = 0; i + 1 < bytes.size(); i += 2) {
      row.bytes.push_back(static_cast<std::uint8_t>(std::stoi(bytes.substr(i, 2), nullptr, 16)));
    }
    rows.push_back(row);
  }
  return rows;
}

OwnedKltTable identity_table(const GoldenRow& row) {
  const auto size = row.levels.size();
  OwnedKltTable table(static_cast<std::int64_t>(size), row.levels, 1, row.alignment);
  table.mean.assign(size, 0.0f);
  table.analysis.assign(size * size, 0.0f);
  table.in_scale.assign(size, 0);
  table.in_scale[0] = 1;
  table.centroids.clear();
  for (std::size_t k = 0; k < size; ++k) {
    table.analysis[k * size + k] = 1.0f;
    for (std::int32_t i = 0; i < row.levels[k]; ++i) table.centroids.push_back(static_cast<float>(i));
  }
  table.synthesis = table.analysis;
  return table;
}

class GoldenKltRows : public ImplementationTest {};
std::vector<std::string> all_implementations() {
  std::vector<std::string> names = cpu_implementations("compress_klt");
  names.insert(names.begin(), "reference");
  return names;
}
INSTANTIATE_TEST_SUITE_P(Cpu, GoldenKltRows, ::testing::ValuesIn(all_implementations()), test_name);

TEST_P(GoldenKltRows, AreReadAndWrittenAgain) {
  const std::vector<GoldenRow> rows = read_golden();
  ASSERT_EQ(rows.size(), 19u);
  for (const GoldenRow& row : rows) {
    OwnedKltTable table = identity_table(row);
    const auto size = static_cast<std::int64_t>(row.levels.size());
    ASSERT_EQ(table.row_bytes(), static_cast<std::int64_t>(row.bytes.size()));
    std::vector<float> x;
    for (const float code : row.codes) x.push_back(code * row.scale);
    std::vector<std::uint8_t> written(row.bytes.size(), 0xA5);
    compress_klt(make_view(x.data(), DType::kFloat32, {1, size}), table.view(),
                 make_view(written.data(), DType::kUInt8, {1, table.row_bytes()}));
    EXPECT_EQ(last_implementation(), GetParam());
    EXPECT_EQ(written, row.bytes) << "first levels " << row.levels[0];
    std::vector<std::uint8_t> bytes = row.bytes;
    const TensorView view = make_view(bytes.data(), DType::kUInt8, {1, table.row_bytes()});
    EXPECT_NO_THROW(check_klt(view, table.view()));
    std::vector<float> out(x.size());
    unpack_klt(view, table.view(), {}, make_view(out.data(), DType::kFloat32, {1, size}));
    EXPECT_EQ(out, x) << "first levels " << row.levels[0];
  }
}

}  // namespace
}  // namespace kvpack::test
