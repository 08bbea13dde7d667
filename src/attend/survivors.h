// What the CPU's attention calls survivors: one tag per payload, and how values are rounded. Compiled for no special
// instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/half.h"
#include "formats/tile64/implementations.h"
#include "formats/tile64_f16/layout.h"
#include "formats/tile64_q/layout.h"
#include "kvpack/error.h"

namespace kvpack {

/// Codes of 1, 2, 4 or 8 bits on a grid: tile64_q.
template <int kBitsOfCode>
struct Codes {
  static constexpr int kBits = kBitsOfCode;
  static constexpr bool kHasGrid = true;
  /// Bytes that an expansion may read from a tile's start on, whatever the tile holds.
  static constexpr std::int64_t kReadBytes = kTileElements * kBitsOfCode / 8 + 8;
};

/// 16-bit floats: tile64_f16.
template <typename T>
struct Halves {
  using Type = T;
  static constexpr bool kHasGrid = false;
  static constexpr std::int64_t kReadBytes = kTileElements * 2;
};

/// The grid of a tile, and how the values that codes stand for are rounded: to bfloat16 (RNE) where queries are bfloat16, as
/// unpacking to their type would. Ties are common, because scales of bfloat16 tensors have few bits. For float16 queries
/// rounding would change less than their tolerance allows, and is left out.
struct RoundedGrid {
  float scale = 1.0f;
  float zero = 0.0f;
  std::uint32_t half_step = 0;            // 0x7fff, or 0 for no rounding
  std::uint32_t odd_bit = 0;              // 1: half steps go to the even side
  std::uint32_t kept_bits = 0xffffffffu;  // 0xffff0000, or all
};

/// Rounding alone.
inline RoundedGrid rounding_to(DType dtype) {
  if (dtype == DType::kBFloat16) return {1.0f, 0.0f, 0x7fffu, 1u, 0xffff0000u};
  return {};
}

/// Calls body.template operator()<Survivor>() with the tag of these tiles.
template <typename Body>
auto with_survivor(const Tile64Data& tiles, Body&& body) {
  switch (tiles.bits) {
    case 1:
      return body.template operator()<Codes<1>>();
    case 2:
      return body.template operator()<Codes<2>>();
    case 4:
      return body.template operator()<Codes<4>>();
    case 8:
      return body.template operator()<Codes<8>>();
    case kUnquantizedBits:
      if (tiles.payload_type == DType::kBFloat16) return body.template operator()<Halves<BFloat16>>();
      return body.template operator()<Halves<Half>>();
    default:
      throw InternalError("with_survivor was given tiles of unknown bits");
  }
}

}  // namespace kvpack
