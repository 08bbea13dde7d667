// Between floats and int4 codes, a block of codes at a time, in the instruction set at hand. Compiled once per instruction
// set; without an include guard.
//
// A block is kCodeBlock codes, four vectors of floats. Packing two codes into a byte multiplies neighbours by 1 and 16 and
// adds them, which is one instruction for all pairs (vpmaddubsw).

namespace kvpack::KVPACK_ISA {
namespace {

inline constexpr std::int64_t kCodeBlock = 4 * kLanes;

/// A row's grid as vectors. Values are clamped before they are rounded, so that the conversion to whole numbers never overflows;
/// the bounds are whole, so nothing changes.
struct GridVectors {
  explicit GridVectors(const RowGrid& grid)
      : inverse(set1(grid.inverse)), lowest(set1(kLowestCode - grid.zero)), highest(set1(kHighestCode - grid.zero)) {
    zero = static_cast<int>(grid.zero);
  }
  [[nodiscard]] F32 clamped(const float* y) const { return min(max(mul(load(y), inverse), lowest), highest); }
  F32 inverse;
  F32 lowest;
  F32 highest;
  int zero;
};

#if KVPACK_ISA_LANES == 16

using CodeBytes = __m512i;  // one code a byte, in order

inline CodeBytes block_codes(const float* y, const GridVectors& grid) {
  const auto whole = [&](int i) { return _mm512_cvtps_epi32(grid.clamped(y + 16 * i)); };
  const __m512i low = _mm512_packs_epi32(whole(0), whole(1));
  const __m512i high = _mm512_packs_epi32(whole(2), whole(3));
  // The packs interleave quarters: word 4*i + v of the result comes from vector v.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
  return _mm512_add_epi8(bytes, _mm512_set1_epi8(static_cast<char>(grid.zero)));
}
inline void store_bytes(CodeBytes codes, std::byte* target) { _mm512_storeu_si512(target, codes); }
inline void store_pairs(CodeBytes codes, unsigned flip, std::byte* target) {
  const __m512i nibbles =
      _mm512_xor_si512(_mm512_and_si512(codes, _mm512_set1_epi8(15)), _mm512_set1_epi8(static_cast<char>(flip)));
  const __m512i pairs = _mm512_maddubs_epi16(nibbles, _mm512_set1_epi16(0x1001));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_cvtepi16_epi8(pairs));
}
/// kLanes codes from kLanes/2 packed bytes.
inline F32 load_pairs(const std::byte* source, unsigned flip) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(source));
  const __m128i nibbles = _mm_and_si128(_mm_unpacklo_epi8(bytes, _mm_srli_epi16(bytes, 4)), _mm_set1_epi8(15));
  const __m128i codes =
      _mm_sub_epi8(_mm_xor_si128(nibbles, _mm_set1_epi8(static_cast<char>(flip ^ 8u))), _mm_set1_epi8(8));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
}
inline F32 load_bytes(const std::byte* source) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))));
}

#elif KVPACK_ISA_LANES == 8

using CodeBytes = __m256i;

inline CodeBytes block_codes(const float* y, const GridVectors& grid) {
  const auto whole = [&](int i) { return _mm256_cvtps_epi32(grid.clamped(y + 8 * i)); };
  const __m256i low = _mm256_packs_epi32(whole(0), whole(1));
  const __m256i high = _mm256_packs_epi32(whole(2), whole(3));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
  return _mm256_add_epi8(bytes, _mm256_set1_epi8(static_cast<char>(grid.zero)));
}
inline void store_bytes(CodeBytes codes, std::byte* target) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), codes);
}
inline void store_pairs(CodeBytes codes, unsigned flip, std::byte* target) {
  const __m256i nibbles =
      _mm256_xor_si256(_mm256_and_si256(codes, _mm256_set1_epi8(15)), _mm256_set1_epi8(static_cast<char>(flip)));
  const __m256i pairs = _mm256_maddubs_epi16(nibbles, _mm256_set1_epi16(0x1001));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_castsi256_si128(packed));
}
inline F32 load_pairs(const std::byte* source, unsigned flip) {
  std::int32_t word;
  std::memcpy(&word, source, sizeof(word));
  const __m128i bytes = _mm_cvtsi32_si128(word);
  const __m128i nibbles = _mm_and_si128(_mm_unpacklo_epi8(bytes, _mm_srli_epi16(bytes, 4)), _mm_set1_epi8(15));
  const __m128i codes =
      _mm_sub_epi8(_mm_xor_si128(nibbles, _mm_set1_epi8(static_cast<char>(flip ^ 8u))), _mm_set1_epi8(8));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
}
inline F32 load_bytes(const std::byte* source) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source))));
}

#else

struct CodeBytes {
  std::int8_t of[kCodeBlock];
};

inline CodeBytes block_codes(const float* y, const GridVectors& grid) {
  CodeBytes codes;
  for (int i = 0; i < kCodeBlock; ++i) {
    codes.of[i] = static_cast<std::int8_t>(static_cast<int>(round_even(grid.clamped(y + i))) + grid.zero);
  }
  return codes;
}
inline void store_bytes(CodeBytes codes, std::byte* target) { std::memcpy(target, codes.of, kCodeBlock); }
inline void store_pairs(CodeBytes codes, unsigned flip, std::byte* target) {
  for (int i = 0; i < kCodeBlock; i += 2) {
    const auto nibble = [&](int at) { return (static_cast<unsigned>(codes.of[at]) & 15u) ^ flip; };
    target[i / 2] = static_cast<std::byte>(nibble(i) | nibble(i + 1) << 4);
  }
}
#endif

/// Flips the sign bit of every code where the form stores q + 8.
inline unsigned flip_of(CodeEncoding encoding) { return encoding == CodeEncoding::kOffset ? 8u : 0u; }

inline void store_block(CodeBytes codes, CodeForm form, unsigned flip, std::byte* target) {
  if (form == CodeForm::kInt8) {
    store_bytes(codes, target);
  } else {
    store_pairs(codes, flip, target);
  }
}

/// Writes the codes of one finite row of n values; y may be read up to a block past its end.
inline void write_row_codes(const float* y, std::int64_t n, const RowGrid& row_grid, CodeForm form,
                            CodeEncoding encoding, std::byte* row) {
  const GridVectors grid(row_grid);
  const unsigned flip = flip_of(encoding);
  const std::int64_t block_bytes = row_bytes_of_codes(form, kCodeBlock);
  std::int64_t i = 0;
  for (; i + kCodeBlock <= n; i += kCodeBlock) {
    store_block(block_codes(y + i, grid), form, flip, row);
    row += block_bytes;
  }
  if (i == n) return;
  std::byte last[kCodeBlock];
  store_block(block_codes(y + i, grid), form, flip, last);
  std::memcpy(row, last, static_cast<std::size_t>(row_bytes_of_codes(form, n - i)));
}

}  // namespace
}  // namespace kvpack::KVPACK_ISA
