// Comparing predictions on the GPU, a block per position, with the formula of evaluate/logits_cpu.h:
//   KL = (sum exp(a)*(a - b))/A - log A + log B,   a = reference - its maximum, A = sum exp(a), b and B of the logits
#include <cuda_runtime.h>

#include <cmath>
#include <limits>

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

using Counter = unsigned long long;  // the type that atomicMin knows

constexpr int kThreads = 256;

/// Largest logit of a row and its first place.
struct Top {
  float value;
  std::int64_t place;
};

struct Sums {
  double reference;  // sum exp(a)
  double logits;     // sum exp(b)
  double weighted;   // sum exp(a) * (a - b)
};

template <typename T>
__device__ Top find_top(const T* row, std::int64_t vocabulary) {
  Top top{-HUGE_VALF, threadIdx.x};
  for (std::int64_t v = threadIdx.x; v < vocabulary; v += kThreads) {
    const float value = element_value(row[v]);
    if (value > top.value) top = {value, v};
  }
  return block_reduce<kThreads>(top, [](Top a, Top b) {
    const bool second = b.value > a.value || (b.value == a.value && b.place < a.place);
    return second ? b : a;
  });
}

/// Cross-entropy, divergence and agreement of each position.
///
/// Launch  any number of blocks of kThreads
/// Work    block b takes positions b, b + blocks, ...: one sweep for both maxima, one for all three sums. expf in float32
///         (2 units in the last place), sums in float64: within 1e-5 of float64 altogether
/// Reads   reference, logits [positions, vocabulary] twice, the second time mostly from the L2 cache; targets [positions]
/// Writes  nll, kl, top1 [positions]
/// Needs   targets inside the vocabulary. Equal rows take the same path through the same lanes: their kl is exactly 0
template <typename T>
__global__ void __launch_bounds__(kThreads) compare_logits_kernel(CompareLogitsProblem problem) {
  for (std::int64_t i = blockIdx.x; i < problem.positions; i += gridDim.x) {
    const T* reference = static_cast<const T*>(problem.reference) + i * problem.reference_stride;
    const T* logits = static_cast<const T*>(problem.logits) + i * problem.logits_stride;
    const Top reference_top = find_top(reference, problem.vocabulary);
    const Top top = find_top(logits, problem.vocabulary);
    Sums sums{0.0, 0.0, 0.0};
    for (std::int64_t v = threadIdx.x; v < problem.vocabulary; v += kThreads) {
      const float a = element_value(reference[v]) - reference_top.value;
      const float b = element_value(logits[v]) - top.value;
      const float p = expf(a);
      sums.reference += static_cast<double>(p);
      sums.logits += static_cast<double>(expf(b));
      // p is 0 for a logit of -infinity, whose a - b would be NaN.
      if (p > 0.0f) sums.weighted += static_cast<double>(p) * static_cast<double>(a - b);
    }
    sums = block_reduce<kThreads>(sums, [](Sums a, Sums b) -> Sums {
      return {a.reference + b.reference, a.logits + b.logits, a.weighted + b.weighted};
    });
    if (threadIdx.x != 0) continue;
    const double log_sum = log(sums.logits);
    const double target =
        static_cast<double>(element_value(logits[problem.targets[i]])) - static_cast<double>(top.value);
    problem.nll[i] = log_sum - target;
    problem.kl[i] = sums.weighted / sums.reference - log(sums.reference) + log_sum;
    problem.top1[i] = reference_top.place == top.place ? 1.0 : 0.0;
  }
}

/// First position whose target is outside the vocabulary.
///
/// Launch  any number of blocks of kThreads
/// Work    a thread per position
/// Reads   targets [positions]
/// Writes  merges into *first_bad, which starts as all ones
/// Needs   nothing
__global__ void __launch_bounds__(kThreads) find_bad_target_kernel(CompareLogitsProblem problem, Counter* first_bad) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; i < problem.positions; i += step) {
    const std::int64_t target = problem.targets[i];
    if (target < 0 || target >= problem.vocabulary) atomicMin(first_bad, static_cast<Counter>(i));
  }
}

/// Throws InvalidArgument with the first target outside the vocabulary.
void require_targets(const CompareLogitsProblem& problem, cudaStream_t stream) {
  DeviceBuffer<Counter> first_bad(1, stream);
  first_bad.fill_bytes(0xff);
  const int blocks = grid_blocks(divide_up(problem.positions, kThreads));
  find_bad_target_kernel<<<blocks, kThreads, 0, stream>>>(problem, first_bad.data());
  check_cuda(cudaGetLastError(), "launch the check of targets");
  Counter position = 0;
  first_bad.read_to(&position);
  if (position == ~Counter{0}) return;
  std::int64_t target = 0;
  check_cuda(cudaMemcpy(&target, problem.targets + position, sizeof(target), cudaMemcpyDeviceToHost), "copy a target");
  throw InvalidArgument(
      text("target ", position, " is ", target, "; the vocabulary has ", problem.vocabulary, " tokens"));
}

}  // namespace

/// Synchronises its stream once, to look at the targets before anything is written; the comparison itself is left running.
void compare_logits(const CompareLogitsProblem& problem) {
  const DeviceGuard device(problem.reference, "reference");
  const auto stream = static_cast<cudaStream_t>(problem.stream);
  require_targets(problem, stream);
  with_float_type(problem.dtype, [&]<typename T>() {
    compare_logits_kernel<T><<<grid_blocks(problem.positions), kThreads, 0, stream>>>(problem);
  });
  check_cuda(cudaGetLastError(), "launch compare_logits");
}

}  // namespace kvpack::cuda
