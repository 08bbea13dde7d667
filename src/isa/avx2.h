// The SIMD vocabulary on AVX2, FMA and F16C: 8 lanes. What each word means stands in isa/scalar.h.
#pragma once

#include <immintrin.h>

#include <bit>
#include <cstdint>

#include "core/half.h"
#include "isa/compress_table.h"

namespace kvpack::avx2 {
namespace {

inline constexpr int kLanes = 8;
inline constexpr int kVectorsInFlight = 32;
using F32 = __m256;
using U32 = __m256i;
using Mask = __m256;  // all bits of a lane set, or none

inline F32 load(const float* source) { return _mm256_loadu_ps(source); }
inline F32 load(const Half* source) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
}
inline F32 load(const BFloat16* source) {
  const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}
inline F32 load(const double* source) {
  return _mm256_set_m128(_mm256_cvtpd_ps(_mm256_loadu_pd(source + 4)), _mm256_cvtpd_ps(_mm256_loadu_pd(source)));
}
inline void store(float* target, F32 value) { _mm256_storeu_ps(target, value); }
inline void store(Half* target, F32 value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(BFloat16* target, F32 value) {
  const __m256i word = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(word, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(word, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(word, 16), _mm256_set1_epi32(0x40));
  const __m256 is_nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
  const __m256i halves = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(is_nan));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target),
                   _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
}
inline void store(double* target, F32 value) {
  _mm256_storeu_pd(target, _mm256_cvtps_pd(_mm256_castps256_ps128(value)));
  _mm256_storeu_pd(target + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(value, 1)));
}
inline F32 set1(float value) { return _mm256_set1_ps(value); }
inline U32 set1_u32(std::uint32_t value) { return _mm256_set1_epi32(static_cast<int>(value)); }
inline U32 load_u32(const std::uint32_t* source) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
}
inline void store_u32(std::uint32_t* target, U32 value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), value);
}
inline U32 load_bytes(const std::uint8_t* source) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source)));
}
inline void store_bytes(std::uint8_t* target, U32 value) {
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(target), _mm_packus_epi16(words, words));
}
inline F32 gather(const float* source, U32 place) { return _mm256_i32gather_ps(source, place, 4); }

inline F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
inline F32 sub(F32 a, F32 b) { return _mm256_sub_ps(a, b); }
inline F32 mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
inline F32 div(F32 a, F32 b) { return _mm256_div_ps(a, b); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
inline F32 min(F32 a, F32 b) { return _mm256_min_ps(a, b); }
inline F32 max(F32 a, F32 b) { return _mm256_max_ps(a, b); }
inline F32 round_even(F32 a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F32 floor(F32 a) { return _mm256_floor_ps(a); }
inline F32 exp2_whole(F32 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}

inline Mask ge(F32 a, F32 b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
inline Mask gt(F32 a, F32 b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
inline Mask le(F32 a, F32 b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
inline Mask eq(F32 a, F32 b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
inline Mask is_nonfinite(F32 a) {
  const __m256i exponent = _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7f800000));
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(exponent, _mm256_set1_epi32(0x7f800000)));
}
// Signed compares serve: ranks stay below 2^31.
inline Mask ge_u32(U32 a, U32 b) {
  return _mm256_castsi256_ps(_mm256_or_si256(_mm256_cmpgt_epi32(a, b), _mm256_cmpeq_epi32(a, b)));
}
inline Mask gt_u32(U32 a, U32 b) { return _mm256_castsi256_ps(_mm256_cmpgt_epi32(a, b)); }
inline U32 add_u32(U32 a, U32 b) { return _mm256_add_epi32(a, b); }
inline U32 and_u32(U32 a, U32 b) { return _mm256_and_si256(a, b); }
inline U32 min_u32(U32 a, U32 b) { return _mm256_min_epu32(a, b); }
inline U32 shift_left(U32 a, int places) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(places)); }
inline U32 shift_right(U32 a, int places) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(places)); }
inline U32 add_one_where(Mask mask, U32 count) { return _mm256_sub_epi32(count, _mm256_castps_si256(mask)); }
inline Mask either(Mask a, Mask b) { return _mm256_or_ps(a, b); }
inline std::uint32_t bits(Mask mask) { return static_cast<std::uint32_t>(_mm256_movemask_ps(mask)); }
inline Mask mask_from_bits(std::uint32_t lane_bits) {
  const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i spread = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(lane_bits)), lane_bit);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(spread, lane_bit));
}
inline F32 blend(Mask mask, F32 if_set, F32 if_clear) { return _mm256_blendv_ps(if_clear, if_set, mask); }

