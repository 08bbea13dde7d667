// Two 16-bit floating-point numbers in one register: compares, minima and conversions for both types. Masks and fused
// products of bfloat16 exist since sm_80; in code for older GPUs those of both types are a trap.
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
#if __CUDA_ARCH__ >= 800
  return __hgtu2_mask(__habs2(pair_of<kType>(x)), pair_of<kType>(limit));
#else
  __trap();
  return 0;
#endif
}

/// 1.0 where |x| equals `magnitude` and neither is a NaN, else 0.0.
template <MmaType kType>
__device__ inline std::uint32_t ones_equal(std::uint32_t x, std::uint32_t magnitude) {
  return bits_of_pair(__heq2(__habs2(pair_of<kType>(x)), pair_of<kType>(magnitude)));
}

/// Sums, differences, products and a * b + c.
template <MmaType kType>
__device__ inline std::uint32_t pair_sum(std::uint32_t a, std::uint32_t b) {
  return bits_of_pair(__hadd2(pair_of<kType>(a), pair_of<kType>(b)));
}

template <MmaType kType>
__device__ inline std::uint32_t pair_difference(std::uint32_t a, std::uint32_t b) {
  return bits_of_pair(__hsub2(pair_of<kType>(a), pair_of<kType>(b)));
}
template <MmaType kType>
__device__ inline std::uint32_t pair_product(std::uint32_t a, std::uint32_t b) {
  return bits_of_pair(__hmul2(pair_of<kType>(a), pair_of<kType>(b)));
}
template <MmaType kType>
__device__ inline std::uint32_t pair_fma(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
#if __CUDA_ARCH__ >= 800
  return bits_of_pair(__hfma2(pair_of<kType>(a), pair_of<kType>(b), pair_of<kType>(c)));
#else
  __trap();
  return 0;
#endif
}

/// All bits where a >= b, where a == b (no NaNs), where they differ or one is a NaN.
template <MmaType kType>
__device__ inline std::uint32_t mask_at_least(std::uint32_t a, std::uint32_t b) {
#if __CUDA_ARCH__ >= 800
  return __hge2_mask(pair_of<kType>(a), pair_of<kType>(b));
#else
  __trap();
  return 0;
#endif
}
template <MmaType kType>
__device__ inline std::uint32_t mask_equal(std::uint32_t a, std::uint32_t b) {
#if __CUDA_ARCH__ >= 800
  return __heq2_mask(pair_of<kType>(a), pair_of<kType>(b));
#else
  __trap();
  return 0;
#endif
}
template <MmaType kType>
__device__ inline std::uint32_t mask_differs(std::uint32_t a, std::uint32_t b) {
#if __CUDA_ARCH__ >= 800
  return __hneu2_mask(pair_of<kType>(a), pair_of<kType>(b));
#else
  __trap();
  return 0;
#endif
}

/// One of the two numbers in both halves.
template <MmaType kType>
__device__ inline std::uint32_t lower_twice(std::uint32_t x) {
  if constexpr (kType == MmaType::kBFloat16) return bits_of_pair(__low2bfloat162(pair_of<kType>(x)));
  return bits_of_pair(__low2half2(pair_of<MmaType::kHalf>(x)));
}
template <MmaType kType>
__device__ inline std::uint32_t upper_twice(std::uint32_t x) {
  if constexpr (kType == MmaType::kBFloat16) return bits_of_pair(__high2bfloat162(pair_of<kType>(x)));
  return bits_of_pair(__high2half2(pair_of<MmaType::kHalf>(x)));
}

/// Minima and maxima of numbers; of a number and a NaN, the number.
template <MmaType kType>
__device__ inline std::uint32_t pair_min_known(std::uint32_t a, std::uint32_t b) {
  return bits_of_pair(__hmin2(pair_of<kType>(a), pair_of<kType>(b)));
}
template <MmaType kType>
__device__ inline std::uint32_t pair_max_known(std::uint32_t a, std::uint32_t b) {
  return bits_of_pair(__hmax2(pair_of<kType>(a), pair_of<kType>(b)));
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

/// The two numbers nearest to float32s, the lower first.
template <MmaType kType>
__device__ inline std::uint32_t pair_near(float lower, float upper) {
  if constexpr (kType == MmaType::kBFloat16) return bits_of_pair(__floats2bfloat162_rn(lower, upper));
  return bits_of_pair(__floats2half2_rn(lower, upper));
}

/// Bits of the smallest number that is not below a float32, and of the largest that is not above it; infinities count.
template <MmaType kType>
__device__ inline std::uint32_t bits_at_least(float value) {
  if constexpr (kType == MmaType::kBFloat16) return __bfloat16_as_ushort(__float2bfloat16_ru(value));
  return __half_as_ushort(__float2half_ru(value));
}
template <MmaType kType>
__device__ inline std::uint32_t bits_at_most(float value) {
  if constexpr (kType == MmaType::kBFloat16) return __bfloat16_as_ushort(__float2bfloat16_rd(value));
  return __half_as_ushort(__float2half_rd(value));
}

/// About a / b.
template <MmaType kType>
__device__ inline std::uint32_t pair_ratio(std::uint32_t a, std::uint32_t b) {
  float lower;
  float upper;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(lower) : "f"(lower_value<kType>(b)));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(upper) : "f"(upper_value<kType>(b)));
  return pair_product<kType>(a, pair_near<kType>(lower, upper));
}

/// Bits of 2^exponent; 0 <= exponent <= 15.
template <MmaType kType>
__device__ constexpr std::uint32_t power_bits(int exponent) {
  return static_cast<std::uint32_t>(PackedPair<kType>::kExponentBias + exponent) << PackedPair<kType>::kMantissaBits;
}

}  // namespace kvpack::cuda
