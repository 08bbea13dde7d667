// Stage 1 of the pipeline: choose which entries survive.
#pragma once

#include <cstdint>

#include "kvpack/tensor.h"

namespace [[gnu::visibility("default")]] kvpack {

/// Which entries magnitude pruning keeps. The numbers are part of the C ABI.
enum class PruneRule : std::int32_t {
  kExact = 0,     ///< exactly k = D - floor(s*D) largest |x|; ties go to the lower channel
  kKthValue = 1,  ///< compat: |x| >= the max(1, floor(s*D))-th smallest |x|, so ties survive together
};

/// Parameters of magnitude pruning.
struct PruneOptions {
  double sparsity = 0.5;  ///< share s of the entries of a row to drop, 0 <= s < 1
  PruneRule rule = PruneRule::kExact;
  std::int64_t head_dim = 0;              ///< channels of a head; 0: the whole row is one head
  std::int64_t protected_tokens = 0;      ///< this many first tokens of every sequence come back unchanged
  const float* channel_scores = nullptr;  ///< [channels] f32, multiplies |x| before ranking; may be null
};

/// What pruning did, for honest byte counts.
struct PruneCounts {
  std::int64_t rows = 0;  ///< rows of one (token, head) that were pruned
  std::int64_t kept = 0;  ///< entries that survived in these rows
};

/// Entries that rule kExact keeps in a row of `head_dim`: D - floor(s*D), with 1e-6 added before the floor so that
/// 0.7 * 10 is 7.
[[nodiscard]] std::int64_t kept_per_row(double sparsity, std::int64_t head_dim);

/// Sets all but the largest-magnitude entries of every row of one (token, head) to +0.
///   Shapes    x, out [tokens, channels] or [batch, tokens, channels], same shape, type and device
///   Types     float16, bfloat16, float32, float64; any non-negative strides
///   Order     -0 ranks as 0; NaN ranks above everything; survivors keep their bits
///   Requires  head_dim divides channels; out is x itself or does not overlap it
///   Throws    InvalidArgument with both values; Unsupported with what exists
///   Source    docs/numerics.md section 1; Joo et al. 2025, "Mustafar"
PruneCounts prune_magnitude(const TensorView& x, const TensorView& out, const PruneOptions& options,
                            void* stream = nullptr);

}  // namespace kvpack
