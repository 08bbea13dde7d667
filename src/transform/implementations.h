// What every implementation of rotation receives, and the list of them.
#pragma once

#include <cstdint>

#include "kvpack/transform.h"

namespace kvpack {

/// Largest head that can be rotated: on the GPU a token's head lies in shared memory.
inline constexpr std::int64_t kMaxRotatedHead = 1024;

/// One sequence after all checks. Trivially copyable; also handed to the CUDA library.
struct RotateProblem {
  const void* x = nullptr;          // [tokens, channels]
  void* out = nullptr;              // [tokens, channels], may be x
  const float* rotation = nullptr;  // [head_dim, head_dim]
  DType dtype = DType::kFloat32;
  std::int64_t tokens = 0;
  std::int64_t channels = 0;
  std::int64_t head_dim = 0;
  std::int64_t x_token_stride = 0;    // elements
  std::int64_t x_channel_stride = 1;  // 1 on the CPU: the entry packs other layouts first
  std::int64_t out_token_stride = 0;
  std::int64_t out_channel_stride = 1;
  Direction direction = Direction::kForward;  // kForward on the CPU: the entry transposes the matrix
  void* stream = nullptr;
};

using RotateFunction = void (*)(const RotateProblem&);

namespace reference {
void rotate(const RotateProblem& problem);
}
namespace scalar {
void rotate(const RotateProblem& problem);
}
namespace avx2 {
void rotate(const RotateProblem& problem);
}
namespace avx512 {
void rotate(const RotateProblem& problem);
}
namespace cuda {  // in libkvpack_cuda
void rotate(const RotateProblem& problem);
}

}  // namespace kvpack
