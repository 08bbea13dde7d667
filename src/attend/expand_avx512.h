// Tiles to 64 floats with AVX-512, VBMI and VBMI2: one expand instruction puts a whole tile's codes, a byte each, at the
// places of their elements; a table in a register turns them into floats. Included by attend/expand_cpu.h.
//
//   2 bits, survivors at elements 1, 2, 5 with codes c0 c1 c2; * is 12, which makes a survivor's index 12 + code
//     payload    ..c2c1c0                 spread (multishift)  | *c0 *c1 *c2 ...         |  one byte each
//     expand     | 0 *c0 *c1 0 0 *c2 0 0 |   table | 0 .. 0 v(0) v(1) v(2) v(3) |, so that an empty place looks up 0
//   A double word then holds the bytes of elements 4i .. 4i+3, and a shift by 8j brings element 4i+j's to the low bits that
//   the look-up reads: vector j holds elements 4i+j. Widening bytes in element order instead (vpmovzxbd) would load
//   the one port that permutes. Sums over tiles keep that order and are put right at the end (order_elements).
#pragma once

namespace kvpack::avx512 {
namespace {

/// Bitmaps of kTileElements tiles with element i in bit i, as the expansions below want them.
inline void reverse_bitmaps(const std::uint64_t* bitmaps, std::uint64_t* masks) {
  const __m512i low_nibbles = _mm512_set1_epi8(0x0f);
  const __m512i reversed = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0x0, 0x8, 0x4, 0xc, 0x2, 0xa, 0x6, 0xe, 0x1, 0x9, 0x5, 0xd, 0x3, 0xb, 0x7, 0xf));
  const __m512i swapped = _mm512_broadcast_i32x4(_mm_setr_epi8(7, 6, 5, 4, 3, 2, 1, 0, 15, 14, 13, 12, 11, 10, 9, 8));
  for (std::int64_t t = 0; t < kTileElements; t += 8) {
    const __m512i bytes = _mm512_shuffle_epi8(_mm512_loadu_si512(bitmaps + t), swapped);
    const __m512i low = _mm512_shuffle_epi8(reversed, _mm512_and_si512(bytes, low_nibbles));
    const __m512i high = _mm512_shuffle_epi8(reversed, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low_nibbles));
    _mm512_storeu_si512(masks + t, _mm512_or_si512(_mm512_slli_epi16(low, 4), high));
  }
}

inline bool rounds(const RoundedGrid& grid) { return grid.half_step != 0; }

/// A NaN stays as it is: adding to one whose bits are all set would make it -0.
inline __m512 round_values(__m512 values, const RoundedGrid& grid) {
  const __m512i words = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(words, 16), set1_u32(grid.odd_bit));
  const __m512i raised = _mm512_add_epi32(words, _mm512_add_epi32(odd, set1_u32(grid.half_step)));
  return _mm512_castsi512_ps(_mm512_mask_and_epi32(words, eq(values, values), raised, set1_u32(grid.kept_bits)));
}

/// Codes 0, 1, .. in the upper lanes of a table that starts with `first`.
inline __m512 table_of(int first, RoundedGrid grid) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 codes = _mm512_cvtepi32_ps(_mm512_sub_epi32(lanes, _mm512_set1_epi32(first)));
  const auto upper = static_cast<__mmask16>(0xffffu << first);
  const __m512 values = _mm512_maskz_mul_ps(upper, sub(codes, set1(grid.zero)), set1(grid.scale));
  return rounds(grid) ? round_values(values, grid) : values;
}

/// An expanded tile in registers.
struct TileVectors {
  __m512 of[4];
};

inline TileVectors round_tile(const TileVectors& tile, const RoundedGrid& grid) {
  return {{round_values(tile.of[0], grid), round_values(tile.of[1], grid), round_values(tile.of[2], grid),
           round_values(tile.of[3], grid)}};
}

/// Looks up the low four bits of each byte.
inline TileVectors look_up(__m512i bytes, __m512 table) {
  return {{_mm512_permutexvar_ps(bytes, table), _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 8), table),
           _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 16), table),
           _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 24), table)}};
}

inline std::uint64_t load_word(const std::byte* bytes) {
  std::uint64_t word = 0;
  std::memcpy(&word, bytes, sizeof(word));
  return word;
}

inline TileVectors expand(Codes<1>, std::uint64_t mask, const std::byte* bytes, RoundedGrid grid) {
  // A bit is spread as it is; survivors' bytes are 14 + code.
  const std::uint64_t ones = _pdep_u64(load_word(bytes), mask);
  const __m512i survivors = _mm512_maskz_mov_epi8(mask, _mm512_set1_epi8(14));
  return look_up(_mm512_mask_mov_epi8(survivors, ones, _mm512_set1_epi8(15)), table_of(14, grid));
}

inline TileVectors expand(Codes<2>, std::uint64_t mask, const std::byte* bytes, RoundedGrid grid) {
  // Each word of 64 bits holds 32 codes and feeds four words of eight bytes.
  const auto* words = reinterpret_cast<const __m128i*>(bytes);
  const __m512i first = _mm512_broadcastq_epi64(_mm_loadl_epi64(words));
  const __m512i codes =
      _mm512_mask_broadcastq_epi64(first, 0xf0, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + 8)));
  const __m512i shifts = _mm512_broadcast_i64x4(
      _mm256_setr_epi64x(0x0e0c0a0806040200, 0x1e1c1a1816141210, 0x2e2c2a2826242220, 0x3e3c3a3836343230));
  const __m512i spread = _mm512_or_si512(_mm512_multishift_epi64_epi8(shifts, codes), _mm512_set1_epi8(~3));
  return look_up(_mm512_maskz_expand_epi8(mask, spread), table_of(12, grid));
}

