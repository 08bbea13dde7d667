// Argument checks whose messages show both values, and the text helpers for them.
#pragma once

#include <sstream>
#include <string>

#include "kvpack/error.h"
#include "kvpack/tensor.h"

namespace kvpack {

/// Joins its arguments into one text.
template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

/// Throws InvalidArgument with the joined text when `condition` does not hold.
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) throw InvalidArgument(text(parts...));
}

/// "[2048, 192]" of a view.
std::string shape_text(const TensorView& view);

/// Checks that two views hold sequences of the same shape (rank 2 or 3), floating type and device.
void require_same_sequences(const TensorView& x, const char* x_name, const TensorView& y, const char* y_name);

/// Checks that x and out can be the input and output of an elementwise operation over sequences:
/// same shape of rank 2 or 3, same floating type, same device; out is x itself or does not overlap it.
void require_sequence_pair(const TensorView& x, const TensorView& out);

/// True when both views cover the same elements of the same memory in the same order.
bool is_same_view(const TensorView& a, const TensorView& b);

}  // namespace kvpack
