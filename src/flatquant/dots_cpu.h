// Dot products of bytes, a vector at a time, in the instruction set at hand. Compiled once per instruction set; without an
// include guard.

namespace kvpack::KVPACK_ISA {
namespace {

#if KVPACK_ISA_LANES == 16

inline constexpr std::int64_t kVectorBytes = 64;
using Bytes = __m512i;
using Sums = __m512i;  // 16 sums of 32 bits

inline Bytes load_vector(const void* source) { return _mm512_loadu_si512(source); }
inline void store_vector(void* target, Bytes value) { _mm512_storeu_si512(target, value); }
inline Bytes set_bytes(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
inline Bytes flip_bits(Bytes a, Bytes b) { return _mm512_xor_si512(a, b); }
inline Bytes add_bytes(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
inline Bytes low_nibbles(Bytes a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes a) { return low_nibbles(_mm512_srli_epi16(a, 4)); }
inline Sums no_sums() { return _mm512_setzero_si512(); }
/// sums + products of unsigned and signed bytes, four neighbours to a sum.
inline Sums add_dots(Sums sums, Bytes without_sign, Bytes with_sign) {
  return _mm512_dpbusd_epi32(sums, without_sign, with_sign);
}
inline std::int32_t total(Sums sums) { return _mm512_reduce_add_epi32(sums); }

#elif KVPACK_ISA_LANES == 8

inline constexpr std::int64_t kVectorBytes = 32;
using Bytes = __m256i;
using Sums = __m256i;

inline Bytes load_vector(const void* source) { return _mm256_loadu_si256(static_cast<const __m256i*>(source)); }
inline void store_vector(void* target, Bytes value) { _mm256_storeu_si256(static_cast<__m256i*>(target), value); }
inline Bytes set_bytes(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
inline Bytes flip_bits(Bytes a, Bytes b) { return _mm256_xor_si256(a, b); }
inline Bytes add_bytes(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }
inline Bytes low_nibbles(Bytes a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes a) { return low_nibbles(_mm256_srli_epi16(a, 4)); }
inline Sums no_sums() { return _mm256_setzero_si256(); }
inline Sums add_dots(Sums sums, Bytes without_sign, Bytes with_sign) {
  // Two products of 4-bit numbers stay far below 2^15.
  const __m256i pairs = _mm256_maddubs_epi16(without_sign, with_sign);
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline std::int32_t total(Sums sums) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

#else

inline constexpr std::int64_t kVectorBytes = 16;
struct Bytes {
  std::uint8_t of[kVectorBytes];
};
using Sums = std::int32_t;

template <typename Function>
inline Bytes each_byte(Bytes a, const Function& function) {
  for (std::uint8_t& byte : a.of) byte = static_cast<std::uint8_t>(function(byte));
  return a;
}
inline Bytes load_vector(const void* source) {
  Bytes value;
  std::memcpy(value.of, source, kVectorBytes);
  return value;
}
inline void store_vector(void* target, Bytes value) { std::memcpy(target, value.of, kVectorBytes); }
inline Bytes set_bytes(int value) {
  return each_byte(Bytes{}, [value](int) { return value; });
}
inline Bytes flip_bits(Bytes a, Bytes b) {
  for (int i = 0; i < kVectorBytes; ++i) a.of[i] = static_cast<std::uint8_t>(a.of[i] ^ b.of[i]);
  return a;
}
inline Bytes add_bytes(Bytes a, Bytes b) {
  for (int i = 0; i < kVectorBytes; ++i) a.of[i] = static_cast<std::uint8_t>(a.of[i] + b.of[i]);
  return a;
}
inline Bytes low_nibbles(Bytes a) {
  return each_byte(a, [](int byte) { return byte & 15; });
}
inline Bytes high_nibbles(Bytes a) {
  return each_byte(a, [](int byte) { return byte >> 4; });
}
inline Sums no_sums() { return 0; }
inline Sums add_dots(Sums sums, Bytes without_sign, Bytes with_sign) {
  for (int i = 0; i < kVectorBytes; ++i) sums += without_sign.of[i] * static_cast<std::int8_t>(with_sign.of[i]);
  return sums;
}
inline std::int32_t total(Sums sums) { return sums; }

#endif

}  // namespace
}  // namespace kvpack::KVPACK_ISA
