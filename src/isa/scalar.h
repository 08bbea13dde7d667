// The SIMD vocabulary with one lane and no intrinsics: runs everywhere, and shows what each word means.
// Every instruction set offers the same words; results are equal bit for bit except where a word says otherwise.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "core/half.h"

namespace kvpack::scalar {
namespace {

inline constexpr int kLanes = 1;
inline constexpr int kVectorsInFlight = 1;  // of several rows at a time: enough to hide latencies, in registers or not
using F32 = float;                          // kLanes floats
using U32 = std::uint32_t;                  // kLanes unsigned words, used below 2^31
using Mask = std::uint32_t;                 // one truth value a lane

// --- memory: one vector of a type, widened to float or rounded from it (RNE); float64 goes through float32 ---
template <typename T>
inline F32 load(const T* source) {
  return to_float(*source);
}
template <typename T>
inline void store(T* target, F32 value) {
  from_float(value, *target);
}
inline F32 set1(float value) { return value; }
inline U32 set1_u32(std::uint32_t value) { return value; }
inline U32 load_u32(const std::uint32_t* source) { return *source; }
inline void store_u32(std::uint32_t* target, U32 value) { *target = value; }
/// kLanes bytes, widened; and the lowest byte of each lane.
inline U32 load_bytes(const std::uint8_t* source) { return *source; }
inline void store_bytes(std::uint8_t* target, U32 value) { *target = static_cast<std::uint8_t>(value); }
/// source[place] lane by lane.
inline F32 gather(const float* source, U32 place) { return source[place]; }

// --- arithmetic: one IEEE rounding each; min and max return b when either is NaN ---
inline F32 add(F32 a, F32 b) { return a + b; }
inline F32 sub(F32 a, F32 b) { return a - b; }
inline F32 mul(F32 a, F32 b) { return a * b; }
inline F32 div(F32 a, F32 b) { return a / b; }
inline F32 fma(F32 a, F32 b, F32 c) { return std::fma(a, b, c); }
inline F32 min(F32 a, F32 b) { return a < b ? a : b; }
inline F32 max(F32 a, F32 b) { return a > b ? a : b; }
inline F32 round_even(F32 a) { return std::nearbyint(a); }
inline F32 floor(F32 a) { return std::floor(a); }
/// 2^n for whole n in [-126, 127].
inline F32 exp2_whole(F32 n) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(static_cast<std::int32_t>(n) + 127) << 23);
}

// --- comparisons and masks; bit i of bits(mask) is lane i ---
inline Mask ge(F32 a, F32 b) { return a >= b; }
inline Mask gt(F32 a, F32 b) { return a > b; }
inline Mask le(F32 a, F32 b) { return a <= b; }
inline Mask eq(F32 a, F32 b) { return a == b; }
inline Mask is_nonfinite(F32 a) { return (std::bit_cast<std::uint32_t>(a) & 0x7f800000u) == 0x7f800000u; }
inline Mask ge_u32(U32 a, U32 b) { return a >= b; }
inline Mask gt_u32(U32 a, U32 b) { return a > b; }
inline U32 add_u32(U32 a, U32 b) { return a + b; }
inline U32 and_u32(U32 a, U32 b) { return a & b; }
inline U32 min_u32(U32 a, U32 b) { return std::min(a, b); }
inline U32 shift_left(U32 a, int places) { return a << places; }
inline U32 shift_right(U32 a, int places) { return a >> places; }
/// count + 1 in the lanes of set bits.
inline U32 add_one_where(Mask mask, U32 count) { return count + mask; }
inline Mask either(Mask a, Mask b) { return a | b; }
inline std::uint32_t bits(Mask mask) { return mask; }
inline Mask mask_from_bits(std::uint32_t lane_bits) { return lane_bits & 1u; }
/// Lane by lane: mask ? if_set : if_clear.
inline F32 blend(Mask mask, F32 if_set, F32 if_clear) { return mask ? if_set : if_clear; }

// --- across lanes ---
inline float reduce_min(F32 a) { return a; }
inline float reduce_max(F32 a) { return a; }
inline float reduce_add(F32 a) { return a; }
/// Writes the lanes of set bits next to each other; may write kLanes floats whatever it returns, the number kept.
inline int compress_store(float* target, Mask mask, F32 value) {
  *target = value;
  return static_cast<int>(mask);
}

/// Ranks for pruning: the bits of |a|, so that integer order is magnitude order; every NaN becomes the largest rank.
inline U32 magnitude_rank(F32 a) { return std::min(std::bit_cast<std::uint32_t>(a) & 0x7fffffffu, 0x7f800001u); }

// --- lanes of 16 bits, for ranks of the 16-bit types ---
inline constexpr int kLanes16 = 1;
using U16 = std::uint16_t;

inline U16 load_u16(const std::uint16_t* source) { return *source; }
inline U16 set1_u16(std::uint32_t value) { return static_cast<U16>(value); }
/// magnitude_rank of a 16-bit float's bits, `nan_rank` being one more than its infinity.
inline U16 magnitude_rank_u16(U16 a, U16 nan_rank) { return std::min(static_cast<U16>(a & 0x7fffu), nan_rank); }
/// How many lanes of kVectors vectors are >= limit; all below 2^15, limit at least 1.
template <int kVectors>
inline int count_ge_u16(const U16* ranks, U16 limit) {
  int count = 0;
  for (int i = 0; i < kVectors; ++i) count += ranks[i] >= limit;
  return count;
}
/// Bit i is set where lane i of the vectors that hold 64 lanes is >= limit; the same conditions.
inline std::uint64_t mask64_ge_u16(const U16* ranks, U16 limit) {
  std::uint64_t mask = 0;
  for (int i = 0; i < 64; ++i) mask |= static_cast<std::uint64_t>(ranks[i] >= limit) << i;
  return mask;
}
/// Copies those of 64 words whose mask bit is set and clears the others.
inline void copy_words_of_mask(const std::uint16_t* source, std::uint64_t mask, std::uint16_t* target) {
  for (int i = 0; i < 64; ++i) target[i] = static_cast<std::uint16_t>(source[i] & (0u - ((mask >> i) & 1u)));
}
/// Lowest `count` set bits of a mask, 0 <= count < 64.
inline std::uint64_t lowest_set_bits64(std::uint64_t mask, int count) {
  std::uint64_t result = 0;
  for (; count > 0 && mask != 0; --count, mask &= mask - 1) result |= mask & (~mask + 1);
  return result;
}

}  // namespace
}  // namespace kvpack::scalar