inline float reduce_min(F32 a) {
  __m128 half = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_min_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_min_ss(half, _mm_movehdup_ps(half)));
}
inline float reduce_max(F32 a) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
inline float reduce_add(F32 a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline int compress_store(float* target, Mask mask, F32 value) {
  const std::uint32_t kept = bits(mask);
  const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(kCompressTable.lanes[kept].data()));
  _mm256_storeu_ps(target, _mm256_permutevar8x32_ps(value, order));
  return std::popcount(kept);
}

inline U32 magnitude_rank(F32 a) {
  const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7fffffff));
  return _mm256_min_epi32(magnitude, _mm256_set1_epi32(0x7f800001));
}

inline constexpr int kLanes16 = 16;
using U16 = __m256i;

inline U16 load_u16(const std::uint16_t* source) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
}
inline U16 set1_u16(std::uint32_t value) { return _mm256_set1_epi16(static_cast<short>(value)); }
inline U16 magnitude_rank_u16(U16 a, U16 nan_rank) {
  return _mm256_min_epu16(_mm256_and_si256(a, _mm256_set1_epi16(0x7fff)), nan_rank);
}
template <int kVectors>
inline int count_ge_u16(const U16* ranks, U16 limit) {
  const U16 below = _mm256_sub_epi16(limit, _mm256_set1_epi16(1));
  U16 counts = _mm256_setzero_si256();  // a lane's stay below 256, so that vpsadbw adds them up
  for (int i = 0; i < kVectors; ++i) counts = _mm256_sub_epi16(counts, _mm256_cmpgt_epi16(ranks[i], below));
  const __m256i sums = _mm256_sad_epu8(counts, _mm256_setzero_si256());
  const __m128i half = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  return static_cast<int>(_mm_cvtsi128_si64(_mm_add_epi64(half, _mm_unpackhi_epi64(half, half))));
}
inline std::uint64_t mask64_ge_u16(const U16* ranks, U16 limit) {
  const U16 below = _mm256_sub_epi16(limit, _mm256_set1_epi16(1));
  std::uint64_t mask = 0;
  for (int i = 0; i < 4; i += 2) {
    // The pack interleaves 128-bit halves: 0 2 1 3.
    const __m256i packed = _mm256_permute4x64_epi64(
        _mm256_packs_epi16(_mm256_cmpgt_epi16(ranks[i], below), _mm256_cmpgt_epi16(ranks[i + 1], below)), 0xd8);
    mask |= static_cast<std::uint64_t>(static_cast<std::uint32_t>(_mm256_movemask_epi8(packed))) << (16 * i);
  }
  return mask;
}
inline void copy_words_of_mask(const std::uint16_t* source, std::uint64_t mask, std::uint16_t* target) {
  const __m256i lane_bit = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384,
                                             static_cast<short>(0x8000));
  for (int i = 0; i < 64; i += kLanes16) {
    const __m256i spread = _mm256_and_si256(_mm256_set1_epi16(static_cast<short>(mask >> i)), lane_bit);
    const __m256i words = _mm256_and_si256(load_u16(source + i), _mm256_cmpeq_epi16(spread, lane_bit));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i), words);
  }
}
inline std::uint64_t lowest_set_bits64(std::uint64_t mask, int count) {
  return _pdep_u64((std::uint64_t{1} << count) - 1, mask);
}

}  // namespace
}  // namespace kvpack::avx2
