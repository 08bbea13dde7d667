// Grids and codes of 16-bit survivors. Up to 2 bits a code is how many of the tile's steps a survivor reaches; the steps
// are found once, exactly, and compares of two survivors at a time do the rest. Above that a product decides.
#pragma once

#include <cstdint>

#include "cuda/packed_pair.cuh"
#include "formats/tile64/pack_cuda.cuh"

namespace kvpack::cuda {

/// A tile's grid, by one thread from its survivors in shared memory.
template <MmaType kType>
__device__ tile64_q::Grid packed_grid(const std::uint16_t* survivors, int count, int bits) {
  if (count == 0) return {};
  const std::uint32_t first = survivors[0] * 0x10001u;
  std::uint32_t low = first;
  std::uint32_t high = first;
  for (int unit = 0; unit * kUnitHalves < count; ++unit) {
    const uint4 words = reinterpret_cast<const uint4*>(survivors)[unit];
    const std::uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int missing = unit * kUnitHalves + 2 * w + 2 - count;  // of this pair: at most 0 if none
      std::uint32_t pair = pairs[w];
      if (missing > 0) pair = missing == 1 ? (pair & 0xffffu) | (first & 0xffff0000u) : first;
      low = pair_min<kType>(low, pair);
      high = pair_max<kType>(high, pair);
    }
  }
  low = pair_min<kType>(low, low >> 16 | low << 16);
  high = pair_max<kType>(high, high >> 16 | high << 16);
  return tile64_q::grid_of(lower_value<kType>(low), lower_value<kType>(high), bits);
}

/// The code of a survivor, equal to tile64_q::code_of: a product with 1/scale decides unless it comes near a boundary,
/// where only the true quotient can.
__device__ inline std::uint32_t quick_code(float value, float4 grid, int bits, int largest) {
  constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const float quotient = value * grid.z;
  const float rounded = quotient + kWhole;
  const float distance = fabsf(quotient - (rounded - kWhole));
  if (!(distance < 0.5f - grid.w)) return tile64_q::code_of(value, {grid.x, grid.y}, bits);
  const int code = __float_as_int(rounded + grid.y) - __float_as_int(kWhole);
  return static_cast<std::uint32_t>(min(max(code, 0), largest));
}

/// Scale, zero, 1/scale and the margin of quick_code. The product errs by less than 2^-22 of the quotient, and so does
/// the reference's own sum with 0.5; quotients stay below |zero| + 2^bits. A margin of 1 always asks for the quotient.
__device__ inline float4 quick_grid(tile64_q::Grid grid, int bits) {
  const float reach = fabsf(grid.zero) + static_cast<float>(1 << bits);
  const bool is_plain = reach < 65536.0f && grid.scale > 1e-30f && grid.scale < 1e30f;
  return make_float4(grid.scale, grid.zero, __frcp_rn(grid.scale), is_plain ? (reach + 1.0f) * 0x1p-20f : 1.0f);
}

inline constexpr int kMostStepBits = 2;

/// The next number above, never a NaN for finite ones.
__device__ inline std::uint32_t next_above(std::uint32_t bits) {
  if ((bits & 0x7fffu) == 0) return 1;
  return bits < 0x8000u ? bits + 1 : bits - 1;
}

/// The smallest 16-bit number of code `code` or above by trying out: codes never fall when numbers rise.
template <MmaType kType>
__device__ __noinline__ std::uint32_t search_step(tile64_q::Grid grid, int code, int bits) {
  int low = -static_cast<int>(PackedPair<kType>::kInfinity) - 1;  // signed magnitudes in order
  int high = static_cast<int>(PackedPair<kType>::kInfinity) + 1;
  while (high - low > 1) {
    const int middle = (low + high) >> 1;
    const std::uint32_t number = static_cast<std::uint32_t>(middle < 0 ? 0x8000 - middle : middle);
    const bool reaches = static_cast<int>(tile64_q::code_of(lower_value<kType>(number), grid, bits)) >= code;
    (reaches ? high : low) = middle;
  }
  return static_cast<std::uint32_t>(high < 0 ? 0x8000 - high : high);
}

