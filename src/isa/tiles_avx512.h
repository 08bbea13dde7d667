// Words on 64 elements under a bitmap, on AVX-512 with VBMI2. What each word means stands in isa/tiles_scalar.h.
#pragma once

#include <immintrin.h>

#include <bit>
#include <cstdint>

#include "isa/avx512.h"

namespace kvpack::avx512 {
namespace {

inline constexpr bool kCompressIsCheap = true;

inline int compress64(const std::uint16_t* source, std::uint64_t mask, std::uint16_t* target) {
  const auto low_mask = static_cast<__mmask32>(mask);
  const auto high_mask = static_cast<__mmask32>(mask >> 32);
  const int low_count = std::popcount(static_cast<std::uint32_t>(low_mask));
  const int count = low_count + std::popcount(static_cast<std::uint32_t>(high_mask));
  // In the register, then stored whole: a masked compress to memory is microcoded on Zen 4 and 5. The high half's
  // survivors move behind the low half's there too, since loads would wait for two stores that overlap.
  const __m512i low = _mm512_maskz_compress_epi16(low_mask, _mm512_loadu_si512(source));
  const __m512i high = _mm512_maskz_compress_epi16(high_mask, _mm512_loadu_si512(source + 32));
  constexpr std::uint64_t kAll = 0xffffffffu;
  const __m512i fits = _mm512_maskz_expand_epi16(static_cast<__mmask32>(kAll << low_count), high);
  const __m512i rest = _mm512_maskz_compress_epi16(static_cast<__mmask32>(kAll << (32 - low_count)), high);
  _mm512_storeu_si512(target, _mm512_or_si512(low, fits));
  _mm512_storeu_si512(target + 32, rest);
  return count;
}

inline void expand64(const std::uint16_t* source, std::uint64_t mask, std::uint16_t* target) {
  const auto low_mask = static_cast<__mmask32>(mask);
  const auto high_mask = static_cast<__mmask32>(mask >> 32);
  const int low_count = std::popcount(static_cast<std::uint32_t>(low_mask));
  _mm512_storeu_si512(target, _mm512_maskz_expand_epi16(low_mask, _mm512_loadu_si512(source)));
  _mm512_storeu_si512(target + 32, _mm512_maskz_expand_epi16(high_mask, _mm512_loadu_si512(source + low_count)));
}

inline void store_codes(std::uint8_t* target, F32 whole) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(whole)));
}
inline F32 load_codes(const std::uint8_t* source) {
  // unpack_codes stores 8 bytes at a time; a load of 16 would wait for two of them to reach the cache.
  const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(source));
  const __m128i high = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(source + 8));
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi64(low, high)));
}

}  // namespace
}  // namespace kvpack::avx512
