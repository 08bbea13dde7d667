// What every implementation of magnitude pruning receives, and the list of them.
#pragma once

#include <cstdint>

#include "kvpack/prune.h"

namespace kvpack {

/// One sequence after all checks. Trivially copyable; also handed to the CUDA library.
struct PruneProblem {
  const void* x = nullptr;  // [tokens, channels]
  void* out = nullptr;      // [tokens, channels], may be x
  DType dtype = DType::kFloat32;
  std::int64_t tokens = 0;
  std::int64_t channels = 0;
  std::int64_t head_dim = 0;          // divides channels
  std::int64_t x_token_stride = 0;    // elements
  std::int64_t x_channel_stride = 1;  // 1 on the CPU: the entry packs other layouts first
  std::int64_t out_token_stride = 0;
  std::int64_t out_channel_stride = 1;
  std::int64_t protected_tokens = 0;      // at most tokens
  std::int64_t rank_from_top = 0;         // the threshold is the rank_from_top-th largest magnitude, 1 .. head_dim
  PruneRule rule = PruneRule::kExact;     // kExact: ties at the threshold go to the lower channel; kKthValue: all stay
  const float* channel_scores = nullptr;  // [channels] or null
  void* stream = nullptr;
};

/// Prunes one sequence and returns the number of survivors outside protected tokens.
using PruneFunction = std::int64_t (*)(const PruneProblem&);

namespace reference {
std::int64_t prune_magnitude(const PruneProblem& problem);
}
namespace scalar {
std::int64_t prune_magnitude(const PruneProblem& problem);
}
namespace avx2 {
std::int64_t prune_magnitude(const PruneProblem& problem);
}
namespace avx512 {
std::int64_t prune_magnitude(const PruneProblem& problem);
}
namespace cuda {  // in libkvpack_cuda
std::int64_t prune_magnitude(const PruneProblem& problem);
}

}  // namespace kvpack