/// The smallest 16-bit number of code `code` or above: near (code - zero - 1/2) * scale, and when a number comes as near
/// to that as the reference's float32 may err, its true code decides. `margin` as quick_grid tells.
template <MmaType kType>
__device__ std::uint32_t code_step(tile64_q::Grid grid, float margin, int code, int bits) {
  const float boundary = (static_cast<float>(code) - grid.zero - 0.5f) * grid.scale;
  const std::uint32_t nearest = bits_near<kType>(boundary);
  const float value = lower_value<kType>(nearest);
  const float distance = value - boundary;
  bool reaches = distance > 0.0f;
  if (!(fabsf(distance) > margin * grid.scale)) {
    reaches = static_cast<int>(tile64_q::code_of(value, grid, bits)) >= code;
  }
  return reaches ? nearest : next_above(nearest);
}

/// The steps of a grid: a code is how many of x's halves and of y's lower half a survivor reaches. A NaN is never reached.
template <MmaType kType, int kBits>
__device__ uint2 code_steps(tile64_q::Grid grid) {
  constexpr std::uint32_t kNever = 0x7fffu;
  const float margin = quick_grid(grid, kBits).w;
  std::uint32_t steps[3] = {kNever, kNever, kNever};
#pragma unroll
  for (int code = 1; code < 1 << kBits; ++code) {
    if (grid.scale != grid.scale) break;
    steps[code - 1] =
        margin < 1.0f ? code_step<kType>(grid, margin, code, kBits) : search_step<kType>(grid, code, kBits);
  }
  return make_uint2(steps[0] | steps[1] << 16, steps[2]);
}

/// The codes of two numbers, in the lowest bits of either half; the bits above are rubbish.
template <MmaType kType, int kBits>
__device__ std::uint32_t pair_codes(std::uint32_t pair, uint2 steps) {
  const std::uint32_t first = mask_at_least<kType>(pair, lower_twice<kType>(steps.x));
  if constexpr (kBits == 1) return first;
  const std::uint32_t second = mask_at_least<kType>(pair, upper_twice<kType>(steps.x));
  const std::uint32_t third = mask_at_least<kType>(pair, lower_twice<kType>(steps.y));
  return ((first ^ second ^ third) & 0x10001u) | (second & ~0x10001u);
}

/// Writes the codes of the 8 survivors of one unit, and of what fills up its word: bits bytes.
template <MmaType kType>
__device__ void write_unit_codes(const std::uint16_t* survivors, int count, int unit, float4 grid, int bits, int words,
                                 std::uint8_t* target) {
  std::uint64_t codes = 0;
  if (unit * kUnitHalves < count) {
    const int largest = (1 << bits) - 1;
    const uint4 loaded = reinterpret_cast<const uint4*>(survivors)[unit];
    const std::uint32_t pairs[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
    for (int w = 3; w >= 0; --w) {
      const int place = unit * kUnitHalves + 2 * w;
      const std::uint32_t upper =
          place + 1 < count ? quick_code(upper_value<kType>(pairs[w]), grid, bits, largest) : 0u;
      const std::uint32_t lower = place < count ? quick_code(lower_value<kType>(pairs[w]), grid, bits, largest) : 0u;
      codes = codes << (2 * bits) | (upper << bits | lower);
    }
  }
  std::uint8_t* piece = target + unit * bits;
  *reinterpret_cast<std::uint32_t*>(piece) = static_cast<std::uint32_t>(codes);
  if (bits == 8 && 2 * unit + 1 < words) {
    reinterpret_cast<std::uint32_t*>(piece)[1] = static_cast<std::uint32_t>(codes >> 32);
  }
}

}  // namespace kvpack::cuda
