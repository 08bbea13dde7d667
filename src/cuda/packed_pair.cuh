// Two 16-bit floating-point numbers in one register: compares, minima and conversions for both types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "cuda/mma.cuh"

namespace kvpack::cuda {

/// The vector type of CUDA's intrinsics.
template <MmaType kType>
struct PackedPair;
template <>
struct PackedPair<MmaType::kHalf> {
  using Type = __half2;
  static constexpr std::uint32_t kInfinity = 0x7c00u;
  static constexpr int kMantissaBits = 10;
  static constexpr int kExponentBias = 15;
};
template <>
struct PackedPair<MmaType::kBFloat16> {
  using Type = __nv_bfloat162;
  static constexpr std::uint32_t kInfinity = 0x7f80u;
  static constexpr int kMantissaBits = 7;
  static constexpr int kExponentBias = 127;
};

template <MmaType kType>
__device__ inline typename PackedPair<kType>::Type pair_of(std::uint32_t bits) {
  typename PackedPair<kType>::Type pair;
  memcpy(&pair, &bits, sizeof(bits));
  return pair;
}

template <typename Pair>
__device__ inline std::uint32_t bits_of_pair(Pair pair) {
  std::uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

/// 1.0 where |x| is above `limit` or x is a NaN, else 0.0; limit must not be a NaN.
template <MmaType kType>
__device__ inline std::uint32_t ones_above(std::uint32_t x, std::uint32_t limit) {
  return bits_of_pair(__hgtu2(__habs2(pair_of<kType>(x)), pair_of<kType>(limit)));
}

/// All bits where |x| is above `limit` or x is a NaN, else none.
template <MmaType kType>
__device__ inline std::uint32_t mask_above(std::uint32_t x, std::uint32_t limit) {
  return __hgtu2_mask(__habs2(pair_of<kType>(x)), pair_of<kType>(limit));
}

/// 1.0 where |x| equals `magnitude` and neither is a NaN, else 0.0.
template <MmaType kType>
__device__ inline std::uint32_t ones_equal(std::uint32_t x, std::uint32_t magnitude) {
  return bits_of_pair(__heq2(__habs2(pair_of<kType>(x)), pair_of<kType>(magnitude)));
}

/// 1.0 where x is at least `limit` and neither is a NaN, else 0.0.
template <MmaType kType>
__device__ inline std::uint32_t ones_at_least(std::uint32_t x, std::uint32_t limit) {
  return bits_of_pair(__hge2(pair_of<kType>(x), pair_of<kType>(limit)));
}

template <MmaType kType>
__device__ inline std::uint32_t pair_sum(std::uint32_t a, std::uint32_t b) {
  return bits_of_pair(__hadd2(pair_of<kType>(a), pair_of<kType>(b)));
}

/// Minima; a NaN wins.
template <MmaType kType>
__device__ inline std::uint32_t pair_min(std::uint32_t a, std::uint32_t b) {
  return bits_of_pair(__hmin2_nan(pair_of<kType>(a), pair_of<kType>(b)));
}

/// Maxima; a NaN wins.
template <MmaType kType>
__device__ inline std::uint32_t pair_max(std::uint32_t a, std::uint32_t b) {
  return bits_of_pair(__hmax2_nan(pair_of<kType>(a), pair_of<kType>(b)));
}

/// The lower and the upper number as float32.
template <MmaType kType>
__device__ inline float lower_value(std::uint32_t x) {
  if constexpr (kType == MmaType::kBFloat16) return __uint_as_float(x << 16);
  return __low2float(pair_of<MmaType::kHalf>(x));
}
template <MmaType kType>
__device__ inline float upper_value(std::uint32_t x) {
  if constexpr (kType == MmaType::kBFloat16) return __uint_as_float(x & 0xffff0000u);
  return __high2float(pair_of<MmaType::kHalf>(x));
}

/// Bits of the number nearest to a float32.
template <MmaType kType>
__device__ inline std::uint32_t bits_near(float value) {
  if constexpr (kType == MmaType::kBFloat16) return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  return __half_as_ushort(__float2half_rn(value));
}

/// Bits of 2^exponent; 0 <= exponent <= 15.
template <MmaType kType>
__device__ constexpr std::uint32_t power_bits(int exponent) {
  return static_cast<std::uint32_t>(PackedPair<kType>::kExponentBias + exponent) << PackedPair<kType>::kMantissaBits;
}

}  // namespace kvpack::cuda
