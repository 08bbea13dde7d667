// Words on 64 elements under a bitmap, on AVX2. What each word means stands in isa/tiles_scalar.h.
#pragma once

#include <immintrin.h>

#include <bit>
#include <cstdint>

#include "isa/avx2.h"
#include "isa/tile_tables.h"

namespace kvpack::avx2 {
namespace {

inline constexpr bool kCompressIsCheap = false;

inline int compress64(const std::uint16_t* source, std::uint64_t mask, std::uint16_t* target) {
  std::uint16_t* next = target;
  for (int i = 0; i < 64; i += 8) {
    const std::uint64_t lanes = (mask >> i) & 0xffu;
    const __m128i order = _mm_load_si128(reinterpret_cast<const __m128i*>(kCompressWords.bytes[lanes].data()));
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(next), _mm_shuffle_epi8(words, order));
    next += std::popcount(lanes);
  }
  _mm_storeu_si128(reinterpret_cast<__m128i*>(next), _mm_setzero_si128());
  return static_cast<int>(next - target);
}

inline void expand64(const std::uint16_t* source, std::uint64_t mask, std::uint16_t* target) {
  for (int i = 0; i < 64; i += 8) {
    const std::uint64_t lanes = (mask >> i) & 0xffu;
    const __m128i order = _mm_load_si128(reinterpret_cast<const __m128i*>(kExpandWords.bytes[lanes].data()));
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), _mm_shuffle_epi8(words, order));
    source += std::popcount(lanes);
  }
}

inline void store_codes(std::uint8_t* target, F32 whole) {
  const __m256i words = _mm256_cvttps_epi32(whole);
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(target), _mm_packus_epi16(halves, halves));
}
inline F32 load_codes(const std::uint8_t* source) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(source));
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}

}  // namespace
}  // namespace kvpack::avx2
