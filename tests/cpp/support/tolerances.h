// Every tolerance of the tests; the reasons stand in docs/numerics.md.
#pragma once

namespace kvpack::test {

/// compare_logits: nll and kl against float64, absolute; a tenth of it more for each nat of the value.
inline constexpr double kLogitsTolerance = 1e-5;

}  // namespace kvpack::test
