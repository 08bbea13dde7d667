// What a call of simulate_quantized works out once before it goes through sequences: the codebook as a table, and the grids
// of calibrated thresholds. Also the checks of those options.
#pragma once

#include <vector>

#include "quantize/codebook.h"
#include "quantize/implementations.h"

namespace kvpack {

/// Throws InvalidArgument for options that no call may have, with both values.
void require_quantize_options(const QuantizeOptions& options);

/// The table of a codebook that require_quantize_options has passed.
CodebookTable make_codebook_table(const QuantizeOptions& options);

/// The largest float32 between two centroids whose float32 distance to the lower one is not the larger.
float boundary_between(float lower_centroid, float upper_centroid);

/// Grids of calibrated thresholds, [num_thresholds]; thresholds become inclusive ones, infinite where nothing is exact.
std::vector<VectorGrid> make_static_grids(const QuantizeOptions& options);

/// True where `compat` and protected tokens meet in channels of `tokens` tokens with statistics of their own: there the
/// published tool looks at the protected ones too.
bool needs_compat_grids(const QuantizeOptions& options, std::int64_t tokens);

}  // namespace kvpack
