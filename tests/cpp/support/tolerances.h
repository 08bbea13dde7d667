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

}  // namespace kvpack::test
