// Elements of every type as float32 on the device, with the roundings of core/half.h. A file of its own because the
// hardware converts in one instruction, where the host's scalar code works on bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/half.h"

namespace kvpack::cuda {

__device__ inline float element_value(Half element) { return __half2float(__ushort_as_half(element.bits)); }
__device__ inline float element_value(BFloat16 element) {
  return __uint_as_float(static_cast<std::uint32_t>(element.bits) << 16);
}
__device__ inline float element_value(float element) { return element; }
__device__ inline float element_value(double element) { return __double2float_rn(element); }

/// Rounds a value that is not a NaN to nearest, ties to even.
__device__ inline void set_element(float value, Half& element) {
  element.bits = __half_as_ushort(__float2half_rn(value));
}
__device__ inline void set_element(float value, BFloat16& element) {
  element.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
__device__ inline void set_element(float value, float& element) { element = value; }
__device__ inline void set_element(float value, double& element) { element = static_cast<double>(value); }

/// 1 / x of a normal number, nearly: a step of Newton's makes it the nearest.
__device__ inline float fast_reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace kvpack::cuda
