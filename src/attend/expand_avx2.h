// Tiles to 64 floats with AVX2 and BMI2: pdep spreads codes to the places of their elements, a permutation looks values up.
// Included by attend/expand_cpu.h. pdep takes one cycle from Haswell and Zen 3 on; before Zen 3 it is microcode, and slow.
#pragma once

namespace kvpack::avx2 {
namespace {

/// Bitmaps of kTileElements tiles with element i in bit i, as the expansions below want them.
inline void reverse_bitmaps(const std::uint64_t* bitmaps, std::uint64_t* masks) {
  const __m256i low_nibbles = _mm256_set1_epi8(0x0f);
  const __m256i reversed = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0x0, 0x8, 0x4, 0xc, 0x2, 0xa, 0x6, 0xe, 0x1, 0x9, 0x5, 0xd, 0x3, 0xb, 0x7, 0xf));
  const __m256i swapped =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(7, 6, 5, 4, 3, 2, 1, 0, 15, 14, 13, 12, 11, 10, 9, 8));
  for (std::int64_t t = 0; t < kTileElements; t += 4) {
    const __m256i bytes =
        _mm256_shuffle_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bitmaps + t)), swapped);
    const __m256i low = _mm256_shuffle_epi8(reversed, _mm256_and_si256(bytes, low_nibbles));
    const __m256i high = _mm256_shuffle_epi8(reversed, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low_nibbles));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(masks + t), _mm256_or_si256(_mm256_slli_epi16(low, 4), high));
  }
}

/// 64 bits from a byte address.
inline std::uint64_t load_word(const std::byte* bytes) {
  std::uint64_t word = 0;
  std::memcpy(&word, bytes, sizeof(word));
  return word;
}

/// All ones in the lanes whose bit is set.
inline __m256 lane_mask(std::uint32_t lane_bits) { return mask_from_bits(lane_bits); }

inline constexpr std::uint64_t kEachNibble = 0x1111111111111111u;
inline constexpr std::uint64_t kEachByte = 0x0101010101010101u;

/// A NaN stays as it is: adding to one whose bits are all set would make it -0.
inline __m256 round_values(__m256 values, const RoundedGrid& grid) {
  const __m256i words = _mm256_castps_si256(values);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(words, 16), set1_u32(grid.odd_bit));
  const __m256i raised = _mm256_add_epi32(words, _mm256_add_epi32(odd, set1_u32(grid.half_step)));
  const __m256 rounded = _mm256_castsi256_ps(_mm256_and_si256(raised, set1_u32(grid.kept_bits)));
  return blend(eq(values, values), rounded, values);
}

/// Looks 64 values up: each nibble of `indices` is 4 + code for a survivor and 0 elsewhere; lanes 0 to 3 of the table are 0.
inline void look_up(const std::uint64_t* indices, RoundedGrid grid, float* out) {
  const __m256 codes = _mm256_setr_ps(0, 0, 0, 0, 0, 1, 2, 3);
  const __m256 values = round_values(mul(sub(codes, set1(grid.zero)), set1(grid.scale)), grid);
  const __m256 table = _mm256_blend_ps(_mm256_setzero_ps(), values, 0xf0);
  const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  for (int j = 0; j < 8; ++j) {
    const auto word = static_cast<int>(indices[j / 2] >> (32 * (j % 2)));
    const __m256i lanes = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
    store(out + 8 * j, _mm256_permutevar8x32_ps(table, lanes));
  }
}

inline void expand(Codes<1>, std::uint64_t mask, const std::byte* bytes, RoundedGrid grid, float* out) {
  std::uint64_t indices[4];
  const std::uint64_t codes = _pdep_u64(load_word(bytes), mask);
  for (int j = 0; j < 4; ++j) {
    indices[j] = _pdep_u64(codes >> (16 * j), kEachNibble) | _pdep_u64(mask >> (16 * j), kEachNibble) << 2;
  }
  look_up(indices, grid, out);
}

inline void expand(Codes<2>, std::uint64_t mask, const std::byte* bytes, RoundedGrid grid, float* out) {
  std::uint64_t indices[4];
  int bit = 0;
  for (int j = 0; j < 4; ++j) {
    const std::uint64_t kept = (mask >> (16 * j)) & 0xffffu;
    const std::uint64_t nibbles = _pdep_u64(kept, kEachNibble);
    indices[j] = _pdep_u64(load_word(bytes + bit / 8) >> (bit % 8), nibbles * 3) | nibbles << 2;
    bit += 2 * std::popcount(kept);
  }
  look_up(indices, grid, out);
}

/// Eight codes in the low bits of lanes to values, 0 where the mask's bit is not set.
inline void store_values(__m256i codes, std::uint32_t kept, RoundedGrid grid, float* out) {
  const __m256 values = round_values(mul(sub(_mm256_cvtepi32_ps(codes), set1(grid.zero)), set1(grid.scale)), grid);
  store(out, _mm256_and_ps(values, lane_mask(kept)));
}

inline void expand(Codes<4>, std::uint64_t mask, const std::byte* bytes, RoundedGrid grid, float* out) {
  const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  int bit = 0;
  for (int j = 0; j < 8; ++j) {
    const auto kept = static_cast<std::uint32_t>(mask >> (8 * j)) & 0xffu;
    const std::uint64_t nibbles = _pdep_u64(kept, kEachNibble) * 15;
    const auto word = static_cast<int>(_pdep_u64(load_word(bytes + bit / 8) >> (bit % 8), nibbles));
    const __m256i lanes = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
    store_values(_mm256_and_si256(lanes, _mm256_set1_epi32(15)), kept, grid, out + 8 * j);
    bit += 4 * std::popcount(kept);
  }
}

inline void expand(Codes<8>, std::uint64_t mask, const std::byte* bytes, RoundedGrid grid, float* out) {
  for (int j = 0; j < 8; ++j) {
    const auto kept = static_cast<std::uint32_t>(mask >> (8 * j)) & 0xffu;
    const std::uint64_t codes = _pdep_u64(load_word(bytes), _pdep_u64(kept, kEachByte) * 255);
    const __m256i lanes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(codes)));
    store_values(lanes, kept, grid, out + 8 * j);
    bytes += std::popcount(kept);
  }
}

inline __m256 widen(Half, __m128i halves) { return _mm256_cvtph_ps(halves); }
inline __m256 widen(BFloat16, __m128i halves) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

template <typename T>
inline void expand(Halves<T>, std::uint64_t mask, const std::byte* bytes, RoundedGrid grid, float* out) {
  for (int j = 0; j < 8; ++j) {
    const auto kept = static_cast<std::uint32_t>(mask >> (8 * j)) & 0xffu;
    const __m128i order = _mm_load_si128(reinterpret_cast<const __m128i*>(kExpandWords.bytes[kept].data()));
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    store(out + 8 * j, round_values(widen(T{}, _mm_shuffle_epi8(halves, order)), grid));
    bytes += 2 * std::popcount(kept);
  }
}

/// Puts 64 sums over expanded tiles into element order; they are in it.
template <typename Survivor>
inline void order_elements(Survivor, float*) {}

}  // namespace
}  // namespace kvpack::avx2
