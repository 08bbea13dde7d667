// Pieces of codes to the bytes of a row and back, for the SIMD side. A piece is a byte: the low bits of a code, or its digit.
// Pieces of a section stand next to each other in memory, as its fields or digits do in the row:
//
//   pieces  4s: 0d 03 | 2s: 02 01 03 00 ...        eight at a time: pext takes the bits that count, or one multiplication
//   row     r  d 3 | 2 1 3 0 ...                   makes a number of five digits

namespace kvpack::KVPACK_ISA {
namespace {

/// Bytes behind a row in working memory that are written and read with it.
inline constexpr std::int64_t kRowRoom = 16;
/// Bytes behind the pieces of a section: a vector that runs over, and zeros.
inline constexpr std::int64_t kPiecesRoom = 32;

inline constexpr std::int32_t kNumSections = klt_rows::kNumFieldSections + klt_rows::kNumDigitSections;

/// Where a class of coefficients, all with the same number of levels, has its pieces.
struct ClassPieces {
  std::int32_t levels = 0;
  std::int32_t count = 0;
  std::int32_t first_field = -1;  // place of its first low bits among all pieces; -1: none
  std::int32_t first_digit = -1;
  std::int32_t low_bits = 0;
};

/// Where all pieces lie, made once per call.
struct PiecesPlan {
  std::int32_t num_classes = 0;
  ClassPieces classes[kNumKltLevels];  // those that have coefficients, in their order
  std::int32_t first[kNumSections] = {};
  std::int32_t count[kNumSections] = {};
  std::int64_t bytes = 0;
};

inline PiecesPlan plan_pieces(const klt_rows::RowLayout& layout) {
  PiecesPlan plan;
  for (std::int32_t s = 0; s < kNumSections; ++s) {
    const bool is_field = s < klt_rows::kNumFieldSections;
    plan.first[s] = static_cast<std::int32_t>(plan.bytes);
    plan.count[s] = is_field ? layout.num_fields[s] : layout.num_digits[s - klt_rows::kNumFieldSections];
    plan.bytes += plan.count[s] + kPiecesRoom;
  }
  std::int32_t next[kNumSections];
  for (std::int32_t s = 0; s < kNumSections; ++s) next[s] = plan.first[s];
  for (std::int32_t i = 0; i < kNumKltLevels; ++i) {
    if (layout.counts[i] == 0) continue;
    const klt_rows::LevelParts parts = klt_rows::parts_of(i);
    ClassPieces& pieces = plan.classes[plan.num_classes++];
    pieces.levels = kKltLevels[i];
    pieces.count = layout.counts[i];
    pieces.low_bits = parts.low_bits;
    if (parts.field_section >= 0) {
      pieces.first_field = next[parts.field_section];
      next[parts.field_section] += pieces.count;
    }
    if (parts.digit_section >= 0) {
      std::int32_t& place = next[klt_rows::kNumFieldSections + parts.digit_section];
      pieces.first_digit = place;
      place += pieces.count;
    }
  }
  return plan;
}

/// The lowest `width` bits of eight bytes, next to each other; and back.
inline std::uint64_t squeeze_bytes(std::uint64_t bytes, int width) {
#if KVPACK_ISA_LANES > 1
  return _pext_u64(bytes, ((std::uint64_t{1} << width) - 1) * 0x0101010101010101u);
#else
  std::uint64_t fields = 0;
  for (int i = 0; i < 8; ++i) fields |= (bytes >> (8 * i) & ((std::uint64_t{1} << width) - 1)) << (i * width);
  return fields;
#endif
}
inline std::uint64_t spread_bytes(std::uint64_t fields, int width) {
#if KVPACK_ISA_LANES > 1
  return _pdep_u64(fields, ((std::uint64_t{1} << width) - 1) * 0x0101010101010101u);
#else
  std::uint64_t bytes = 0;
  for (int i = 0; i < 8; ++i) bytes |= (fields >> (i * width) & ((std::uint64_t{1} << width) - 1)) << (8 * i);
  return bytes;
#endif
}

inline std::uint64_t load_word(const std::uint8_t* bytes) {
  std::uint64_t word;
  std::memcpy(&word, bytes, sizeof(word));
  return word;
}

/// Writes bits one after another. Only stores: a load of what was just stored at another place would wait for it.
class BitWriter {
 public:
  explicit BitWriter(std::uint8_t* target) : next_(target) {}
  /// At most 56 bits; bits of `value` beyond them are 0.
  void put(std::uint64_t value, int bits) {
    word_ |= value << filled_;
    std::memcpy(next_, &word_, sizeof(word_));
    const int filled = filled_ + bits;
    next_ += filled / 8;
    word_ >>= filled / 8 * 8;
    filled_ = filled % 8;
  }

