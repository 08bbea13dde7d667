// What every implementation of FlatQuant's operations receives, and the list of them.
#pragma once

#include <array>
#include <cstdint>

#include "kvpack/kron.h"

namespace kvpack {

/// How codes lie in memory: the type of their view.
enum class CodeForm : std::int32_t {
  kInt8,         // [rows, n], one byte a code
  kPackedWords,  // [rows, n/8] int32
  kPairs,        // [rows, n/2] uint8: the bytes of kPackedWords
};

/// What stands before the transform.
enum class KronProducer : std::int32_t {
  kNone,     // x
  kRmsNorm,  // x * (1 / sqrt(mean x^2 + epsilon)) * second, second [n]
  kSiluMul,  // x / (1 + exp(-x)) * second, second [tokens, n]
};

/// The transform after all checks: X [rows, columns] of each token, rows * columns = n.
struct KronMatrices {
  const void* left = nullptr;      // [rows, rows] or null: not multiplied
  const void* right = nullptr;     // [columns, columns] or null
  const void* diagonal = nullptr;  // [rows * columns] or null
  std::int64_t rows = 0;
  std::int64_t columns = 0;
};

/// One output after all checks.
struct KronOutputData {
  void* codes = nullptr;
  float* scales = nullptr;  // [tokens]
  float* zeros = nullptr;   // [tokens] or null: the symmetric grid
  float clip_max = 1.0f;
  float clip_min = 1.0f;
};

/// One call of kron_quantize or of the two with a producer. Trivially copyable; also handed to the CUDA library.
struct KronQuantizeProblem {
  const void* x = nullptr;       // [tokens, n], channels adjacent
  const void* second = nullptr;  // see KronProducer
  KronProducer producer = KronProducer::kNone;
  float epsilon = 0.0f;
  DType dtype = DType::kFloat32;  // of x, second, matrices
  std::int64_t tokens = 0;
  std::int64_t x_stride = 0;       // elements between tokens
  std::int64_t second_stride = 0;  // kSiluMul: the same for `second`
  KronMatrices matrices;
  CodeForm form = CodeForm::kInt8;
  CodeEncoding encoding = CodeEncoding::kTwosComplement;
  bool is_affine = false;  // zeros of every output are given
  std::int32_t num_outputs = 0;
  std::array<KronOutputData, kMaxKronOutputs> outputs{};
  void* workspace = nullptr;  // CUDA: kron_workspace_bytes
  void* stream = nullptr;
};

/// Rows of codes after all checks.
struct Int4Data {
  const void* codes = nullptr;
  const float* scales = nullptr;
  const float* zeros = nullptr;  // or null: all 0
  CodeForm form = CodeForm::kInt8;
  CodeEncoding encoding = CodeEncoding::kTwosComplement;
  std::int64_t rows = 0;
  std::int64_t columns = 0;  // n
};

struct DequantizeInt4Problem {
  Int4Data rows;
  void* out = nullptr;  // [rows, columns] contiguous
  DType dtype = DType::kFloat32;
  void* stream = nullptr;
};

struct UndoTransformProblem {
  const void* y = nullptr;  // [tokens, n]
  void* out = nullptr;      // [tokens, n]
  DType dtype = DType::kFloat32;
  std::int64_t tokens = 0;
  std::int64_t y_stride = 0;
  std::int64_t out_stride = 0;
  KronMatrices matrices;  // the diagonal is multiplied after them
  void* stream = nullptr;
};

struct LinearW4A4Problem {
  Int4Data x;
  Int4Data weight;             // without zeros
  const void* bias = nullptr;  // [weight.rows] of dtype, or null
  void* out = nullptr;         // [x.rows, weight.rows] contiguous
  DType dtype = DType::kFloat32;
  void* workspace = nullptr;  // CUDA: linear_w4a4_workspace_bytes
  void* stream = nullptr;
};

using KronQuantizeFunction = void (*)(const KronQuantizeProblem&);
using DequantizeInt4Function = void (*)(const DequantizeInt4Problem&);
using UndoTransformFunction = void (*)(const UndoTransformProblem&);
using LinearW4A4Function = void (*)(const LinearW4A4Problem&);

#define KVPACK_DECLARE_FLATQUANT                      \
  void kron_quantize(const KronQuantizeProblem&);     \
  void dequantize_int4(const DequantizeInt4Problem&); \
  void undo_transform(const UndoTransformProblem&);   \
  void linear_w4a4(const LinearW4A4Problem&);
namespace reference {  // products in float64
KVPACK_DECLARE_FLATQUANT
}
namespace scalar {
KVPACK_DECLARE_FLATQUANT
}
namespace avx2 {
KVPACK_DECLARE_FLATQUANT
}
namespace avx512 {
KVPACK_DECLARE_FLATQUANT
}
namespace cuda {
KVPACK_DECLARE_FLATQUANT
// Other implementations of the same, to force: by mma.sync, for GPUs since sm_80, and without tensor cores.
void kron_quantize_mma(const KronQuantizeProblem&);
void kron_quantize_plain(const KronQuantizeProblem&);
void linear_w4a4_plain(const LinearW4A4Problem&);
}  // namespace cuda
#undef KVPACK_DECLARE_FLATQUANT
namespace amx {  // bfloat16 products, and products of codes for many tokens; the rest as avx512
void kron_quantize(const KronQuantizeProblem&);
void linear_w4a4(const LinearW4A4Problem&);
}  // namespace amx

}  // namespace kvpack
