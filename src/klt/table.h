// A table of transform-coded rows as the operations use it: checked, and with the layout that its levels give.
#pragma once

#include "klt/implementations.h"

namespace kvpack::klt {

/// The layout of rows whose coefficients have these levels. Throws InvalidArgument for levels that no row can have.
klt_rows::RowLayout layout_of(const std::int32_t* levels, std::int64_t coefficients, std::int64_t row_alignment);

/// Plain pointers after all checks that need no look at every number: shapes, types, devices, and on the CPU flags and the
/// order of centroids.
KltData checked_table(const KltTable& table, const Device& device);

}  // namespace kvpack::klt
