// Comparing tensors on the GPU: float64 sums of blocks, added up on the host in the order of the blocks.
#include <cuda_runtime.h>

#include <algorithm>
#include <vector>

#include "core/with_type.h"
#include "cuda/buffer.h"
#include "cuda/check.h"
#include "cuda/device.h"
#include "cuda/element.cuh"
#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "evaluate/implementations.h"

namespace kvpack::cuda {

namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMostBlocks = 1024;  // their sums are 24 KiB: what the host adds up

/// TensorError without default values, which shared memory cannot have.
struct PartialError {
  double squared_error;
  double squared_norm;
  double largest;
};

__device__ double exact_value(double element) { return element; }
template <typename T>
__device__ double exact_value(T element) {
  return static_cast<double>(element_value(element));
}

/// Sums of squares and the largest difference, one PartialError a block.
///
/// Launch  any number of blocks of kThreads
/// Work    block b takes tokens b, b + blocks, ..., its threads channels side by side; one reduction at the end
/// Reads   x, y [tokens, channels] once
/// Writes  partials [blocks]; the same grid gives the same bits in every run
/// Needs   nothing
template <typename T>
__global__ void __launch_bounds__(kThreads)
    compare_tensors_kernel(CompareTensorsProblem problem, PartialError* partials) {
  const T* x = static_cast<const T*>(problem.x);
  const T* y = static_cast<const T*>(problem.y);
  PartialError error{0.0, 0.0, 0.0};
  for (std::int64_t t = blockIdx.x; t < problem.tokens; t += gridDim.x) {
    for (std::int64_t c = threadIdx.x; c < problem.channels; c += kThreads) {
      const double exact = exact_value(x[t * problem.x_token_stride + c * problem.x_channel_stride]);
      const double difference = exact - exact_value(y[t * problem.y_token_stride + c * problem.y_channel_stride]);
      error.squared_error += difference * difference;
      error.squared_norm += exact * exact;
      error.largest = fabs(difference) > error.largest ? fabs(difference) : error.largest;
    }
  }
  error = block_reduce<kThreads>(error, [](PartialError a, PartialError b) -> PartialError {
    return {a.squared_error + b.squared_error, a.squared_norm + b.squared_norm,
            b.largest > a.largest ? b.largest : a.largest};
  });
  if (threadIdx.x == 0) partials[blockIdx.x] = error;
}

}  // namespace

/// Synchronises its stream: the sums come back by value.
TensorError compare_tensors(const CompareTensorsProblem& problem) {
  const DeviceGuard device(problem.x, "x");
  const auto stream = static_cast<cudaStream_t>(problem.stream);
  const std::int64_t blocks = std::min(kMostBlocks, problem.tokens);
  DeviceBuffer<PartialError> partials(blocks, stream);
  with_float_type(problem.dtype, [&]<typename T>() {
    compare_tensors_kernel<T><<<static_cast<int>(blocks), kThreads, 0, stream>>>(problem, partials.data());
  });
  check_cuda(cudaGetLastError(), "launch compare_tensors");
  std::vector<PartialError> sums(static_cast<std::size_t>(blocks));
  partials.read_to(sums.data());
  TensorError total;
  for (const PartialError& sum : sums) {
    total.squared_error += sum.squared_error;
    total.squared_norm += sum.squared_norm;
    total.largest = std::max(total.largest, sum.largest);
  }
  return total;
}

}  // namespace kvpack::cuda
