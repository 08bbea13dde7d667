// Tensor views and the checks that every operation on them shares.
#include "kvpack/tensor.h"

#include <algorithm>

#include "core/check.h"
#include "core/divide_up.h"

namespace kvpack {

std::int64_t TensorView::num_elements() const noexcept {
  std::int64_t count = 1;
  for (int i = 0; i < rank; ++i) count *= shape[static_cast<std::size_t>(i)];
  return count;
}

bool TensorView::is_contiguous() const noexcept {
  std::int64_t expected = 1;
  for (int i = rank - 1; i >= 0; --i) {
    const auto axis = static_cast<std::size_t>(i);
    if (shape[axis] != 1 && strides[axis] != expected) return false;
    expected *= shape[axis];
  }
  return true;
}

std::int64_t element_bytes(DType dtype) noexcept {
  switch (dtype) {
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kFloat64:
    case DType::kInt64:
      return 8;
    case DType::kInt8:
    case DType::kUInt8:
      return 1;
  }
  return 0;
}

bool is_floating(DType dtype) noexcept {
  return dtype == DType::kFloat16 || dtype == DType::kBFloat16 || dtype == DType::kFloat32 || dtype == DType::kFloat64;
}

const char* name_of(DType dtype) noexcept {
  switch (dtype) {
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat32:
      return "float32";
    case DType::kFloat64:
      return "float64";
    case DType::kInt64:
      return "int64";
    case DType::kInt32:
      return "int32";
    case DType::kInt8:
      return "int8";
    case DType::kUInt8:
      return "uint8";
  }
  return "unknown";
}

std::string text_of(const std::array<std::int64_t, kMaxRank>& extents, std::int32_t rank) {
  std::string result = "[";
  for (std::int32_t i = 0; i < rank; ++i) {
    if (i > 0) result += ", ";
    result += std::to_string(extents[static_cast<std::size_t>(i)]);
  }
  return result + "]";
}

TensorView make_view(void* data, DType dtype, std::initializer_list<std::int64_t> shape) {
  require(shape.size() <= kMaxRank, "a view has at most ", kMaxRank, " dimensions, not ", shape.size());
  TensorView view;
  view.data = data;
  view.dtype = dtype;
  view.rank = static_cast<std::int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), view.shape.begin());
  std::int64_t stride = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    const auto axis = static_cast<std::size_t>(i);
    require(view.shape[axis] >= 0, "extent ", i, " of a view is ", view.shape[axis], "; it must be at least 0");
    view.strides[axis] = stride;
    stride *= view.shape[axis];
  }
  return view;
}

std::string shape_text(const TensorView& view) { return text_of(view.shape, view.rank); }

std::string device_text(const Device& device) {
  return device.kind == DeviceKind::kCpu ? "cpu" : text("cuda:", device.index);
}

namespace {

/// Checks one view on its own. `data` may be null only when there are no elements.
void require_sequence(const TensorView& view, const char* name) {
  require(view.rank == 2 || view.rank == 3, name, " has ", view.rank, " dimensions ", shape_text(view),
          "; expected [tokens, channels] or [batch, tokens, channels]");
  require(element_bytes(view.dtype) > 0, name, " has the unknown type number ", static_cast<int>(view.dtype));
  require(is_floating(view.dtype), name, " has type ", name_of(view.dtype),
          "; expected float16, bfloat16, float32 or float64");
  for (int i = 0; i < view.rank; ++i) {
    const auto axis = static_cast<std::size_t>(i);
    require(view.shape[axis] >= 0, name, " has the shape ", shape_text(view), " with a negative extent");
    require(view.strides[axis] >= 0, name, " has the strides ", text_of(view.strides, view.rank),
            "; negative strides are not supported");
  }
  require(view.data != nullptr || view.num_elements() == 0, name, " of shape ", shape_text(view), " has no memory");
}

/// First and one-past-last byte that a view touches.
std::pair<const char*, const char*> byte_range(const TensorView& view) {
  const auto* first = static_cast<const char*>(view.data);
  std::int64_t last = 0;
  for (int i = 0; i < view.rank; ++i) {
    const auto axis = static_cast<std::size_t>(i);
    last += (view.shape[axis] - 1) * view.strides[axis];
  }
  return {first, first + (last + 1) * element_bytes(view.dtype)};
}

std::string text_of(ViewName name) { return name.part == nullptr ? name.name : text(name.name, ".", name.part); }

}  // namespace

