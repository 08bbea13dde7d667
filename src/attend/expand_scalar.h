// Tiles to 64 floats without intrinsics. Included by attend/expand_cpu.h.
#pragma once

namespace kvpack::scalar {
namespace {

/// Bitmaps of kTileElements tiles with element i in bit i, as the expansions below want them.
inline void reverse_bitmaps(const std::uint64_t* bitmaps, std::uint64_t* masks) {
  for (std::int64_t t = 0; t < kTileElements; ++t) {
    std::uint64_t word = __builtin_bswap64(bitmaps[t]);
    word = ((word >> 4) & 0x0f0f0f0f0f0f0f0fu) | ((word & 0x0f0f0f0f0f0f0f0fu) << 4);
    word = ((word >> 2) & 0x3333333333333333u) | ((word & 0x3333333333333333u) << 2);
    masks[t] = ((word >> 1) & 0x5555555555555555u) | ((word & 0x5555555555555555u) << 1);
  }
}

/// A NaN stays as it is: adding to one whose bits are all set would make it -0.
inline float round_value(float value, const RoundedGrid& grid) {
  if (value != value) return value;
  const auto word = std::bit_cast<std::uint32_t>(value);
  return std::bit_cast<float>((word + grid.half_step + ((word >> 16) & grid.odd_bit)) & grid.kept_bits);
}

template <int kBits>
inline void expand(Codes<kBits>, std::uint64_t mask, const std::byte* bytes, RoundedGrid grid, float* out) {
  std::fill_n(out, kTileElements, 0.0f);
  for (int j = 0; mask != 0; mask &= mask - 1, ++j) {
    const auto byte = std::to_integer<std::uint32_t>(bytes[j * kBits / 8]);
    const std::uint32_t code = (byte >> (j * kBits % 8)) & ((1u << kBits) - 1u);
    out[std::countr_zero(mask)] = round_value(tile64_q::value_of(code, {grid.scale, grid.zero}), grid);
  }
}

template <typename T>
inline void expand(Halves<T>, std::uint64_t mask, const std::byte* bytes, RoundedGrid grid, float* out) {
  std::fill_n(out, kTileElements, 0.0f);
  for (; mask != 0; mask &= mask - 1, bytes += sizeof(T)) {
    T half;
    std::memcpy(&half, bytes, sizeof(T));
    out[std::countr_zero(mask)] = round_value(to_float(half), grid);
  }
}

/// Puts 64 sums over expanded tiles into element order; they are in it.
template <typename Survivor>
inline void order_elements(Survivor, float*) {}

}  // namespace
}  // namespace kvpack::scalar
