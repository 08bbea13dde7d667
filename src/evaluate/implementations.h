// What every implementation of the comparisons receives, and the list of them.
#pragma once

#include <cstdint>

#include "kvpack/evaluate.h"

namespace kvpack {

/// One pair of sequences [tokens, channels] after all checks.
struct CompareTensorsProblem {
  const void* x = nullptr;
  const void* y = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t tokens = 0;
  std::int64_t channels = 0;
  std::int64_t x_token_stride = 0;  // elements
  std::int64_t x_channel_stride = 1;
  std::int64_t y_token_stride = 0;
  std::int64_t y_channel_stride = 1;
  void* stream = nullptr;
};

using CompareTensorsFunction = TensorError (*)(const CompareTensorsProblem&);

/// Predictions after all checks; a target outside the vocabulary is found by the implementation.
struct CompareLogitsProblem {
  const void* reference = nullptr;  // [positions, vocabulary]
  const void* logits = nullptr;     // [positions, vocabulary]
  const std::int64_t* targets = nullptr;
  double* nll = nullptr;
  double* kl = nullptr;
  double* top1 = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t positions = 0;
  std::int64_t vocabulary = 0;
  std::int64_t reference_stride = 0;  // elements from position to position
  std::int64_t logits_stride = 0;
  void* stream = nullptr;
};

using CompareLogitsFunction = void (*)(const CompareLogitsProblem&);

namespace reference {
TensorError compare_tensors(const CompareTensorsProblem& problem);
void compare_logits(const CompareLogitsProblem& problem);
}  // namespace reference
namespace scalar {
void compare_logits(const CompareLogitsProblem& problem);
}
namespace avx2 {
void compare_logits(const CompareLogitsProblem& problem);
}
namespace avx512 {
void compare_logits(const CompareLogitsProblem& problem);
}
namespace cuda {  // in libkvpack_cuda
TensorError compare_tensors(const CompareTensorsProblem& problem);
void compare_logits(const CompareLogitsProblem& problem);
}  // namespace cuda

}  // namespace kvpack
