// Floats as integers of the same order, for minima by atomics and for selection by bytes.
#pragma once

#include <cstdint>

namespace kvpack::cuda {

/// Order-preserving: a < b as numbers exactly when key(a) < key(b). Both zeros have one key.
///   -2.0  0xc0000000 -> 0x3fffffff     negative: all bits flipped
///    0.0  0x00000000 -> 0x80000000     else: sign bit set
///    1.0  0x3f800000 -> 0xbf800000
__device__ inline std::uint32_t ordered_key(float value) {
  const std::uint32_t word = __float_as_uint(value + 0.0f);
  return (word & 0x80000000u) != 0 ? ~word : word | 0x80000000u;
}

__device__ inline float key_value(std::uint32_t key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}

/// Smallest and largest of a vector as keys, the largest inverted: both start as all ones and shrink.
/// No default values: shared memory cannot have any.
struct RangeKeys {
  std::uint32_t low;
  std::uint32_t inverted_high;

  /// The range of nothing.
  __device__ static RangeKeys none() { return {~0u, ~0u}; }
  __device__ void add(float value) {
    const std::uint32_t key = ordered_key(value);
    low = min(low, key);
    inverted_high = min(inverted_high, ~key);
  }
  [[nodiscard]] __device__ float low_value() const { return key_value(low); }
  [[nodiscard]] __device__ float high_value() const { return key_value(~inverted_high); }
};

/// Merges into shared or global memory.
__device__ inline void merge_atomically(RangeKeys& target, RangeKeys keys) {
  atomicMin(&target.low, keys.low);
  atomicMin(&target.inverted_high, keys.inverted_high);
}

}  // namespace kvpack::cuda
