// Words on 64 elements under a bitmap, without intrinsics: shows what each of them means. Bit i of a mask is element i.
// Part of the vocabulary where KVPACK_SIMD_TILES is defined: isa/for_each_isa.h.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "isa/scalar.h"

namespace kvpack::scalar {
namespace {

/// Elements of room that compress64 needs at its target, and expand64 at its source.
inline constexpr int kTileRoom = 72;

/// Whether compressing elements before other work on them saves time.
inline constexpr bool kCompressIsCheap = true;

/// Writes the elements of set bits next to each other and zeros up to a multiple of 8; what is behind them in the
/// target's kTileRoom elements is undefined. Returns how many are set.
inline int compress64(const std::uint16_t* source, std::uint64_t mask, std::uint16_t* target) {
  int count = 0;
  for (; mask != 0; mask &= mask - 1) target[count++] = source[std::countr_zero(mask)];
  for (int i = count; i % 8 != 0; ++i) target[i] = 0;
  return count;
}

/// Writes 64 elements: the source's first ones at the places of set bits, zeros elsewhere.
inline void expand64(const std::uint16_t* source, std::uint64_t mask, std::uint16_t* target) {
  for (int i = 0; i < 64; ++i) {
    const std::uint64_t is_set = (mask >> i) & 1u;
    target[i] = static_cast<std::uint16_t>(*source & (0u - is_set));
    source += is_set;
  }
}

/// Writes the low kBits of each byte of a set bit among the first kElements, first in the lowest bits; zeros up to the
/// next 64-bit word. Bits of further elements are clear.
template <int kBits, int kElements>
inline void pack_codes(const std::uint8_t* codes, std::uint64_t mask, std::uint8_t* target) {
  std::uint64_t word = 0;
  int filled = 0;
  for (; mask != 0; mask &= mask - 1) {
    word |= static_cast<std::uint64_t>(codes[std::countr_zero(mask)]) << filled;
    filled += kBits;
    if (filled < 64) continue;
    std::memcpy(target, &word, sizeof(word));
    target += sizeof(word);
    word = 0;
    filled = 0;
  }
  if (filled > 0) std::memcpy(target, &word, sizeof(word));
}

/// Undoes pack_codes into 64 bytes, zeros where a bit is clear. Reads up to 72 bytes.
template <int kBits>
inline void unpack_codes(const std::uint8_t* source, std::uint64_t mask, std::uint8_t* codes) {
  int position = 0;
  for (int i = 0; i < 64; ++i) {
    const auto is_set = static_cast<int>((mask >> i) & 1u);
    const int code = (source[position / 8] >> (position % 8)) & ((1 << kBits) - 1);
    codes[i] = static_cast<std::uint8_t>(code & -is_set);
    position += kBits * is_set;
  }
}

/// Writes 8 rows as columns; num_columns is a multiple of 16.
template <typename T>
inline void transpose8(const T* source, std::int64_t source_stride, int num_columns, T* target,
                       std::int64_t target_stride) {
  for (int column = 0; column < num_columns; ++column) {
    for (int row = 0; row < 8; ++row) target[column * target_stride + row] = source[row * source_stride + column];
  }
}

/// kLanes whole numbers 0 .. 255 as bytes, and back.
inline void store_codes(std::uint8_t* target, F32 whole) { *target = static_cast<std::uint8_t>(whole); }
inline F32 load_codes(const std::uint8_t* source) { return static_cast<float>(*source); }

}  // namespace
}  // namespace kvpack::scalar
