// Elements of the dense side on the GPU, down to the bits of NaNs: core/half.h says what they are, and hardware
// conversions would replace them.
#pragma once

#include <cstdint>

#include "cuda/element.cuh"
#include "formats/tile64/implementations.h"

namespace kvpack::cuda {

/// First element of matrix `batch`, counted from the dense side's pointer. Batches and heads fit 31 bits, which divide
/// in a quarter of the time.
__device__ inline std::int64_t matrix_start(const DenseMatrices& matrices, std::int64_t batch) {
  const auto heads = static_cast<std::uint32_t>(matrices.heads);
  const auto index = static_cast<std::uint32_t>(batch);
  return index / heads * matrices.sequence_stride + index % heads * matrices.head_stride;
}

/// Bits of the float32 that 16 bits stand for.
__device__ inline std::uint32_t widen(std::uint16_t bits, DType dtype) {
  if (dtype == DType::kBFloat16) return static_cast<std::uint32_t>(bits) << 16;
  const std::uint32_t magnitude = bits & 0x7fffu;
  if (magnitude > 0x7c00u) return (bits & 0x8000u) << 16 | 0x7f800000u | (magnitude & 0x3ffu) << 13;
  return __float_as_uint(element_value(Half{bits}));
}

/// Bits of an element of the dense side as float32, whatever its type.
__device__ inline std::uint32_t load_bits(const DenseMatrices& matrices, std::int64_t index) {
  if (matrices.dtype == DType::kFloat32) return static_cast<const std::uint32_t*>(matrices.data)[index];
  return widen(static_cast<const std::uint16_t*>(matrices.data)[index], matrices.dtype);
}

/// float32 bits as 16 bits: RNE, NaN stays a NaN with its upper payload.
__device__ inline std::uint16_t narrow(std::uint32_t word, DType dtype) {
  const std::uint32_t magnitude = word & 0x7fffffffu;
  if (dtype == DType::kFloat16) {
    if (magnitude > 0x7f800000u) return (word >> 16 & 0x8000u) | 0x7e00u | (magnitude >> 13 & 0x3ffu);
    Half half;
    set_element(__uint_as_float(word), half);
    return half.bits;
  }
  if (magnitude > 0x7f800000u) return word >> 16 | 0x40u;
  return (word + 0x7fffu + (word >> 16 & 1u)) >> 16;
}

/// Undoes widen() exactly, signalling NaNs included.
__device__ inline std::uint16_t narrow_back(std::uint32_t word, DType dtype) {
  if (dtype == DType::kBFloat16) return static_cast<std::uint16_t>(word >> 16);
  if ((word & 0x7fffffffu) > 0x7f800000u) return (word >> 16 & 0x8000u) | 0x7c00u | (word >> 13 & 0x3ffu);
  return narrow(word, DType::kFloat16);
}

}  // namespace kvpack::cuda