inline TileVectors expand(Codes<4>, std::uint64_t mask, const std::byte* bytes, RoundedGrid grid) {
  // A byte becomes a word 0000'0000'bbbb'aaaa, and that xxx1'bbbb'xxx1'aaaa: bit 4 says survivor, and chooses the table.
  const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
  const __m512i low_nibbles = _mm512_set1_epi8(0x0f);
  // 0xfd: (a or b) where the third operand is set, else 1
  const __m512i spread = _mm512_ternarylogic_epi32(words, _mm512_slli_epi16(words, 4), low_nibbles, 0xfd);
  const __m512i placed = _mm512_maskz_expand_epi8(mask, spread);
  const __m512 table = table_of(0, grid);
  const __m512 nothing = _mm512_setzero_ps();
  return {{_mm512_permutex2var_ps(nothing, placed, table),
           _mm512_permutex2var_ps(nothing, _mm512_srli_epi32(placed, 8), table),
           _mm512_permutex2var_ps(nothing, _mm512_srli_epi32(placed, 16), table),
           _mm512_permutex2var_ps(nothing, _mm512_srli_epi32(placed, 24), table)}};
}

inline TileVectors expand(Codes<8>, std::uint64_t mask, const std::byte* bytes, RoundedGrid grid) {
  const __m512i placed = _mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(bytes));
  const __m512 zero = set1(grid.zero);
  const __m512 scale = set1(grid.scale);
  TileVectors tile;
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i codes =
        _mm512_and_si512(_mm512_srli_epi32(placed, static_cast<unsigned>(8 * j)), _mm512_set1_epi32(255));
    const auto kept = static_cast<__mmask16>(_pext_u64(mask, std::uint64_t{0x1111111111111111} << j));
    tile.of[j] = _mm512_maskz_mul_ps(kept, sub(_mm512_cvtepi32_ps(codes), zero), scale);
  }
  return rounds(grid) ? round_tile(tile, grid) : tile;
}

/// 64 halves at the places of their elements, 32 a vector.
struct PlacedHalves {
  __m512i low;
  __m512i high;
};

inline PlacedHalves place_halves(std::uint64_t mask, const std::byte* bytes) {
  const auto low = static_cast<std::uint32_t>(mask);
  const auto high = static_cast<std::uint32_t>(mask >> 32);
  return {_mm512_maskz_expand_epi16(low, _mm512_loadu_si512(bytes)),
          _mm512_maskz_expand_epi16(high, _mm512_loadu_si512(bytes + 2 * std::popcount(low)))};
}

inline TileVectors expand(Halves<Half>, std::uint64_t mask, const std::byte* bytes, RoundedGrid grid) {
  const PlacedHalves placed = place_halves(mask, bytes);
  TileVectors tile = {{_mm512_cvtph_ps(_mm512_castsi512_si256(placed.low)),
                       _mm512_cvtph_ps(_mm512_extracti64x4_epi64(placed.low, 1)),
                       _mm512_cvtph_ps(_mm512_castsi512_si256(placed.high)),
                       _mm512_cvtph_ps(_mm512_extracti64x4_epi64(placed.high, 1))}};
  // Only for queries of another type than the payload.
  return rounds(grid) ? round_tile(tile, grid) : tile;
}

/// Vectors 0 and 1 hold the even and the odd ones of elements 0 to 31, vectors 2 and 3 of the others.
inline TileVectors expand(Halves<BFloat16>, std::uint64_t mask, const std::byte* bytes, RoundedGrid) {
  const PlacedHalves placed = place_halves(mask, bytes);
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(placed.low, 16)),
           _mm512_castsi512_ps(_mm512_and_si512(placed.low, upper)),
           _mm512_castsi512_ps(_mm512_slli_epi32(placed.high, 16)),
           _mm512_castsi512_ps(_mm512_and_si512(placed.high, upper))}};
}

inline void store_tile(const TileVectors& tile, float* out) {
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) store(out + 16 * v, tile.of[v]);
}

/// The same to memory, as the other instruction sets do.
template <typename Survivor>
inline void expand(Survivor, std::uint64_t mask, const std::byte* bytes, RoundedGrid grid, float* out) {
  store_tile(expand(Survivor{}, mask, bytes, grid), out);
}

/// Puts 64 sums over expanded tiles into element order.
template <int kBits>
inline void order_elements(Codes<kBits>, float* sums) {
  // Element e of output w is lane 4w + e/4 of vector e mod 4; the second operand's lanes count from 16.
  __m512i pair = _mm512_setr_epi32(0, 16, 0, 16, 1, 17, 1, 17, 2, 18, 2, 18, 3, 19, 3, 19);
  const __m512 even0 = load(sums);
  const __m512 odd0 = load(sums + 16);
  const __m512 even1 = load(sums + 32);
  const __m512 odd1 = load(sums + 48);
  for (int w = 0; w < 4; ++w, pair = _mm512_add_epi32(pair, _mm512_set1_epi32(4))) {
    const __m512 first = _mm512_permutex2var_ps(even0, pair, odd0);
    const __m512 second = _mm512_permutex2var_ps(even1, pair, odd1);
    store(sums + 16 * w, _mm512_mask_blend_ps(0xcccc, first, second));
  }
}

inline void order_elements(Halves<Half>, float*) {}

inline void order_elements(Halves<BFloat16>, float* sums) {
  const __m512i lower = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(8));
  for (int half = 0; half < 2; ++half, sums += 32) {
    const __m512 even = load(sums);
    const __m512 odd = load(sums + 16);
    store(sums, _mm512_permutex2var_ps(even, lower, odd));
    store(sums + 16, _mm512_permutex2var_ps(even, upper, odd));
  }
}

}  // namespace
}  // namespace kvpack::avx512
