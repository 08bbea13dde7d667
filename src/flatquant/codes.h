// Where a code lies in each form: one code at a time, for references and tails.
#pragma once

#include <cstdint>

#include "flatquant/implementations.h"
#include "flatquant/rules.h"

namespace kvpack {

/// Codes in one element of a form.
KVPACK_HOST_DEVICE constexpr std::int64_t codes_per_element(CodeForm form) {
  return form == CodeForm::kPackedWords ? 8 : (form == CodeForm::kPairs ? 2 : 1);
}

/// Bytes of one row of n codes.
KVPACK_HOST_DEVICE constexpr std::int64_t row_bytes_of_codes(CodeForm form, std::int64_t columns) {
  return form == CodeForm::kInt8 ? columns : columns / 2;
}

/// Code `index` of a row. Words are little-endian, as every machine that kvpack knows, so both packed forms are bytes.
KVPACK_HOST_DEVICE inline int read_code(const void* row, std::int64_t index, CodeForm form, CodeEncoding encoding) {
  if (form == CodeForm::kInt8) return static_cast<const std::int8_t*>(row)[index];
  const std::uint32_t pair = static_cast<const std::uint8_t*>(row)[index / 2];
  return code_of_nibble(pair >> (4 * (index % 2)), encoding);
}

/// Writes codes 2*pair and 2*pair + 1 of a row in a packed form.
KVPACK_HOST_DEVICE inline void write_pair(void* row, std::int64_t pair, int low, int high, CodeEncoding encoding) {
  static_cast<std::uint8_t*>(row)[pair] =
      static_cast<std::uint8_t>(nibble_of(low, encoding) | nibble_of(high, encoding) << 4);
}

}  // namespace kvpack
