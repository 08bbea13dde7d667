// Checks that the entries of FlatQuant's operations share: rows, matrices of a transform, rows of codes.
#pragma once

#include "core/check.h"
#include "flatquant/implementations.h"

namespace kvpack {

/// True for a view that stands for something, even without elements.
inline bool is_given(const TensorView& view) noexcept { return view.rank != 0 || view.data != nullptr; }

/// Throws unless a view is [tokens, n] of a 16- or 32-bit floating type with n >= 1 and adjacent channels.
void require_token_rows(const TensorView& view, const char* name);

/// The matrices of a transform of rows of n elements, of that type, on that device.
KronMatrices checked_matrices(const KronTransform& transform, std::int64_t n, DType dtype, const Device& device);

/// Rows as a whole: codes contiguous, scales and zeros [rows, 1]. `name` is what the caller calls them.
Int4Data checked_rows(const Int4Rows& rows, const char* name, const Device& device);

/// Throws when `out` shares memory with a part of rows.
void require_apart(const TensorView& out, const char* out_name, const Int4Rows& rows, const char* name);

/// Throws when `out` shares memory with a matrix of the transform.
void require_apart(const TensorView& out, const char* out_name, const KronTransform& transform);

}  // namespace kvpack
