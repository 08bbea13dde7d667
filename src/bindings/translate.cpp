// Structures of the C interface to views, and where its last error is kept.
#include "bindings/translate.h"

#include "core/check.h"

namespace kvpack::bindings {

std::string& last_error() {
  thread_local std::string text;
  return text;
}

TensorView view_of(const kvpack_tensor* tensor, const char* name) {
  require(tensor != nullptr, name, " is a null pointer");
  require(tensor->rank >= 0 && tensor->rank <= kMaxRank, name, " has ", tensor->rank, " dimensions; at most ", kMaxRank,
          " are supported");
  TensorView view;
  view.data = tensor->data;
  view.dtype = static_cast<DType>(tensor->dtype);
  view.device = {static_cast<DeviceKind>(tensor->device_kind), tensor->device_index};
  view.rank = tensor->rank;
  for (int i = 0; i < tensor->rank; ++i) {
    const auto axis = static_cast<std::size_t>(i);
    view.shape[axis] = tensor->shape[i];
    view.strides[axis] = tensor->strides[i];
  }
  return view;
}

}  // namespace kvpack::bindings
