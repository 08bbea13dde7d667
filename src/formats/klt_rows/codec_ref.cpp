// Reference codec of klt_rows, bit by bit as layout.h draws a row.
#include "formats/klt_rows/codec_ref.h"

#include <algorithm>

#include "klt/rules.h"

namespace kvpack::klt_rows {

namespace {

void put_bits(std::uint8_t* row, std::int32_t first, std::int32_t count, std::uint32_t value) {
  for (std::int32_t i = 0; i < count; ++i) {
    const std::int32_t bit = first + i;
    row[bit / 8] = static_cast<std::uint8_t>(row[bit / 8] | ((value >> i) & 1u) << (bit % 8));
  }
}

std::uint32_t get_bits(const std::uint8_t* row, std::int32_t first, std::int32_t count) {
  std::uint32_t value = 0;
  for (std::int32_t i = 0; i < count; ++i) {
    const std::int32_t bit = first + i;
    value |= static_cast<std::uint32_t>((row[bit / 8] >> (bit % 8)) & 1) << i;
  }
  return value;
}

/// One group of a section's digits: where it lies and how many digits it has.
struct Group {
  std::int32_t bit;
  std::int32_t bits;
  std::int32_t digits;
};

Group group_of(const RowLayout& layout, std::int32_t section, std::int32_t index) {
  const std::int32_t full = group_digits(section);
  const std::int32_t digits = std::min(full, layout.num_digits[section] - index * full);
  return {layout.first_digit_bit[section] + index * group_bits(section, full), group_bits(section, digits), digits};
}

std::int32_t num_groups(const RowLayout& layout, std::int32_t section) {
  return (layout.num_digits[section] + group_digits(section) - 1) / group_digits(section);
}

std::uint32_t power(std::int32_t base, std::int32_t exponent) {
  std::uint32_t result = 1;
  for (std::int32_t i = 0; i < exponent; ++i) result *= static_cast<std::uint32_t>(base);
  return result;
}

/// Calls body(parts, place of its field in the section, place of its digit) for each coded coefficient.
template <typename Body>
void for_each_coefficient(const RowLayout& layout, Body&& body) {
  std::int32_t fields[kNumFieldSections] = {};
  std::int32_t digits[kNumDigitSections] = {};
  for (std::int32_t i = 0; i < kNumKltLevels; ++i) {
    const LevelParts parts = parts_of(i);
    for (std::int32_t n = 0; n < layout.counts[i]; ++n) {
      const std::int32_t field = parts.field_section >= 0 ? fields[parts.field_section]++ : 0;
      const std::int32_t digit = parts.digit_section >= 0 ? digits[parts.digit_section]++ : 0;
      body(parts, field, digit);
    }
  }
}

}  // namespace

void write_row(const RowLayout& layout, const TokenCodes& token, std::uint8_t* row) {
  if (layout.coded == 0) return;
  std::fill(row, row + layout.row_bytes, std::uint8_t{0});
  put_bits(row, 0, kScaleBits, token.scale.bits >> kKltScaleShift);
  std::vector<std::uint32_t> digits[kNumDigitSections];
  std::size_t k = 0;
  for_each_coefficient(layout, [&](LevelParts parts, std::int32_t field, std::int32_t) {
    const std::uint32_t code = token.codes[k++];
    if (parts.field_section >= 0) {
      const std::int32_t bit = layout.first_field_bit[parts.field_section] + field * parts.low_bits;
      put_bits(row, bit, parts.low_bits, code & ((1u << parts.low_bits) - 1u));
    }
    if (parts.digit_section >= 0) digits[parts.digit_section].push_back(code >> parts.low_bits);
  });
  for (std::int32_t s = 0; s < kNumDigitSections; ++s) {
    for (std::int32_t g = 0; g < num_groups(layout, s); ++g) {
      const Group group = group_of(layout, s, g);
      std::uint32_t value = 0;
      for (std::int32_t i = group.digits - 1; i >= 0; --i) {
        value = value * static_cast<std::uint32_t>(digit_base(s)) +
                digits[s][static_cast<std::size_t>(g * group_digits(s) + i)];
      }
      put_bits(row, group.bit, group.bits, value);
    }
  }
}

TokenCodes read_row(const RowLayout& layout, const std::uint8_t* row) {
  TokenCodes token;
  if (layout.coded == 0) return token;
  token.scale.bits = static_cast<std::uint16_t>(klt_scale_bits(get_bits(row, 0, kScaleBits)));
  for_each_coefficient(layout, [&](LevelParts parts, std::int32_t field, std::int32_t digit) {
    std::uint32_t code = 0;
    if (parts.field_section >= 0) {
      code = get_bits(row, layout.first_field_bit[parts.field_section] + field * parts.low_bits, parts.low_bits);
    }
    if (parts.digit_section >= 0) {
      const std::int32_t s = parts.digit_section;
      const Group group = group_of(layout, s, digit / group_digits(s));
      const std::uint32_t value = get_bits(row, group.bit, group.bits);
      const auto base = static_cast<std::uint32_t>(digit_base(s));
      code |= value / power(digit_base(s), digit % group_digits(s)) % base << parts.low_bits;
    }
    token.codes.push_back(code);
  });
  return token;
}

RowFinding check_row(const RowLayout& layout, const std::uint8_t* row) {
  if (layout.coded == 0) return {};
  const std::uint32_t scale = get_bits(row, 0, kScaleBits);
  if (scale >= kKltScaleCodes) return {RowFault::kScale, 0, scale, 0};
  for (std::int32_t s = 0; s < kNumDigitSections; ++s) {
    for (std::int32_t g = 0; g < num_groups(layout, s); ++g) {
      const Group group = group_of(layout, s, g);
      const std::uint32_t value = get_bits(row, group.bit, group.bits);
      const std::uint32_t end = power(digit_base(s), group.digits);
      if (value >= end) return {RowFault::kDigits, group.bit, value, end};
    }
  }
  for (std::int32_t bit = layout.bits; bit < 8 * layout.row_bytes; ++bit) {
    if (get_bits(row, bit, 1) != 0) return {RowFault::kPadding, bit, 1, 0};
  }
  return {};
}

}  // namespace kvpack::klt_rows
