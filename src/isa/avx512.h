// The SIMD vocabulary on AVX-512 (F, BW, DQ, VL): 16 lanes. What each word means stands in isa/scalar.h.
#pragma once

#include <immintrin.h>

#include <bit>
#include <cstdint>

#include "core/half.h"

namespace kvpack::avx512 {
namespace {

inline constexpr int kLanes = 16;
inline constexpr int kVectorsInFlight = 32;
using F32 = __m512;
using U32 = __m512i;
using Mask = __mmask16;

inline F32 load(const float* source) { return _mm512_loadu_ps(source); }
inline F32 load(const Half* source) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
}
inline F32 load(const BFloat16* source) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}
inline F32 load(const double* source) {
  const __m256 low = _mm512_cvtpd_ps(_mm512_loadu_pd(source));
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), _mm512_cvtpd_ps(_mm512_loadu_pd(source + 8)), 1);
}
inline void store(float* target, F32 value) { _mm512_storeu_ps(target, value); }
inline void store(Half* target, F32 value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(BFloat16* target, F32 value) {
  const __m512i word = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(word, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(0x40));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i halves = _mm512_mask_blend_epi32(is_nan, rounded, quiet);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_cvtepi32_epi16(halves));
}
inline void store(double* target, F32 value) {
  _mm512_storeu_pd(target, _mm512_cvtps_pd(_mm512_castps512_ps256(value)));
  _mm512_storeu_pd(target + 8, _mm512_cvtps_pd(_mm512_extractf32x8_ps(value, 1)));
}
inline F32 set1(float value) { return _mm512_set1_ps(value); }
inline U32 set1_u32(std::uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }
inline U32 load_u32(const std::uint32_t* source) { return _mm512_loadu_si512(source); }
inline void store_u32(std::uint32_t* target, U32 value) { _mm512_storeu_si512(target, value); }
inline U32 load_bytes(const std::uint8_t* source) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
}
inline void store_bytes(std::uint8_t* target, U32 value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm512_cvtepi32_epi8(value));
}
inline F32 gather(const float* source, U32 place) { return _mm512_i32gather_ps(place, source, 4); }

inline F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
inline F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
inline F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
inline F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
inline F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
inline F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
inline F32 round_even(F32 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F32 floor(F32 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
inline F32 exp2_whole(F32 n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}

inline Mask ge(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline Mask gt(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Mask le(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
inline Mask eq(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
// 0x99: quiet NaN, +infinity, -infinity, signalling NaN
inline Mask is_nonfinite(F32 a) { return _mm512_fpclass_ps_mask(a, 0x99); }
inline Mask ge_u32(U32 a, U32 b) { return _mm512_cmpge_epu32_mask(a, b); }
inline Mask gt_u32(U32 a, U32 b) { return _mm512_cmpgt_epu32_mask(a, b); }
inline U32 add_u32(U32 a, U32 b) { return _mm512_add_epi32(a, b); }
inline U32 and_u32(U32 a, U32 b) { return _mm512_and_si512(a, b); }
inline U32 min_u32(U32 a, U32 b) { return _mm512_min_epu32(a, b); }
inline U32 shift_left(U32 a, int places) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(places)); }
inline U32 shift_right(U32 a, int places) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(places)); }
inline U32 add_one_where(Mask mask, U32 count) {
  return _mm512_mask_add_epi32(count, mask, count, _mm512_set1_epi32(1));
}
inline Mask either(Mask a, Mask b) { return static_cast<Mask>(a | b); }
inline std::uint32_t bits(Mask mask) { return mask; }
inline Mask mask_from_bits(std::uint32_t lane_bits) { return static_cast<Mask>(lane_bits); }
inline F32 blend(Mask mask, F32 if_set, F32 if_clear) { return _mm512_mask_blend_ps(mask, if_clear, if_set); }

inline float reduce_min(F32 a) { return _mm512_reduce_min_ps(a); }
inline float reduce_max(F32 a) { return _mm512_reduce_max_ps(a); }
inline float reduce_add(F32 a) { return _mm512_reduce_add_ps(a); }
inline int compress_store(float* target, Mask mask, F32 value) {
  // Compress in the register, then store whole: a masked compress to memory is microcoded on Zen 4 and 5.
  _mm512_storeu_ps(target, _mm512_maskz_compress_ps(mask, value));
  return std::popcount(static_cast<std::uint32_t>(mask));
}

inline U32 magnitude_rank(F32 a) {
  const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff));
  return _mm512_min_epu32(magnitude, _mm512_set1_epi32(0x7f800001));
}

inline constexpr int kLanes16 = 32;
using U16 = __m512i;

inline U16 load_u16(const std::uint16_t* source) { return _mm512_loadu_si512(source); }
inline U16 set1_u16(std::uint32_t value) { return _mm512_set1_epi16(static_cast<short>(value)); }
inline U16 magnitude_rank_u16(U16 a, U16 nan_rank) {
  return _mm512_min_epu16(_mm512_and_si512(a, _mm512_set1_epi16(0x7fff)), nan_rank);
}
template <int kVectors>
inline int count_ge_u16(const U16* ranks, U16 limit) {
  int count = 0;
  for (int i = 0; i < kVectors; ++i) {
    count += std::popcount(static_cast<std::uint32_t>(_mm512_cmpge_epu16_mask(ranks[i], limit)));
  }
  return count;
}
inline std::uint64_t mask64_ge_u16(const U16* ranks, U16 limit) {
  const std::uint64_t high = _mm512_cmpge_epu16_mask(ranks[1], limit);
  return static_cast<std::uint64_t>(_mm512_cmpge_epu16_mask(ranks[0], limit)) | high << 32;
}
inline void copy_words_of_mask(const std::uint16_t* source, std::uint64_t mask, std::uint16_t* target) {
  _mm512_storeu_si512(target, _mm512_maskz_loadu_epi16(static_cast<__mmask32>(mask), source));
  _mm512_storeu_si512(target + 32, _mm512_maskz_loadu_epi16(static_cast<__mmask32>(mask >> 32), source + 32));
}
inline std::uint64_t lowest_set_bits64(std::uint64_t mask, int count) {
  return _pdep_u64((std::uint64_t{1} << count) - 1, mask);
}

}  // namespace
}  // namespace kvpack::avx512
