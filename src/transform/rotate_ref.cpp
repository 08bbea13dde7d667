// Reference of rotation: one output at a time.
#include <cmath>
#include <vector>

#include "core/half.h"
#include "core/with_type.h"
#include "transform/implementations.h"

namespace kvpack::reference {

void rotate(const RotateProblem& problem) {
  const std::int64_t dim = problem.head_dim;
  with_float_type(problem.dtype, [&]<typename T>() {
    std::vector<float> head(static_cast<std::size_t>(dim));
    for (std::int64_t t = 0; t < problem.tokens; ++t) {
      for (std::int64_t first = 0; first < problem.channels; first += dim) {
        const T* x = static_cast<const T*>(problem.x) + t * problem.x_token_stride + first;
        T* out = static_cast<T*>(problem.out) + t * problem.out_token_stride + first;
        for (std::int64_t i = 0; i < dim; ++i) head[static_cast<std::size_t>(i)] = to_float(x[i]);
        for (std::int64_t j = 0; j < dim; ++j) {
          float sum = 0.0f;
          for (std::int64_t i = 0; i < dim; ++i) {
            sum = std::fma(head[static_cast<std::size_t>(i)], problem.rotation[i * dim + j], sum);
          }
          from_float(sum, out[j]);
        }
      }
    }
  });
}

}  // namespace kvpack::reference
