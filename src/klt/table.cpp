// Checks of a table: what each part must be, and where it is not.
#include "klt/table.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"

namespace kvpack {

namespace klt {

namespace {

std::string allowed_levels() {
  std::string list = "1";
  for (std::int32_t i = kNumKltLevels - 1; i >= 0; --i) list += text(i == 0 ? " or " : ", ", kKltLevels[i]);
  return list;
}

void require_centroids(const KltData& data, const std::int32_t* levels) {
  const float* centroids = data.centroids;
  for (std::int32_t k = 0; k < data.layout.coded; ++k) {
    for (std::int32_t i = 0; i < levels[k]; ++i) {
      // Texts are made only for a failure: this runs in every call.
      if (std::isfinite(centroids[i]) && (i == 0 || centroids[i - 1] < centroids[i])) continue;
      throw InvalidArgument(text("centroid ", i, " of coefficient ", k, " is ", centroids[i], i == 0 ? "" : " after ",
                                 i == 0 ? "" : text(centroids[i - 1]), "; centroids are finite and ascend strictly"));
    }
    centroids += levels[k];
  }
}

std::int32_t count_in_scale(const KltData& data) {
  std::int32_t count = 0;
  for (std::int32_t k = 0; k < data.coefficients; ++k) {
    require(data.in_scale[k] == 0 || data.in_scale[k] == 1, "in_scale[", k, "] is ", data.in_scale[k],
            "; it is 0 or 1");
    count += data.in_scale[k];
  }
  require(count > 0 || data.layout.coded == 0, "in_scale is 0 for all ", data.coefficients,
          " coefficients; the scale needs one");
  return count;
}

}  // namespace

klt_rows::RowLayout layout_of(const std::int32_t* levels, std::int64_t coefficients, std::int64_t row_alignment) {
  require(coefficients >= 0 && coefficients <= kMaxKltChannels, "coefficients is ", coefficients, "; it is 0 to ",
          kMaxKltChannels);
  require(row_alignment == 2 || row_alignment == 4 || row_alignment == 8 || row_alignment == 16, "row_alignment is ",
          row_alignment, "; it is 2, 4, 8 or 16");
  require(levels != nullptr || coefficients == 0, "levels is a null pointer for ", coefficients, " coefficients");
  std::int32_t counts[kNumKltLevels] = {};
  for (std::int64_t k = 0; k < coefficients; ++k) {
    const std::int32_t index = klt_rows::index_of_levels(levels[k]);
    if (index < 0 && levels[k] != 1) {
      throw InvalidArgument(text("levels[", k, "] is ", levels[k], "; it is ", allowed_levels()));
    }
    require(k == 0 || levels[k] <= levels[k - 1], "levels[", k, "] is ", levels[k], " after ",
            k > 0 ? levels[k - 1] : 0, "; levels never ascend");
    if (index >= 0) ++counts[index];
  }
  return klt_rows::make_layout(counts, static_cast<std::int32_t>(row_alignment));
}

KltData checked_table(const KltTable& table, const Device& device) {
  require(table.channels >= 1 && table.channels <= kMaxKltChannels, "channels is ", table.channels, "; it is 1 to ",
          kMaxKltChannels);
  KltData data;
  data.layout = layout_of(table.levels, table.coefficients, table.row_alignment);
  data.channels = static_cast<std::int32_t>(table.channels);
  data.coefficients = static_cast<std::int32_t>(table.coefficients);
  std::int64_t num_centroids = 0;
  for (std::int32_t i = 0; i < kNumKltLevels; ++i) {
    num_centroids += static_cast<std::int64_t>(data.layout.counts[i]) * kKltLevels[i];
  }
  const std::int64_t coded = data.layout.coded;
  require_exact(table.mean, {"table", "mean"}, DType::kFloat32, {table.channels}, device);
  require_exact(table.analysis, {"table", "analysis"}, DType::kFloat32, {table.channels, table.coefficients}, device);
  require_exact(table.synthesis, {"table", "synthesis"}, DType::kFloat32, {coded, table.channels}, device);
  require_exact(table.in_scale, {"table", "in_scale"}, DType::kInt32, {table.coefficients}, device);
  require_exact(table.centroids, {"table", "centroids"}, DType::kFloat32, {num_centroids}, device);
  data.mean = static_cast<const float*>(table.mean.data);
  data.analysis = static_cast<const float*>(table.analysis.data);
  data.synthesis = static_cast<const float*>(table.synthesis.data);
  data.in_scale = static_cast<const std::int32_t*>(table.in_scale.data);
  data.centroids = static_cast<const float*>(table.centroids.data);
  if (device.kind == DeviceKind::kCpu) {
    require_centroids(data, table.levels);
    data.scale_count = count_in_scale(data);
  }
  return data;
}

}  // namespace klt

std::int64_t klt_row_bytes(const std::int32_t* levels, std::int64_t coefficients, std::int64_t row_alignment) {
  return klt::layout_of(levels, coefficients, row_alignment).row_bytes;
}

double klt_level_bits(std::int32_t levels) {
  if (levels == 1) return 0.0;
  const std::int32_t index = klt_rows::index_of_levels(levels);
  if (index < 0) throw InvalidArgument(text("levels is ", levels, "; it is ", klt::allowed_levels()));
  const klt_rows::LevelParts parts = klt_rows::parts_of(index);
  double bits = parts.low_bits;
  if (parts.digit_section >= 0) {
    const std::int32_t digits = klt_rows::group_digits(parts.digit_section);
    bits += static_cast<double>(klt_rows::group_bits(parts.digit_section, digits)) / digits;
  }
  return bits;
}

void check_klt_table(const KltTable& table) {
  const KltData data = klt::checked_table(table, Device{});
  const auto require_finite = [](const char* name, const float* values, std::int64_t rows, std::int64_t columns) {
    for (std::int64_t i = 0; i < rows * columns; ++i) {
      require(std::isfinite(values[i]), "table.", name, "[", i / columns, ", ", i % columns, "] is ", values[i],
              "; it must be finite");
    }
  };
  require_finite("mean", data.mean, 1, data.channels);
  require_finite("analysis", data.analysis, data.channels, data.coefficients);
  require_finite("synthesis", data.synthesis, data.layout.coded, data.channels);
}

}  // namespace kvpack
