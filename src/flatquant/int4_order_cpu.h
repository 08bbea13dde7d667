// The order in which the linear layer multiplies codes, and rows as bytes in it. Compiled once per instruction set, behind
// codes_cpu.h and dots_cpu.h; without an include guard.
//
// Packed weights are never put in order: a vector of bytes is split into low and high nibbles, the even and the odd codes of
// a block of two vectors, and everything else lies in that order.

namespace kvpack::KVPACK_ISA {
namespace {

inline constexpr std::int64_t kDotBlock = 2 * kVectorBytes;  // codes

inline const std::byte* row_of(const Int4Data& rows, std::int64_t row) {
  return static_cast<const std::byte*>(rows.codes) + row * row_bytes_of_codes(rows.form, rows.columns);
}

/// Where code c of a row lies among the prepared ones.
inline std::int64_t place_of(std::int64_t c, bool is_split) {
  if (!is_split) return c;
  return c / kDotBlock * kDotBlock + c % 2 * kVectorBytes + c % kDotBlock / 2;
}

/// Writes q - zero of one row as signed bytes in the order of the weights, zeros behind n. is_split: weights are packed.
inline void prepare_codes(const Int4Data& x, std::int64_t token, bool is_split, std::int8_t* codes,
                          std::int64_t stride) {
  const std::byte* row = row_of(x, token);
  const int zero = x.zeros == nullptr ? 0 : static_cast<int>(x.zeros[token]);
  std::int64_t c = 0;
  if (is_split && x.form != CodeForm::kInt8) {
    const Bytes flip = set_bytes(static_cast<int>(flip_of(x.encoding) ^ 8u));
    const Bytes origin = set_bytes(-8 - zero);
    for (; c + kDotBlock <= x.columns; c += kDotBlock) {
      const Bytes packed = load_vector(row + c / 2);
      store_vector(codes + c, add_bytes(flip_bits(low_nibbles(packed), flip), origin));
      store_vector(codes + c + kVectorBytes, add_bytes(flip_bits(high_nibbles(packed), flip), origin));
    }
  }
  std::fill_n(codes + c, stride - c, std::int8_t{0});
  for (; c < x.columns; ++c) {
    codes[place_of(c, is_split)] = static_cast<std::int8_t>(read_code(row, c, x.form, x.encoding) - zero);
  }
}

}  // namespace
}  // namespace kvpack::KVPACK_ISA
