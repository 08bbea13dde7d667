// Reference of comparing tensors: float64 sums. It is also what runs on the CPU: a study compares each layer once, which
// is a few milliseconds beside the model's seconds.
#include <algorithm>
#include <cmath>

#include "core/half.h"
#include "core/with_type.h"
#include "evaluate/implementations.h"

namespace kvpack::reference {

namespace {

double to_double(double value) { return value; }
template <typename T>
double to_double(T value) {
  return static_cast<double>(to_float(value));
}

template <typename T>
TensorError compare_as(const CompareTensorsProblem& problem) {
  TensorError error;
  for (std::int64_t t = 0; t < problem.tokens; ++t) {
    const T* x = static_cast<const T*>(problem.x) + t * problem.x_token_stride;
    const T* y = static_cast<const T*>(problem.y) + t * problem.y_token_stride;
    for (std::int64_t c = 0; c < problem.channels; ++c) {
      const double exact = to_double(x[c * problem.x_channel_stride]);
      const double difference = exact - to_double(y[c * problem.y_channel_stride]);
      error.squared_error += difference * difference;
      error.squared_norm += exact * exact;
      error.largest = std::max(error.largest, std::fabs(difference));
    }
  }
  return error;
}

}  // namespace

TensorError compare_tensors(const CompareTensorsProblem& problem) {
  return with_float_type(problem.dtype, [&]<typename T>() { return compare_as<T>(problem); });
}

}  // namespace kvpack::reference