void require_exact(const TensorView& view, ViewName name, DType dtype, std::initializer_list<std::int64_t> shape,
                   const Device& device) {
  // Texts are made only for a failure: this runs a dozen times in every call on a cache.
  const bool fits = view.rank == static_cast<std::int32_t>(shape.size()) &&
                    std::equal(shape.begin(), shape.end(), view.shape.begin());
  if (!fits) {
    std::array<std::int64_t, kMaxRank> expected{};
    std::copy(shape.begin(), shape.end(), expected.begin());
    throw InvalidArgument(text(text_of(name), " has shape ", shape_text(view), "; expected ",
                               text_of(expected, static_cast<std::int32_t>(shape.size()))));
  }
  if (view.dtype != dtype) {
    throw InvalidArgument(text(text_of(name), " is ", name_of(view.dtype), "; expected ", name_of(dtype)));
  }
  if (view.device != device) {
    throw InvalidArgument(text(text_of(name), " is on ", device_text(view.device), "; expected ", device_text(device)));
  }
  const std::int64_t elements = view.num_elements();
  if (elements == 0) return;
  if (!view.is_contiguous()) {
    throw InvalidArgument(text(text_of(name), " of shape ", shape_text(view), " has the strides ",
                               text_of(view.strides, view.rank), "; it must be contiguous"));
  }
  if (view.data == nullptr)
    throw InvalidArgument(text(text_of(name), " of shape ", shape_text(view), " has no memory"));
}

void* checked_workspace(const TensorView& workspace, std::int64_t bytes, const Device& device) {
  if (bytes == 0) return nullptr;
  constexpr std::int64_t kWordBytes = 8;
  const std::int64_t words = divide_up(bytes, kWordBytes);
  const bool fits = workspace.rank == 1 && workspace.dtype == DType::kInt64 && workspace.shape[0] >= words;
  if (!fits) {
    throw InvalidArgument(text("workspace is ", name_of(workspace.dtype), " of shape ", shape_text(workspace),
                               "; expected int64 of at least [", words, "]"));
  }
  require_exact(workspace, {"workspace"}, DType::kInt64, {workspace.shape[0]}, device);
  return workspace.data;
}

bool is_empty(const TensorView& view) noexcept {
  return view.num_elements() == 0 || (view.rank == 0 && view.data == nullptr);
}

bool may_overlap(const TensorView& a, const TensorView& b) noexcept {
  if (is_empty(a) || is_empty(b)) return false;
  const auto [a_first, a_end] = byte_range(a);
  const auto [b_first, b_end] = byte_range(b);
  return a_first < b_end && b_first < a_end;
}

bool is_same_view(const TensorView& a, const TensorView& b) {
  if (a.data != b.data) return false;
  for (int i = 0; i < a.rank; ++i) {
    const auto axis = static_cast<std::size_t>(i);
    if (a.shape[axis] > 1 && a.strides[axis] != b.strides[axis]) return false;
  }
  return true;
}

void require_same_sequences(const TensorView& x, const char* x_name, const TensorView& y, const char* y_name) {
  require_sequence(x, x_name);
  require_sequence(y, y_name);
  require(x.rank == y.rank && std::equal(x.shape.begin(), x.shape.begin() + x.rank, y.shape.begin()), x_name,
          " has shape ", shape_text(x), " but ", y_name, " has ", shape_text(y));
  require(x.dtype == y.dtype, x_name, " is ", name_of(x.dtype), " but ", y_name, " is ", name_of(y.dtype));
  require(x.device == y.device, x_name, " is on ", device_text(x.device), " but ", y_name, " is on ",
          device_text(y.device));
}

void require_sequence_pair(const TensorView& x, const TensorView& out) {
  require_same_sequences(x, "x", out, "out");
  if (x.num_elements() == 0) return;
  for (int i = 0; i < out.rank; ++i) {
    const auto axis = static_cast<std::size_t>(i);
    require(out.shape[axis] == 1 || out.strides[axis] > 0, "out has the strides ", text_of(out.strides, out.rank),
            "; several of its elements would share memory");
  }
  if (is_same_view(x, out)) return;
  const auto [x_first, x_end] = byte_range(x);
  const auto [out_first, out_end] = byte_range(out);
  require(x_end <= out_first || out_end <= x_first,
          "x and out overlap in memory; pass the same view twice to work in place, or separate memory");
}

}  // namespace kvpack
