// What each coded coefficient needs on the GPU, made once per call: where its code lies in a row and in memory, its boundaries.
#pragma once

#include "cuda/launch.h"
#include "formats/klt_rows/layout.h"
#include "klt/rules.h"

namespace kvpack::cuda {

/// Everything about one coded coefficient, made once per call.
struct alignas(16) Coefficient {
  std::int32_t first_centroid;
  std::int32_t first_boundary;   // boundary j lies at first_boundary + j * boundary_stride
  std::int16_t boundary_stride;  // coefficients of the same number of levels
  std::int16_t levels;
  std::int16_t field_bit;    // of the row where its low bits are; -1: none
  std::int16_t field_piece;  // their place among all pieces of a token
  std::int16_t digit_bit;    // of the row where its group of digits is; -1: none
  std::int16_t digit_piece;
  std::int8_t low_bits;
  std::int8_t digit_section;
  std::int8_t digit_place;  // in its group
  std::int8_t group_bits;
  std::int32_t reserved[2];
};

/// Sizes that follow from a layout.
struct RowPlan {
  klt_rows::RowLayout layout;
  std::int32_t first_field_piece[klt_rows::kNumFieldSections];
  std::int32_t first_digit_piece[klt_rows::kNumDigitSections];
  std::int32_t pieces;      // bytes of one token: low bits and digits
  std::int32_t boundaries;  // floats
  std::int32_t centroids;   // floats
};

inline RowPlan plan_rows(const klt_rows::RowLayout& layout) {
  RowPlan plan{layout, {}, {}, 0, 0, 0};
  for (std::int32_t s = 0; s < klt_rows::kNumFieldSections; ++s) {
    plan.first_field_piece[s] = plan.pieces;
    plan.pieces += layout.num_fields[s];
  }
  for (std::int32_t s = 0; s < klt_rows::kNumDigitSections; ++s) {
    plan.first_digit_piece[s] = plan.pieces;
    plan.pieces += layout.num_digits[s];
  }
  for (std::int32_t i = 0; i < kNumKltLevels; ++i) {
    plan.boundaries += layout.counts[i] * (kKltLevels[i] - 1);
    plan.centroids += layout.counts[i] * kKltLevels[i];
  }
  return plan;
}

namespace rows {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpLanes;

/// Numbers of levels as constants of the device.
__device__ inline std::int32_t levels_of(std::int32_t index) {
  constexpr std::int32_t kLevels[kNumKltLevels] = {64, 32, 20, 16, 12, 10, 8, 7, 6, 5, 4, 3, 2};
  return kLevels[index];
}

/// Describes the coded coefficients and computes their boundaries.
///
/// Launch  a thread per coefficient, any number of blocks of kThreads
/// Work    walks the classes of the layout up to its coefficient's
/// Reads   centroids once
/// Writes  coefficients, boundaries once
/// Needs   nothing
__global__ void __launch_bounds__(kThreads)
    describe_kernel(RowPlan plan, const float* centroids, Coefficient* coefficients, float* boundaries) {
  const auto k = static_cast<std::int32_t>(blockIdx.x * kThreads + threadIdx.x);
  if (k >= plan.layout.coded) return;
  std::int32_t fields[klt_rows::kNumFieldSections] = {};
  std::int32_t digits[klt_rows::kNumDigitSections] = {};
  std::int32_t first = 0;
  std::int32_t first_centroid = 0;
  std::int32_t first_boundary = 0;
  for (std::int32_t i = 0; i < kNumKltLevels; ++i) {
    const std::int32_t count = plan.layout.counts[i];
    const std::int32_t levels = levels_of(i);
    const klt_rows::LevelParts parts = klt_rows::parts_of(i);
    if (k < first + count) {
      const std::int32_t place = k - first;
      Coefficient result{};
      result.first_centroid = first_centroid + place * levels;
      result.first_boundary = first_boundary + place;
      result.boundary_stride = static_cast<std::int16_t>(count);
      result.levels = static_cast<std::int16_t>(levels);
      result.low_bits = static_cast<std::int8_t>(parts.low_bits);
      result.field_bit = result.digit_bit = -1;
      if (parts.field_section >= 0) {
        const std::int32_t field = fields[parts.field_section] + place;
        result.field_piece = static_cast<std::int16_t>(plan.first_field_piece[parts.field_section] + field);
        result.field_bit =
            static_cast<std::int16_t>(plan.layout.first_field_bit[parts.field_section] + field * parts.low_bits);
      }
      if (parts.digit_section >= 0) {
        const std::int32_t s = parts.digit_section;
        const std::int32_t digit = digits[s] + place;
        const std::int32_t full = klt_rows::group_digits(s);
        const std::int32_t group = digit / full;
        result.digit_section = static_cast<std::int8_t>(s);
        result.digit_piece = static_cast<std::int16_t>(plan.first_digit_piece[s] + digit);
        result.digit_place = static_cast<std::int8_t>(digit % full);
        result.digit_bit =
            static_cast<std::int16_t>(plan.layout.first_digit_bit[s] + group * klt_rows::group_bits(s, full));
        result.group_bits =
            static_cast<std::int8_t>(klt_rows::group_bits(s, min(full, plan.layout.num_digits[s] - group * full)));
      }
      coefficients[k] = result;
      const float* codebook = centroids + result.first_centroid;
      for (std::int32_t j = 0; j + 1 < levels; ++j) {
        boundaries[result.first_boundary + j * count] = klt_boundary(codebook[j], codebook[j + 1]);
      }
      return;
    }
    first += count;
    first_centroid += count * levels;
    first_boundary += count * (levels - 1);
    if (parts.field_section >= 0) fields[parts.field_section] += count;
    if (parts.digit_section >= 0) digits[parts.digit_section] += count;
  }
}

}  // namespace rows

}  // namespace kvpack::cuda
