// Checks of the options, the table of a codebook, and the grids of calibrated thresholds.
#include "quantize/prepare.h"

#include <bit>
#include <cmath>
#include <limits>

#include "core/check.h"
#include "core/half.h"

namespace kvpack {

namespace {

void require_uniform_options(const UniformOptions& options) {
  const std::int32_t bits = options.bits;
  require(bits == 2 || bits == 3 || bits == 4 || bits == 5 || bits == 8 || bits == 16, "bits is ", bits,
          "; it is one of 2, 3, 4, 5, 8 and 16");
  require(options.axis == Axis::kPerChannel || options.axis == Axis::kPerToken, "there is no axis number ",
          static_cast<int>(options.axis));
  require(options.offset == OffsetRule::kFloating || options.offset == OffsetRule::kClamp,
          "there is no offset rule number ", static_cast<int>(options.offset));
  require(options.causality == Causality::kOracle || options.causality == Causality::kCausal ||
              options.causality == Causality::kCalibrated,
          "there is no mode number ", static_cast<int>(options.causality));
  require(options.group >= 0, "group is ", options.group, "; it must be at least 0");
  require(options.protected_tokens >= 0, "protected_tokens is ", options.protected_tokens, "; it must be at least 0");
  require(options.outlier_fraction >= 0.0 && options.outlier_fraction < 1.0, "outlier_fraction is ",
          options.outlier_fraction, "; it must be at least 0 and below 1");
}

void require_codebook(const QuantizeOptions& options) {
  if (options.codebook == nullptr) {
    require(options.num_centroids == 0, "num_centroids is ", options.num_centroids, " and codebook is null");
    require(options.scale == ScaleRule::kRange, "scale is rms and codebook is null; a uniform grid needs the range");
    return;
  }
  require(options.bits <= 8, "bits is ", options.bits, " with a codebook; it is one of 2, 3, 4, 5 and 8");
  require(options.num_centroids == 1 << options.bits, "codebook has ", options.num_centroids, " centroids; ",
          options.bits, " bits need ", 1 << options.bits);
  for (std::int32_t k = 0; k < options.num_centroids; ++k) {
    require(std::isfinite(options.codebook[k]), "codebook[", k, "] is ", options.codebook[k], "; centroids are finite");
    require(k == 0 || options.codebook[k - 1] < options.codebook[k], "codebook[", k - 1, "] is ",
            options.codebook[k > 0 ? k - 1 : 0], " and codebook[", k, "] is ", options.codebook[k],
            "; centroids ascend strictly");
  }
  require(std::isfinite(options.norm_scale) && std::isfinite(options.norm_offset), "norm_scale is ", options.norm_scale,
          " and norm_offset is ", options.norm_offset, "; both are finite");
}

void require_thresholds(const QuantizeOptions& options) {
  if (options.causality != Causality::kCalibrated) {
    require(options.lower == nullptr && options.upper == nullptr && options.num_thresholds == 0, "there are ",
            options.num_thresholds, " calibrated thresholds, but mode is not calibrated");
    return;
  }
  require((options.lower != nullptr && options.upper != nullptr) || options.num_thresholds == 0,
          "mode is calibrated, but lower or upper is null for ", options.num_thresholds, " thresholds");
  require(options.scale == ScaleRule::kRange, "scale is rms and mode is calibrated; calibrated thresholds are a range");
  for (std::int64_t i = 0; i < options.num_thresholds; ++i) {
    const float lower = options.lower[i];
    const float upper = options.upper[i];
    require(std::isfinite(lower) && std::isfinite(upper) && lower <= upper, "lower[", i, "] is ", lower, " and upper[",
            i, "] is ", upper, "; both are finite and lower is at most upper");
  }
}

/// The float32 behind `value` in steps of the order of floats; both zeros are one place.
std::int32_t place_of(float value) {
  const auto bits = std::bit_cast<std::int32_t>(value);
  return bits >= 0 ? bits : std::numeric_limits<std::int32_t>::min() - bits;
}
float value_at(std::int32_t place) {
  return std::bit_cast<float>(place >= 0 ? place : std::numeric_limits<std::int32_t>::min() - place);
}

float round_to_half(float value) {
  Half half{};
  from_float(value, half);
  return to_float(half);
}

/// make_codebook_grid and make_grid with every result rounded to float16: what torch does with float16 thresholds.
UniformGrid make_half_grid(float low, float high, const QuantizeOptions& options) {
  constexpr float kLargest = std::numeric_limits<float>::max();
  const float range = round_to_half(high - low);
  if (options.codebook != nullptr) {
    const float half = round_to_half(range * 0.5f);
    const float centre = round_to_half(round_to_half(high + low) * 0.5f);
    const bool usable = half > 0.0f && half <= kLargest && std::fabs(centre) <= kLargest;
    const bool has_centre = half == 0.0f && std::fabs(centre) <= kLargest;
    return usable ? UniformGrid{half, centre} : UniformGrid{0.0f, has_centre ? centre : 0.0f};
  }
  const float levels = largest_code(options.bits);
  const float qs = round_to_half(round_to_half(1.0f / range) * levels);
  const float offset = offset_of(round_to_half(low * qs), levels, options.offset);
  const bool usable = qs > 0.0f && qs <= kLargest && std::fabs(offset) <= kLargest;
  return usable ? UniformGrid{qs, offset} : UniformGrid{0.0f, 0.0f};
}

}  // namespace

void require_quantize_options(const QuantizeOptions& options) {
  require_uniform_options(options);
  require(options.scale == ScaleRule::kRange || options.scale == ScaleRule::kRms, "there is no scale rule number ",
          static_cast<int>(options.scale));
  require(options.scale == ScaleRule::kRange || options.outlier_fraction == 0.0,
          "scale is rms and outlier_fraction is ", options.outlier_fraction, "; with rms it is 0");
  require_codebook(options);
  require_thresholds(options);
}

bool needs_compat_grids(const QuantizeOptions& options, std::int64_t tokens) {
  const bool whole_channels = options.axis == Axis::kPerChannel && (options.group == 0 || options.group >= tokens);
  return options.compat && whole_channels && options.causality == Causality::kOracle &&
         options.scale == ScaleRule::kRange && options.bits != 16 && options.protected_tokens > 0 &&
         options.protected_tokens < tokens;
}

float boundary_between(float lower_centroid, float upper_centroid) {
  // Rounded distances are monotone in y between two centroids, so the lower one wins up to one place and the upper one
  // from there: halving finds it. A rounded midpoint may lie one place beside it, where torch's argmin decides otherwise.
  std::int32_t wins = place_of(lower_centroid);
  std::int32_t loses = place_of(upper_centroid);
  while (static_cast<std::int64_t>(loses) - wins > 1) {
    const auto middle = static_cast<std::int32_t>((static_cast<std::int64_t>(wins) + loses) / 2);
    const float y = value_at(middle);
    (upper_centroid - y < y - lower_centroid ? loses : wins) = middle;
  }
  return value_at(wins);
}

CodebookTable make_codebook_table(const QuantizeOptions& options) {
  CodebookTable table;
  table.levels = options.num_centroids;
  for (std::int32_t k = 0; k < table.levels; ++k) {
    table.values[k] = options.codebook[k] * options.norm_scale + options.norm_offset;
    if (k > 0) table.boundaries[k - 1] = boundary_between(options.codebook[k - 1], options.codebook[k]);
  }
  return table;
}

std::vector<VectorGrid> make_static_grids(const QuantizeOptions& options) {
  constexpr float kNever = std::numeric_limits<float>::infinity();
  std::vector<VectorGrid> grids(static_cast<std::size_t>(options.num_thresholds));
  for (std::size_t i = 0; i < grids.size(); ++i) {
    const float lower = options.lower[i];
    const float upper = options.upper[i];
    const UniformGrid grid =
        options.compat ? make_half_grid(lower, upper, options) : make_range_grid(lower, upper, options);
    // Strictly beyond a threshold is at or beyond the next float: implementations know one comparison.
    const bool keeps = options.outlier_fraction > 0.0;
    grids[i] = {grid.qs, grid.offset, keeps ? std::nextafter(upper, kNever) : kNever,
                keeps ? std::nextafter(lower, -kNever) : -kNever};
  }
  return grids;
}

}  // namespace kvpack
