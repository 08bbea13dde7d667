// Words on 64 elements that AVX2 and AVX-512 share: BMI2 on codes, SSE2 transposes. Included once per instruction set,
// inside its target region. What each word means stands in isa/tiles_scalar.h.

namespace kvpack::KVPACK_ISA {
namespace {

inline constexpr int kTileRoom = 72;

/// A word whose lowest kBits of every kEach bits are set.
template <int kBits, int kEach>
inline constexpr std::uint64_t kFields =
    ~std::uint64_t{0} / ((std::uint64_t{1} << (kEach - 1)) * 2 - 1) * ((std::uint64_t{1} << kBits) - 1);

/// Widens mask bits to fields: for 2 bits 0b101 becomes 0b110011.
template <int kBits>
inline std::uint64_t spread_mask(std::uint64_t mask) {
  if constexpr (kBits == 1) {
    return mask;
  } else {
    return _pdep_u64(mask, kFields<1, kBits>) * ((std::uint64_t{1} << kBits) - 1);
  }
}

template <int kBits, int kElements>
inline void pack_codes(const std::uint8_t* codes, std::uint64_t mask, std::uint8_t* target) {
  constexpr int kGroup = 64 / kBits < kElements ? 64 / kBits : kElements;  // codes of a 64-bit word
  std::uint64_t word = 0;
  int filled = 0;
  for (int first = 0; first < kElements; first += kGroup) {
    std::uint64_t dense = 0;
    for (int i = 0; i < kGroup; i += 8) {
      std::uint64_t bytes;
      std::memcpy(&bytes, codes + first + i, sizeof(bytes));
      dense |= (kBits == 8 ? bytes : _pext_u64(bytes, kFields<kBits, 8>)) << (i * kBits % 64);
    }
    const std::uint64_t group_mask = kGroup == 64 ? mask : (mask >> first) & ((std::uint64_t{1} << (kGroup % 64)) - 1);
    const std::uint64_t fields = _pext_u64(dense, spread_mask<kBits>(group_mask));
    word |= fields << filled;
    std::memcpy(target, &word, sizeof(word));
    // When the word overflows, what did not fit starts the next one; a shift by 64 must become one by 0 of nothing.
    const int end = filled + kBits * std::popcount(group_mask);
    const bool is_full = end >= 64;
    const std::uint64_t rest = filled == 0 ? 0 : fields >> (64 - filled);
    word = is_full ? rest : word;
    target += is_full ? 8 : 0;
    filled = end % 64;
  }
  if (filled > 0) std::memcpy(target, &word, sizeof(word));
}

template <int kBits>
inline void unpack_codes(const std::uint8_t* source, std::uint64_t mask, std::uint8_t* codes) {
  constexpr int kGroup = 64 / kBits;
  int position = 0;
  for (int first = 0; first < 64; first += kGroup) {
    const std::uint64_t group_mask = kGroup == 64 ? mask : (mask >> first) & ((std::uint64_t{1} << (kGroup % 64)) - 1);
    std::uint64_t low;
    std::memcpy(&low, source + position / 8, sizeof(low));
    std::uint64_t fields = low >> (position % 8);
    if (position % 8 != 0) fields |= static_cast<std::uint64_t>(source[position / 8 + 8]) << (64 - position % 8);
    const std::uint64_t dense = _pdep_u64(fields, spread_mask<kBits>(group_mask));
    for (int i = 0; i < kGroup; i += 8) {
      const std::uint64_t some = dense >> (i * kBits % 64);
      const std::uint64_t bytes = kBits == 8 ? some : _pdep_u64(some, kFields<kBits, 8>);
      std::memcpy(codes + first + i, &bytes, sizeof(bytes));
    }
    position += kBits * std::popcount(group_mask);
  }
}

/// transpose8 of 16 columns of 16 bits: the low halves of the vectors hold columns 0 .. 7, the high ones 8 .. 15.
inline void transpose_words(const std::uint16_t* source, std::int64_t source_stride, std::uint16_t* target,
                            std::int64_t target_stride) {
  __m256i rows[8];
  __m256i pairs[8];
  __m256i quads[8];
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i * source_stride));
  }
  for (int i = 0; i < 4; ++i) {
    pairs[2 * i] = _mm256_unpacklo_epi16(rows[2 * i], rows[2 * i + 1]);      // columns 0 .. 3 of two rows
    pairs[2 * i + 1] = _mm256_unpackhi_epi16(rows[2 * i], rows[2 * i + 1]);  // columns 4 .. 7
  }
  for (int half = 0; half < 2; ++half) {  // rows 0 .. 3, then 4 .. 7
    for (int side = 0; side < 2; ++side) {
      const __m256i first = pairs[4 * half + side];
      const __m256i second = pairs[4 * half + 2 + side];
      quads[4 * half + 2 * side] = _mm256_unpacklo_epi32(first, second);
      quads[4 * half + 2 * side + 1] = _mm256_unpackhi_epi32(first, second);
    }
  }
  const auto store_column = [&](int column, __m256i words) {
    auto* to = target + column * target_stride;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(words));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8 * target_stride), _mm256_extracti128_si256(words, 1));
  };
  for (int i = 0; i < 4; ++i) {
    store_column(2 * i, _mm256_unpacklo_epi64(quads[i], quads[i + 4]));
    store_column(2 * i + 1, _mm256_unpackhi_epi64(quads[i], quads[i + 4]));
  }
}

template <typename T>
inline void transpose8(const T* source, std::int64_t source_stride, int num_columns, T* target,
                       std::int64_t target_stride) {
  if constexpr (sizeof(T) == 2) {
    for (int column = 0; column < num_columns; column += 16) {
      transpose_words(&source[column].bits, source_stride, &target[column * target_stride].bits, target_stride);
    }
  } else {
    for (int column = 0; column < num_columns; column += 4) {
      for (int row = 0; row < 8; row += 4) {
        const T* from = source + row * source_stride + column;
        T* to = target + column * target_stride + row;
        __m128 a = _mm_loadu_ps(from);
        __m128 b = _mm_loadu_ps(from + source_stride);
        __m128 c = _mm_loadu_ps(from + 2 * source_stride);
        __m128 d = _mm_loadu_ps(from + 3 * source_stride);
        _MM_TRANSPOSE4_PS(a, b, c, d);
        _mm_storeu_ps(to, a);
        _mm_storeu_ps(to + target_stride, b);
        _mm_storeu_ps(to + 2 * target_stride, c);
        _mm_storeu_ps(to + 3 * target_stride, d);
      }
    }
  }
}

}  // namespace
}  // namespace kvpack::KVPACK_ISA
