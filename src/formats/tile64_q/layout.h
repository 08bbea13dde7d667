// THE home of tile64_q's bytes beside the bitmaps: codes, and how they are made and read. Spec with an example:
// docs/formats/tile64_q.md.
//
//   tile t of batch b starts at word offsets[b, t] of the payload of all batches and takes ceil(n / capacity) words
//   2 bits: word | c15 c14 .. c2 c1 c0 |   code of survivor j: word j div 16, bits 2*(j mod 16) .., low first
#pragma once

#include <cmath>
#include <cstdint>

#include "core/divide_up.h"
#include "core/portable.h"

namespace kvpack::tile64_q {

inline constexpr int kWordBits = 32;

/// Codes of a word.
KVPACK_HOST_DEVICE constexpr int capacity(int bits) { return kWordBits / bits; }

/// Words that a tile of `count` survivors takes.
KVPACK_HOST_DEVICE constexpr std::int64_t tile_words(std::int64_t count, int bits) {
  return divide_up(count, capacity(bits));
}

/// Largest code.
KVPACK_HOST_DEVICE constexpr float largest_code(int bits) { return static_cast<float>((1 << bits) - 1); }

/// The grid of one tile: value = (code - zero) * scale.
struct Grid {
  float scale = 1.0f;
  float zero = 0.0f;  // whole, not clamped
};

/// The grid of a tile whose survivors span [low, high]; a tile without survivors keeps {1, 0}. A span that is not finite
/// gives {NaN, 0}. A span of no width gives scale 1: the tile then decodes to whole numbers, a fault of the format.
KVPACK_HOST_DEVICE inline Grid grid_of(float low, float high, int bits) {
  const float span = high - low;
  if (!(span <= 3.402823466e+38f)) return {NAN, 0.0f};
  float scale = span / largest_code(bits);
  if (scale == 0.0f) scale = 1.0f;
  return {scale, floorf(-low / scale + 0.5f)};
}

/// The code of a survivor; 0 on a grid that is not finite.
KVPACK_HOST_DEVICE inline std::uint32_t code_of(float value, Grid grid, int bits) {
  const float code = floorf(value / grid.scale + 0.5f) + grid.zero;
  if (!(code > 0.0f)) return 0;
  const float largest = largest_code(bits);
  return static_cast<std::uint32_t>(code < largest ? code : largest);
}

/// What a code stands for.
KVPACK_HOST_DEVICE inline float value_of(std::uint32_t code, Grid grid) {
  return (static_cast<float>(code) - grid.zero) * grid.scale;
}

}  // namespace kvpack::tile64_q
