// Measures of what compression costs: against tensors, and against a model's predictions.
#pragma once

#include <cstdint>

#include "kvpack/tensor.h"

namespace [[gnu::visibility("default")]] kvpack {

/// Sums of one comparison of tensors; relative error is squared_error / squared_norm.
struct TensorError {
  double squared_error = 0.0;  ///< sum of (x - y)^2
  double squared_norm = 0.0;   ///< sum of x^2
  double largest = 0.0;        ///< largest |x - y|
};

/// Compares y with the exact x, in float64.
///   Shapes    x, y [tokens, channels] or [batch, tokens, channels], same shape, type and device
///   Throws    InvalidArgument with both values; Unsupported with what exists
TensorError compare_tensors(const TensorView& x, const TensorView& y, void* stream = nullptr);

/// Compares next-token predictions with those of the uncompressed model, position by position.
///   nll[i]  = -log softmax(logits[i])[targets[i]]
///   kl[i]   = sum_v softmax(reference[i])[v] * (log softmax(reference[i])[v] - log softmax(logits[i])[v])
///   top1[i] = 1 where both rows have the same (first) largest logit, else 0
///   Shapes    reference, logits [positions, vocabulary] f16, bf16 or f32; targets [positions] i64;
///             nll, kl, top1 [positions] f64, contiguous
///   Accuracy  nll and kl within 1e-5 + 1e-6 * value of float64; identical rows have kl 0 exactly
///   Requires  0 <= targets[i] < vocabulary; vocabulary at least 1; rows contiguous
///   Throws    InvalidArgument with both values; Unsupported with what exists
///   Source    docs/numerics.md section 5
void compare_logits(const TensorView& reference, const TensorView& logits, const TensorView& targets,
                    const TensorView& nll, const TensorView& kl, const TensorView& top1, void* stream = nullptr);

}  // namespace kvpack
