// THE home of klt_rows' bytes: where the codes of a token's row lie. Spec with an example: docs/formats/klt_rows.md.
//
//   A number of levels is odd * 2^low, odd 1, 3, 5 or 7: a code is digit * 2^low + its low bits. A row, low bits first:
//   | r 8 bits | low bits: 4s | 2s | 1s | 6s | 5s | 3s | digits: base 3 | base 5 | base 7 | zeros to whole bytes |
//   12 levels: low 2 -> section "2s", and a digit of base 3. Base 3 puts 5 digits into 8 bits, base 5 3 into 7, base 7 6 into
//   17; the last group of a section takes only the bits that its digits need.
#pragma once

#include <cstdint>

#include "core/portable.h"
#include "kvpack/klt.h"

namespace kvpack::klt_rows {

/// Bits of r, the upper half of a float16 without its sign.
inline constexpr std::int32_t kScaleBits = 8;

/// Sections of a row in their order: fields of so many bits, then digits of so large a base.
inline constexpr std::int32_t kNumFieldSections = 6;
inline constexpr std::int32_t kNumDigitSections = 3;
inline constexpr std::int32_t kMaxGroupDigits = 6;

/// Bits of a field.
KVPACK_HOST_DEVICE constexpr std::int32_t field_bits(std::int32_t section) {
  constexpr std::int32_t kBits[kNumFieldSections] = {4, 2, 1, 6, 5, 3};
  return kBits[section];
}

/// Digits are below this.
KVPACK_HOST_DEVICE constexpr std::int32_t digit_base(std::int32_t section) { return 2 * section + 3; }

/// Digits of a group.
KVPACK_HOST_DEVICE constexpr std::int32_t group_digits(std::int32_t section) {
  constexpr std::int32_t kDigits[kNumDigitSections] = {5, 3, 6};
  return kDigits[section];
}

/// Bits of a group of `digits` digits: enough for base^digits.
KVPACK_HOST_DEVICE constexpr std::int32_t group_bits(std::int32_t section, std::int32_t digits) {
  constexpr std::int32_t kBits[kNumDigitSections][kMaxGroupDigits + 1] = {
      {0, 2, 4, 5, 7, 8, 8}, {0, 3, 5, 7, 7, 7, 7}, {0, 3, 6, 9, 12, 15, 17}};
  return kBits[section][digits];
}

/// How a coefficient of one number of levels is stored; section -1: it has no such part.
struct LevelParts {
  std::int32_t low_bits;
  std::int32_t field_section;
  std::int32_t digit_section;
};

/// `index` counts kKltLevels.
KVPACK_HOST_DEVICE constexpr LevelParts parts_of(std::int32_t index) {
  constexpr LevelParts kParts[kNumKltLevels] = {
      {6, 3, -1}, {5, 4, -1}, {2, 1, 1},  {4, 0, -1}, {2, 1, 0},  {1, 2, 1}, {3, 5, -1},  // 64 32 20 16 12 10 8
      {0, -1, 2}, {1, 2, 0},  {0, -1, 1}, {2, 1, -1}, {0, -1, 0}, {1, 2, -1}};            // 7 6 5 4 3 2
  return kParts[index];
}

/// Number of a level count in kKltLevels, or -1.
constexpr std::int32_t index_of_levels(std::int32_t levels) {
  for (std::int32_t i = 0; i < kNumKltLevels; ++i) {
    if (kKltLevels[i] == levels) return i;
  }
  return -1;
}

/// Where everything of a row lies. It follows from how many coefficients have each number of levels, since coefficients of
/// more levels come first. Trivially copyable; also handed to the CUDA library.
struct RowLayout {
  std::int32_t counts[kNumKltLevels] = {};  // coefficients of kKltLevels[i]
  std::int32_t coded = 0;
  std::int32_t num_fields[kNumFieldSections] = {};
  std::int32_t first_field_bit[kNumFieldSections] = {};
  std::int32_t num_digits[kNumDigitSections] = {};
  std::int32_t first_digit_bit[kNumDigitSections] = {};
  std::int32_t bits = 0;  // r included, padding not
  std::int32_t row_bytes = 0;
};

/// Bits of `count` digits of a section.
constexpr std::int32_t digits_bits(std::int32_t section, std::int32_t count) {
  return count / group_digits(section) * group_bits(section, group_digits(section)) +
         group_bits(section, count % group_digits(section));
}

/// The layout of rows with counts[i] coefficients of kKltLevels[i] each. No coefficient: no byte, not even r.
constexpr RowLayout make_layout(const std::int32_t (&counts)[kNumKltLevels], std::int32_t alignment) {
  RowLayout layout;
  for (std::int32_t i = 0; i < kNumKltLevels; ++i) {
    const LevelParts parts = parts_of(i);
    layout.counts[i] = counts[i];
    layout.coded += counts[i];
    if (parts.field_section >= 0) layout.num_fields[parts.field_section] += counts[i];
    if (parts.digit_section >= 0) layout.num_digits[parts.digit_section] += counts[i];
  }
  if (layout.coded == 0) return layout;
  layout.bits = kScaleBits;
  for (std::int32_t s = 0; s < kNumFieldSections; ++s) {
    layout.first_field_bit[s] = layout.bits;
    layout.bits += layout.num_fields[s] * field_bits(s);
  }
  for (std::int32_t s = 0; s < kNumDigitSections; ++s) {
    layout.first_digit_bit[s] = layout.bits;
    layout.bits += digits_bits(s, layout.num_digits[s]);
  }
  const std::int32_t row_bits = 8 * alignment;
  layout.row_bytes = (layout.bits + row_bits - 1) / row_bits * alignment;
  return layout;
}

}  // namespace kvpack::klt_rows
