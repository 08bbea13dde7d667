// What every implementation of attention on tiles receives, and the list of them.
#pragma once

#include <cstdint>

#include "formats/tile64/implementations.h"
#include "kvpack/attend.h"

namespace kvpack {

/// One product after all checks. Keys: x is q [batches*group, rows, head_dim], out [batches*group, rows, tokens].
/// Values: x is p [batches*group, rows, tokens], out [batches*group, rows, head_dim]. Both contiguous.
struct MultiplyTile64Problem {
  Tile64Data tiles;
  const void* x = nullptr;
  void* out = nullptr;
  DType dtype = DType::kFloat16;  // of x and out
  std::int64_t group = 1;
  std::int64_t rows = 1;
  void* workspace = nullptr;  // CUDA: attend_workspace_bytes
  void* stream = nullptr;
};

/// One attention call after all checks.
struct AttendTile64Problem {
  Tile64Data keys;
  Tile64Data values;
  const void* q = nullptr;  // [batches*group, rows, head_dim]
  void* out = nullptr;      // [batches*group, rows, head_dim]
  float* lse = nullptr;     // [batches*group, rows] or null
  DType dtype = DType::kFloat16;
  std::int64_t group = 1;
  std::int64_t rows = 1;
  std::int64_t recent_tokens = 0;
  DenseMatrices recent_keys;  // of `batches` matrices [recent_tokens, head_dim]
  DenseMatrices recent_values;
  float scale = 1.0f;
  float softcap = 0.0f;  // 0: none
  Masking masking = Masking::kNone;
  void* workspace = nullptr;
  void* stream = nullptr;
};

using MultiplyTile64Function = void (*)(const MultiplyTile64Problem&);
using AttendTile64Function = void (*)(const AttendTile64Problem&);

#define KVPACK_DECLARE_ATTEND                         \
  void multiply_tile64(const MultiplyTile64Problem&); \
  void attend_tile64(const AttendTile64Problem&);
namespace reference {  // accumulates in float64
KVPACK_DECLARE_ATTEND
}
namespace scalar {
KVPACK_DECLARE_ATTEND
}
namespace avx2 {
KVPACK_DECLARE_ATTEND
}
namespace avx512 {
KVPACK_DECLARE_ATTEND
}
namespace cuda {  // in libkvpack_cuda
KVPACK_DECLARE_ATTEND
}
#undef KVPACK_DECLARE_ATTEND

}  // namespace kvpack
