// A float32 as the sum of two bfloat16, for products on tensor cores in bfloat16: what the first leaves goes into the second.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace kvpack::cuda {

/// Both halves of a pair of numbers.
struct SplitPair {
  std::uint32_t high;
  std::uint32_t low;
};

__device__ inline std::uint32_t bits_of(__nv_bfloat162 pair) { return *reinterpret_cast<std::uint32_t*>(&pair); }

__device__ inline SplitPair split_pair(float a, float b) {
  const __nv_bfloat162 high = __floats2bfloat162_rn(a, b);
  const float2 rounded = __bfloat1622float2(high);
  return {bits_of(high), bits_of(__floats2bfloat162_rn(a - rounded.x, b - rounded.y))};
}

/// A number in the memory of a float: its high half in the lower bits, then its low half. 0 is 0.
struct SplitFloat {
  std::uint32_t bits;
};

__device__ inline SplitFloat split_float(float value) {
  const SplitPair pair = split_pair(value, 0.0f);
  return {__byte_perm(pair.high, pair.low, 0x5410)};
}

/// Neighbours as the pair of their halves.
__device__ inline SplitPair pair_of(SplitFloat a, SplitFloat b) {
  return {__byte_perm(a.bits, b.bits, 0x5410), __byte_perm(a.bits, b.bits, 0x7632)};
}

}  // namespace kvpack::cuda
