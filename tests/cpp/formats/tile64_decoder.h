// A second decoder of both tile formats, written from docs/formats alone and from the other end: it asks for each element
// of the matrix which bit and which code it is. Includes nothing of src/formats.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

#include "core/half.h"
#include "kvpack/tile64.h"

namespace kvpack::test {

/// The value of one element.
inline float decode_element(const Tile64& t, std::int64_t batch, std::int64_t token, std::int64_t channel) {
  const std::int64_t num_tiles = (t.tokens + 63) / 64 * t.head_dim;
  std::int64_t tile = 0;
  std::int64_t element = 0;
  if (t.kind == CacheKind::kKey) {
    tile = token / 64 * t.head_dim + channel;
    element = token % 64;
  } else {
    const std::int64_t parts = t.head_dim / 64;
    tile = token / 64 * 64 * parts + channel / 64 * 64 + token % 64;
    element = channel % 64;
  }
  const auto bitmap = static_cast<const std::uint64_t*>(t.bitmaps.data)[batch * num_tiles + tile];
  if ((bitmap >> (63 - element) & 1) == 0) return 0.0f;
  const int before = element == 0 ? 0 : std::popcount(bitmap >> (64 - element));
  const auto* offsets = static_cast<const std::int32_t*>(t.offsets.data);
  if (t.bits == 16) {
    const std::int64_t half = 8 * static_cast<std::int64_t>(static_cast<const std::int32_t*>(t.starts.data)[batch]) +
                              2 * offsets[batch * (num_tiles + 1) + tile] + before;
    if (t.payload.dtype == DType::kFloat16) return to_float(static_cast<const Half*>(t.payload.data)[half]);
    return to_float(static_cast<const BFloat16*>(t.payload.data)[half]);
  }
  const int per_word = 32 / t.bits;
  const auto word =
      static_cast<const std::uint32_t*>(t.payload.data)[offsets[batch * num_tiles + tile] + before / per_word];
  const std::uint32_t code = (word >> (before % per_word * t.bits)) & ((1u << t.bits) - 1);
  const float scale = static_cast<const float*>(t.scales.data)[batch * num_tiles + tile];
  const float zero = static_cast<const float*>(t.zeros.data)[batch * num_tiles + tile];
  return (static_cast<float>(code) - zero) * scale;
}

}  // namespace kvpack::test
