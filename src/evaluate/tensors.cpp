// Entry of comparing tensors: checks and dispatch.
#include <algorithm>

#include "core/check.h"
#include "core/sequences.h"
#include "dispatch/registry.h"
#include "evaluate/implementations.h"

namespace kvpack {

TensorError compare_tensors(const TensorView& x, const TensorView& y, void* stream) {
  require_same_sequences(x, "x", y, "y");
  const auto function = select<CompareTensorsFunction>(Operation::kCompareTensors, x.device.kind);
  TensorError total;
  if (x.num_elements() == 0) return total;
  for (std::int64_t i = 0; i < num_sequences(x); ++i) {
    const TensorView one = sequence(x, i);
    const TensorView other = sequence(y, i);
    CompareTensorsProblem problem;
    problem.x = one.data;
    problem.y = other.data;
    problem.dtype = one.dtype;
    problem.tokens = one.shape[0];
    problem.channels = one.shape[1];
    problem.x_token_stride = one.strides[0];
    problem.x_channel_stride = one.strides[1];
    problem.y_token_stride = other.strides[0];
    problem.y_channel_stride = other.strides[1];
    problem.stream = stream;
    const TensorError error = function(problem);
    total.squared_error += error.squared_error;
    total.squared_norm += error.squared_norm;
    total.largest = std::max(total.largest, error.largest);
  }
  return total;
}

}  // namespace kvpack
