// Every tolerance of the tests; the reasons stand in docs/numerics.md.
#pragma once

#include <algorithm>
#include <cmath>

#include "kvpack/tensor.h"

namespace kvpack::test {

/// compare_logits: nll and kl against float64, absolute; a tenth of it more for each nat of the value.
inline constexpr double kLogitsTolerance = 1e-5;

/// multiply_keys, multiply_values, attend_tile64: |out - float64| / |float64| by norm. Rounding the result to bfloat16 once
/// costs up to 2^-9, so next to nothing is left for anything else.
constexpr double attend_tolerance(DType dtype) { return dtype == DType::kFloat32 ? 1e-5 : 2e-3; }

/// lse of attend_tile64: the same, of max(1, |lse|).
inline double lse_tolerance(DType dtype, double lse) { return attend_tolerance(dtype) * std::max(1.0, std::fabs(lse)); }

/// kron_quantize: share of codes that may be off by one against float64, and the relative error of a scale. float32 accumulates
/// in another order; 16-bit types may round the value between the two products.
constexpr double kron_share_off(DType dtype) {
  return dtype == DType::kFloat32 ? 1e-4 : (dtype == DType::kFloat16 ? 1.5e-3 : 1e-2);
}
constexpr double kron_scale_tolerance(DType dtype) {
  return dtype == DType::kFloat32 ? 1e-5 : (dtype == DType::kFloat16 ? 1e-3 : 8e-3);
}

/// undo_transform: |out - float64| / |float64| by norm; one rounding between the products and one of the result.
constexpr double undo_transform_tolerance(DType dtype) {
  return dtype == DType::kFloat32 ? 1e-5 : (dtype == DType::kFloat16 ? 1e-3 : 4e-3);
}

}  // namespace kvpack::test
