// Stage 2 of the pipeline: invertible linear maps of each head.
#pragma once

#include <cstdint>

#include "kvpack/tensor.h"

namespace [[gnu::visibility("default")]] kvpack {

/// Which way a rotation goes. The numbers are part of the C ABI.
enum class Direction : std::int32_t {
  kForward = 0,  ///< out = x R
  kInverse = 1,  ///< out = x R^T, which undoes it where R is orthogonal
};

/// Multiplies every head of every token by one matrix.
///   out[t, h*D + j] = sum over i of x[t, h*D + i] * R[i, j]      (kInverse: R[j, i])
///   The sum runs over i upwards from +0 with one fused multiply-add a term, in float32: the same bits everywhere.
///   Shapes    x, out [tokens, heads*D] or [batch, tokens, heads*D], same shape, type and device
///             rotation [D, D] float32, contiguous, on that device
///   Types     float16, bfloat16, float32, float64 at any non-negative strides; computed in float32
///   Requires  1 <= D <= 1024; D divides the channels; out is x itself or does not overlap it; rotation overlaps neither
///   Throws    InvalidArgument with both values
///   Source    docs/numerics.md section 4
void rotate(const TensorView& x, const TensorView& rotation, const TensorView& out,
            Direction direction = Direction::kForward, void* stream = nullptr);

/// Writes a random orthogonal matrix, the same for a seed on every machine.
///   Rows are random vectors of nearly normal numbers (sums of twelve uniform ones, from SplitMix64), orthogonalised twice
///   against those before them in float64 and rounded to float32. Only + - * / and sqrt are used.
///   Shapes    rotation [D, D] float32, contiguous, CPU
///   Requires  1 <= D <= 1024
///   Throws    InvalidArgument with both values
void make_random_rotation(std::uint64_t seed, const TensorView& rotation);

}  // namespace kvpack
