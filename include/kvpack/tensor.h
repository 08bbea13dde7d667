// Tensor views: how memory of any owner (torch, numpy, C++) enters the library. Views own nothing.
#pragma once

#include <array>
#include <cstdint>
#include <string>

namespace [[gnu::visibility("default")]] kvpack {

/// Element types that views may carry. The numbers are part of the C ABI and never change.
enum class DType : std::int32_t {
  kFloat16 = 0,   ///< IEEE binary16
  kBFloat16 = 1,  ///< upper half of a binary32
  kFloat32 = 2,
  kFloat64 = 3,
  kInt64 = 4,
  kInt32 = 5,
  kInt8 = 6,
  kUInt8 = 7,
};

/// Where the memory of a view lives. The numbers are part of the C ABI and never change.
enum class DeviceKind : std::int32_t { kCpu = 0, kCuda = 1 };

/// One device; `index` counts GPUs and is 0 for the CPU.
struct Device {
  DeviceKind kind = DeviceKind::kCpu;
  std::int32_t index = 0;
  friend bool operator==(const Device&, const Device&) = default;
};

/// Most dimensions a view can have.
inline constexpr int kMaxRank = 4;

/// Pointer, type, shape, strides, device: everything an operation knows of a tensor.
///   Strides count elements, not bytes, may be 0 (broadcast) for inputs, and are never negative.
///   Trivially copyable; the memory must outlive the call it is passed to.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Device device{};
  std::int32_t rank = 0;
  std::array<std::int64_t, kMaxRank> shape{};
  std::array<std::int64_t, kMaxRank> strides{};

  /// Number of elements: the product of the shape; 1 for rank 0.
  [[nodiscard]] std::int64_t num_elements() const noexcept;
  /// True when elements lie in row-major order without gaps.
  [[nodiscard]] bool is_contiguous() const noexcept;
};

/// Bytes of one element.
[[nodiscard]] std::int64_t element_bytes(DType dtype) noexcept;

/// The field's name of a type: "float16", "bfloat16", ...
[[nodiscard]] const char* name_of(DType dtype) noexcept;

/// A shape or a list of strides as text, "[2048, 192]".
[[nodiscard]] std::string text_of(const std::array<std::int64_t, kMaxRank>& extents, std::int32_t rank);

/// Makes a contiguous row-major CPU view over `data` with the given shape.
///   Throws    InvalidArgument when there are more than kMaxRank extents or a negative one
[[nodiscard]] TensorView make_view(void* data, DType dtype, std::initializer_list<std::int64_t> shape);

}  // namespace kvpack
