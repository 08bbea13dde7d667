// FlatQuant: a Kronecker transform and dynamic int4 in one go, the way back, and the linear layer that reads the codes.
#pragma once

#include <cstdint>
#include <span>
#include <utility>

#include "kvpack/tensor.h"

namespace [[gnu::visibility("default")]] kvpack {

/// How a code -8 .. 7 lies in the four bits of a packed form. The numbers are part of the C ABI.
enum class CodeEncoding : std::int32_t {
  kTwosComplement = 0,  ///< the low four bits of q
  kOffset = 1,          ///< q + 8; one XOR with 0x88888888 apart
};

/// Rows of int4 codes with one scale a row, and perhaps one zero point. Owns nothing.
///   The type of codes is their form: int8 [rows, n] holds q itself; int32 [rows, n/8] holds element i in bits 4*(i mod 8) of
///   word i div 8; uint8 [rows, n/2] holds element i in bits 4*(i mod 2) of byte i div 2. The two packed forms are the same
///   bytes.
///   Value     (q - zero) * scale
///   Hostile   int8 codes outside -8 .. 7 and zeros that are no such whole numbers are read as they are, and what comes of
///             them is open; nothing else is touched
struct Int4Rows {
  TensorView codes;
  TensorView scales;  ///< [rows, 1] float32
  TensorView zeros;   ///< [rows, 1] float32, whole numbers -8 .. 7; empty: all 0, the symmetric grid
  CodeEncoding encoding = CodeEncoding::kTwosComplement;  ///< of packed forms; int8 knows kTwosComplement alone
};

/// The map of one row: with X = row as M x N, row-major, Y = left^T * X * right.
struct KronTransform {
  TensorView left;      ///< [M, M], or empty: one-sided, M = n / N
  TensorView right;     ///< [N, N], or empty: one-sided, N = n / M
  TensorView diagonal;  ///< [n], multiplied into the row before (undo_transform: after) the matrices; or empty
};

/// Where one quantisation of Y goes, and how its range is clipped: FlatQuant learns a pair for each linear layer.
struct KronOutput {
  Int4Rows rows;          ///< zeros given: the affine grid, else the symmetric one
  double clip_max = 1.0;  ///< factor of the largest value, in (0, 1]
  double clip_min = 1.0;  ///< factor of the smallest value, in (0, 1]
};

/// Most outputs of one transform: queries, keys and values share one, and one to spare.
inline constexpr std::int64_t kMaxKronOutputs = 4;

/// Bytes of working memory of the quantising functions below on a device; 0 on the CPU. M and N as in KronTransform.
[[nodiscard]] std::int64_t kron_workspace_bytes(std::int64_t tokens, std::int64_t rows, std::int64_t columns,
                                                DType dtype, DeviceKind device);

/// Transforms each row and quantises it to int4, once for each output.
///   hi = clip_max * max(0, max Y)   lo = clip_min * min(0, min Y)
///   symmetric   scale = max(hi, -lo) / 7    zero = 0
///   affine      scale = (hi - lo) / 15      zero = RNE(-lo / scale) - 8
///   q = clamp(RNE(Y / scale) + zero, -8, 7)
///   Shapes    x [tokens, n] with adjacent channels, any row stride; left [M, M], right [N, N], diagonal [n]; codes as
///             Int4Rows says, contiguous; scales, zeros [tokens, 1] float32
///   Types     x float16, bfloat16 or float32, matrices and diagonal the same; float32 accumulation. x * diagonal is rounded to
///             the type of x, RNE; the value between the two products may be rounded to it once
///   Special   a row with NaN or infinity (in x, or made by the products) gets codes 0, zero 0 and scale NaN; a row whose
///             scale would be below 2^-126 gets scale 1; other rows are not touched by either
///   Requires  M*N = n; n a multiple of 8 (int32) or 2 (uint8); 1 to kMaxKronOutputs outputs of one form, encoding and grid;
///             one device; outputs and workspace overlap nothing; workspace [bytes/8] int64, empty on the CPU
///   Throws    InvalidArgument with both values; Unsupported with what exists; nothing is written then
///   Source    docs/numerics.md section 6; Sun et al. 2024, "FlatQuant"
void kron_quantize(const TensorView& x, const KronTransform& transform, std::span<const KronOutput> outputs,
                   const TensorView& workspace, void* stream = nullptr);

/// The same behind a root-mean-square norm: the row is x * (1 / sqrt(mean x^2 + epsilon)) * weight (* diagonal), in float32 and
/// rounded once to the type of x.
///   Shapes    weight [n] of the type of x; epsilon at least 0; the rest as kron_quantize
void rmsnorm_kron_quantize(const TensorView& x, const TensorView& weight, double epsilon,
                           const KronTransform& transform, std::span<const KronOutput> outputs,
                           const TensorView& workspace, void* stream = nullptr);

/// The same behind a gated activation: the row is gate / (1 + exp(-gate)) * up (* diagonal), in float32 and rounded once to the
/// type of gate.
///   Shapes    gate, up [tokens, n] with adjacent channels, any row strides; the rest as kron_quantize
void silu_mul_kron_quantize(const TensorView& gate, const TensorView& up, const KronTransform& transform,
                            std::span<const KronOutput> outputs, const TensorView& workspace, void* stream = nullptr);

/// Writes the values of codes, (q - zero) * scale in float32 and then RNE to the type of out, in the transformed basis.
///   Shapes    out [rows, n] float16, bfloat16 or float32, contiguous; n is that of codes
///   Exact     the same bits everywhere
///   Throws    InvalidArgument with both values; Unsupported with what exists
void dequantize_int4(const Int4Rows& rows, const TensorView& out, void* stream = nullptr);

/// Multiplies rows with a Kronecker product: out = (left^T * Y * right) * diagonal. With left^-1, right^-1 and 1/diagonal this
/// undoes the transform of kron_quantize; a weight's rows take left^-T and right^-T, so that products stay what they were.
///   Shapes    y, out [tokens, n] with adjacent channels, any row strides, one type; the rest as kron_quantize
///   Requires  out overlaps nothing
///   Throws    InvalidArgument with both values; Unsupported with what exists
void undo_transform(const TensorView& y, const KronTransform& inverse, const TensorView& out, void* stream = nullptr);

/// The two sides of n that FlatQuant takes: with the smallest a >= ceil(sqrt n) for which a^2 - n is a square b^2, a-b and a+b,
/// the closest pair of equal parity. 4096 is 64, 64 and 11008 is 86, 128. For n = 2 mod 4 no such pair exists: the
/// closest factors then, 10 is 2, 5.
///   Requires  1 <= n <= 2^40
///   Throws    InvalidArgument
[[nodiscard]] std::pair<std::int64_t, std::int64_t> get_decompose_dim(std::int64_t n);

/// Bytes of working memory of linear_w4a4 on a device; 0 on the CPU.
[[nodiscard]] std::int64_t linear_w4a4_workspace_bytes(std::int64_t tokens, std::int64_t columns,
                                                       std::int64_t out_features, DeviceKind device);

/// The linear layer of int4 activations and int4 weights.
///   out[t, o] = float(sum over c of (x.q[t, c] - x.zero[t]) * weight.q[o, c]) * (x.scale[t] * weight.scale[o]) + bias[o]
///   Shapes    x rows [tokens, n], weight rows [out_features, n] without zeros, bias [out_features] or empty, out [tokens,
///             out_features] float16, bfloat16 or float32, contiguous; bias of the type of out
///   Exact     the sum is of whole numbers in int32; then float32 in the order above, rounded once to the type of out: the
///             same bits everywhere. A scale of NaN makes its row (or column) NaN
///   Requires  1 <= n <= 2^22; forms and encodings of x and weight may differ; one device; out and workspace overlap nothing
///   Throws    InvalidArgument with both values; Unsupported with what exists
void linear_w4a4(const Int4Rows& x, const Int4Rows& weight, const TensorView& bias, const TensorView& out,
                 const TensorView& workspace, void* stream = nullptr);

}  // namespace kvpack
