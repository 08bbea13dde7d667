// What each coded coefficient needs on the GPU, made once per call: where its code lies in a row and in memory, its boundaries.
#pragma once

#include "core/divide_up.h"
#include "cuda/launch.h"
#include "formats/klt_rows/layout.h"
#include "klt/rules.h"

namespace kvpack::cuda {

/// Everything about one coded coefficient, made once per call; the first 16 bytes are what reading its code takes.
struct alignas(16) Coefficient {
  std::int32_t first_centroid;
  std::uint32_t place_inverse;  // of base^digit_place: see inverse_of()
  std::int16_t field_bit;       // of the row where its low bits are; -1: none
  std::int16_t digit_bit;       // of the row where its group of digits is; -1: none
  std::int8_t low_bits;
  std::int8_t digit_section;
  std::int8_t group_bits;
  std::int8_t digit_place;       // in its group
  std::int32_t first_boundary;   // boundary j lies at first_boundary + j * boundary_stride
  std::int16_t boundary_stride;  // coefficients of the same number of levels
  std::int16_t levels;
  std::int16_t field_piece;  // their place among all pieces of a token
  std::int16_t digit_piece;
};

/// A piece of a row that one lane puts together: neighbouring fields of a section, or a group of digits. At most 17 bits:
///   number = piece[first_piece] + multiplier * (piece[first_piece + 1] + multiplier * ...)
struct alignas(8) Unit {
  std::uint16_t first_piece;
  std::uint16_t bit;  // of the row
  std::uint8_t count;
  std::uint8_t multiplier;
  std::uint16_t reserved;
};

/// Turns division by 2 to 16807 into a product: number / divisor = floor(number * inverse / 2^31) for numbers below 2^17.
KVPACK_HOST_DEVICE constexpr std::uint32_t inverse_of(std::uint32_t divisor) {
  return (0x80000000u + divisor - 1u) / divisor;
}

/// The inverse of a section's base, without a table in memory.
KVPACK_HOST_DEVICE constexpr std::uint32_t base_inverse(std::int32_t section) {
  constexpr std::uint32_t kOf3 = inverse_of(klt_rows::digit_base(0));
  constexpr std::uint32_t kOf5 = inverse_of(klt_rows::digit_base(1));
  constexpr std::uint32_t kOf7 = inverse_of(klt_rows::digit_base(2));
  return section == 0 ? kOf3 : (section == 1 ? kOf5 : kOf7);
}

/// Fields of a section that a unit takes.
KVPACK_HOST_DEVICE constexpr std::int32_t unit_fields(std::int32_t section) {
  return 16 / klt_rows::field_bits(section);
}

/// Sizes that follow from a layout.
struct RowPlan {
  klt_rows::RowLayout layout;
  std::int32_t first_field_piece[klt_rows::kNumFieldSections];
  std::int32_t first_digit_piece[klt_rows::kNumDigitSections];
  std::int32_t first_field_unit[klt_rows::kNumFieldSections];
  std::int32_t first_digit_unit[klt_rows::kNumDigitSections];
  std::int32_t pieces;  // bytes of one token: low bits and digits
  std::int32_t units;
  std::int32_t boundaries;  // floats
  std::int32_t centroids;   // floats
};

inline RowPlan plan_rows(const klt_rows::RowLayout& layout) {
  RowPlan plan{layout, {}, {}, {}, {}, 0, 0, 0, 0};
  for (std::int32_t s = 0; s < klt_rows::kNumFieldSections; ++s) {
    plan.first_field_piece[s] = plan.pieces;
    plan.pieces += layout.num_fields[s];
    plan.first_field_unit[s] = plan.units;
    plan.units += static_cast<std::int32_t>(divide_up(layout.num_fields[s], unit_fields(s)));
  }
  for (std::int32_t s = 0; s < klt_rows::kNumDigitSections; ++s) {
    plan.first_digit_piece[s] = plan.pieces;
    plan.pieces += layout.num_digits[s];
    plan.first_digit_unit[s] = plan.units;
    plan.units += static_cast<std::int32_t>(divide_up(layout.num_digits[s], klt_rows::group_digits(s)));
  }
  for (std::int32_t i = 0; i < kNumKltLevels; ++i) {
    plan.boundaries += layout.counts[i] * (kKltLevels[i] - 1);
    plan.centroids += layout.counts[i] * kKltLevels[i];
  }
  return plan;
}

namespace rows {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpLanes;

/// Numbers of levels as constants of the device.
__device__ inline std::int32_t levels_of(std::int32_t index) {
  constexpr std::int32_t kLevels[kNumKltLevels] = {64, 32, 20, 16, 12, 10, 8, 7, 6, 5, 4, 3, 2};
  return kLevels[index];
}

/// Unit `index` of a row.
__device__ inline Unit describe_unit(const RowPlan& plan, std::int32_t index) {
  Unit unit{};
  const auto set = [&](std::int32_t piece, std::int32_t bit, std::int32_t count, std::int32_t multiplier) {
    unit.first_piece = static_cast<std::uint16_t>(piece);
    unit.bit = static_cast<std::uint16_t>(bit);
    unit.count = static_cast<std::uint8_t>(count);
    unit.multiplier = static_cast<std::uint8_t>(multiplier);
  };
  for (std::int32_t s = 0; s < klt_rows::kNumFieldSections; ++s) {
    const std::int32_t first = (index - plan.first_field_unit[s]) * unit_fields(s);
    if (first < 0 || first >= plan.layout.num_fields[s]) continue;
    set(plan.first_field_piece[s] + first, plan.layout.first_field_bit[s] + first * klt_rows::field_bits(s),
        min(unit_fields(s), plan.layout.num_fields[s] - first), 1 << klt_rows::field_bits(s));
  }
  for (std::int32_t s = 0; s < klt_rows::kNumDigitSections; ++s) {
    const std::int32_t full = klt_rows::group_digits(s);
    const std::int32_t group = index - plan.first_digit_unit[s];
    if (group < 0 || group * full >= plan.layout.num_digits[s]) continue;
    set(plan.first_digit_piece[s] + group * full,
        plan.layout.first_digit_bit[s] + group * klt_rows::group_bits(s, full),
        min(full, plan.layout.num_digits[s] - group * full), klt_rows::digit_base(s));
  }
  return unit;
}

/// Describes the coded coefficients and the units of a row, and computes boundaries.
///
/// Launch  a thread per coefficient and per unit, any number of blocks of kThreads
/// Work    walks the classes of the layout up to its coefficient's
/// Reads   centroids once
/// Writes  coefficients, units, boundaries once
/// Needs   nothing
__global__ void __launch_bounds__(kThreads)
    describe_kernel(RowPlan plan, const float* centroids, Coefficient* coefficients, Unit* units, float* boundaries) {
  const auto k = static_cast<std::int32_t>(blockIdx.x * kThreads + threadIdx.x);
  if (k < plan.units) units[k] = describe_unit(plan, k);
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
        std::uint32_t power = 1;
        for (std::int32_t i = 0; i < digit % full; ++i) power *= static_cast<std::uint32_t>(klt_rows::digit_base(s));
        result.place_inverse = inverse_of(power);
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