 private:
  std::uint8_t* next_;
  std::uint64_t word_ = 0;
  int filled_ = 0;
};

/// The number of a group of digits, a byte each, zeros behind them. Base 3 and 5: one multiplication adds digit times power
/// in one byte; the bytes below it stay under 256, so nothing is carried into it.
inline std::uint64_t number_of_digits(const std::uint8_t* digits, std::int32_t section) {
  if (section == 0) {
    constexpr std::uint64_t kPowers = 81 | 27 << 8 | 9 << 16 | std::uint64_t{3} << 24 | std::uint64_t{1} << 32;
    return (load_word(digits) & 0xffffffffffu) * kPowers >> 32 & 0xff;
  }
  if (section == 1) {
    constexpr std::uint64_t kPowers = 25 | 5 << 8 | 1 << 16;
    return (load_word(digits) & 0xffffffu) * kPowers >> 16 & 0xff;
  }
  std::uint64_t number = 0;
  for (int i = klt_rows::group_digits(2) - 1; i >= 0; --i) number = number * 7 + digits[i];
  return number;
}

/// Writes a row into working memory of row_bytes + kRowRoom bytes. Behind the pieces of each section stand 8 bytes of room,
/// which this clears.
inline void pack_row(const klt_rows::RowLayout& layout, const PiecesPlan& plan, Half scale, std::uint8_t* pieces,
                     std::uint8_t* row) {
  BitWriter writer(row);
  writer.put(scale.bits >> kKltScaleShift, klt_rows::kScaleBits);
  for (std::int32_t s = 0; s < klt_rows::kNumFieldSections; ++s) {
    std::uint8_t* fields = pieces + plan.first[s];
    const std::int32_t count = plan.count[s];
    const int width = klt_rows::field_bits(s);
    std::memset(fields + count, 0, 8);
    std::int32_t i = 0;
    for (; i + 8 <= count; i += 8) writer.put(squeeze_bytes(load_word(fields + i), width), 8 * width);
    if (i < count) writer.put(squeeze_bytes(load_word(fields + i), width), (count - i) * width);
  }
  for (std::int32_t s = 0; s < klt_rows::kNumDigitSections; ++s) {
    std::uint8_t* digits = pieces + plan.first[klt_rows::kNumFieldSections + s];
    const std::int32_t count = plan.count[klt_rows::kNumFieldSections + s];
    const std::int32_t group = klt_rows::group_digits(s);
    std::memset(digits + count, 0, 8);
    std::int32_t i = 0;
    for (; i + group <= count; i += group) writer.put(number_of_digits(digits + i, s), klt_rows::group_bits(s, group));
    if (i < count) writer.put(number_of_digits(digits + i, s), klt_rows::group_bits(s, count - i));
  }
  const std::int32_t written = (layout.bits + 7) / 8;
  std::memset(row + written, 0, static_cast<std::size_t>(layout.row_bytes - written));
}

/// The digits of a group of base 3 or 5, a byte each; what no group of digits is decodes to digits all the same.
struct DigitTables {
  std::uint64_t trits[256];
  std::uint32_t quints[128];
};
constexpr DigitTables make_digit_tables() {
  DigitTables tables{};
  for (std::uint32_t value = 0; value < 256; ++value) {
    std::uint32_t rest = value;
    for (int i = 0; i < 5; ++i, rest /= 3) tables.trits[value] |= static_cast<std::uint64_t>(rest % 3) << (8 * i);
  }
  for (std::uint32_t value = 0; value < 128; ++value) {
    std::uint32_t rest = value;
    for (int i = 0; i < 3; ++i, rest /= 5) tables.quints[value] |= (rest % 5) << (8 * i);
  }
  return tables;
}
inline constexpr DigitTables kDigitTables = make_digit_tables();

/// `bits` of a row, at most 57, at any bit.
inline std::uint64_t read_bits(const std::uint8_t* row, std::int64_t bit, int bits) {
  return load_word(row + bit / 8) >> (bit % 8) & ((std::uint64_t{1} << bits) - 1);
}

/// Reads a row out of working memory (kRowRoom bytes behind it can be read) into pieces, up to 8 bytes of room behind each
/// section included.
inline Half unpack_row(const klt_rows::RowLayout& layout, const PiecesPlan& plan, const std::uint8_t* row,
                       std::uint8_t* pieces) {
  for (std::int32_t s = 0; s < klt_rows::kNumFieldSections; ++s) {
    const int width = klt_rows::field_bits(s);
    std::int64_t bit = layout.first_field_bit[s];
    for (std::int32_t i = 0; i < plan.count[s]; i += 8, bit += 8 * width) {
      const std::uint64_t bytes = spread_bytes(read_bits(row, bit, 8 * width), width);
      std::memcpy(pieces + plan.first[s] + i, &bytes, sizeof(bytes));
    }
  }
  for (std::int32_t s = 0; s < klt_rows::kNumDigitSections; ++s) {
    std::uint8_t* digits = pieces + plan.first[klt_rows::kNumFieldSections + s];
    const std::int32_t count = plan.count[klt_rows::kNumFieldSections + s];
    const std::int32_t group = klt_rows::group_digits(s);
    std::int64_t bit = layout.first_digit_bit[s];
    for (std::int32_t i = 0; i < count; i += group) {
      const std::int32_t bits = klt_rows::group_bits(s, count - i < group ? count - i : group);
      std::uint64_t number = read_bits(row, bit, bits);
      bit += bits;
      if (s == 0) {
        std::memcpy(digits + i, &kDigitTables.trits[number], 8);
      } else if (s == 1) {
        std::memcpy(digits + i, &kDigitTables.quints[number], 4);
      } else {
        for (std::int32_t j = 0; j < group; ++j, number /= 7) digits[i + j] = static_cast<std::uint8_t>(number % 7);
      }
    }
  }
  return Half{static_cast<std::uint16_t>(klt_scale_bits(row[0]))};
}

}  // namespace
}  // namespace kvpack::KVPACK_ISA
