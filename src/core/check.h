// Argument checks whose messages show both values, and the text helpers for them.
#pragma once

#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <string>
#include <string_view>
#include <type_traits>

#include "kvpack/error.h"
#include "kvpack/tensor.h"

namespace kvpack {

/// Appends one value as text: whole numbers in full, floating point with six significant digits, addresses. No streams: a process
/// may hold a second copy of the C++ library (a plug-in that links it statically), whose locales streams would touch.
template <typename Part>
void append_text(std::string& target, const Part& part) {
  [[maybe_unused]] char digits[32];
  if constexpr (std::is_floating_point_v<Part>) {
    const int length = std::snprintf(digits, sizeof(digits), "%g", static_cast<double>(part));
    target.append(digits, static_cast<std::size_t>(length));
  } else if constexpr (std::is_same_v<Part, void*> || std::is_same_v<Part, const void*>) {
    const int length = std::snprintf(digits, sizeof(digits), "%p", part);
    target.append(digits, static_cast<std::size_t>(length));
  } else if constexpr (std::is_integral_v<Part> && !std::is_same_v<Part, bool>) {
    target += std::to_string(part);
  } else {
    target += std::string_view(part);
  }
}

/// Joins its arguments into one text.
template <typename... Parts>
std::string text(const Parts&... parts) {
  std::string result;
  (append_text(result, parts), ...);
  return result;
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

/// "cpu" or "cuda:0".
std::string device_text(const Device& device);

/// A view's name in messages: "q", or "keys.bitmaps" for a part of something.
struct ViewName {
  const char* name;
  const char* part = nullptr;
};

/// Checks that a view has exactly this type, shape and device, lies without gaps, and has memory if it has elements.
void require_exact(const TensorView& view, ViewName name, DType dtype, std::initializer_list<std::int64_t> shape,
                   const Device& device);

/// Memory of a workspace [bytes/8] int64 on that device; null where no bytes are needed.
void* checked_workspace(const TensorView& workspace, std::int64_t bytes, const Device& device);

/// True for the types that hold floating point.
bool is_floating(DType dtype) noexcept;

/// True for a view that stands for "none": rank 0 without memory, or no elements.
bool is_empty(const TensorView& view) noexcept;

/// True when two views that are not empty share a byte between their first and last ones.
bool may_overlap(const TensorView& a, const TensorView& b) noexcept;

/// True when both views cover the same elements of the same memory in the same order.
bool is_same_view(const TensorView& a, const TensorView& b);

}  // namespace kvpack
