// Reference codec of klt_rows: codes of one token to the bytes of its row and back, and what is wrong with a row.
#pragma once

#include <cstdint>
#include <vector>

#include "core/half.h"
#include "formats/klt_rows/layout.h"

namespace kvpack::klt_rows {

/// One token between values and bytes: r and a code for each coded coefficient.
struct TokenCodes {
  Half scale{0};  // as klt_scale_bits makes it
  std::vector<std::uint32_t> codes;
};

/// Writes all layout.row_bytes bytes.
void write_row(const RowLayout& layout, const TokenCodes& token, std::uint8_t* row);

/// Reads a row, whatever its bytes are: codes are always below their levels.
TokenCodes read_row(const RowLayout& layout, const std::uint8_t* row);

/// The first thing wrong with a row.
enum class RowFault : std::int32_t { kNone, kScale, kDigits, kPadding };
struct RowFinding {
  RowFault fault = RowFault::kNone;
  std::int32_t bit = 0;        // where in the row
  std::uint32_t actual = 0;    // the bits there: the code of r, of a group of digits, of the padding byte
  std::uint32_t expected = 0;  // of digits: they must lie below this
};
RowFinding check_row(const RowLayout& layout, const std::uint8_t* row);

}  // namespace kvpack::klt_rows
