// Comparing predictions in the SIMD vocabulary, two sweeps a position. Compiled once per instruction set by
// logits_cpu.cpp.
//
// With a = reference - its maximum, b = logits - their maximum, A = sum exp(a), B = sum exp(b):
//   KL = sum exp(a)/A * ((a - log A) - (b - log B)) = (sum exp(a)*(a - b))/A - log A + log B
// so one sweep finds both maxima and the next all three sums.

#include "isa/exp.h"

namespace kvpack::KVPACK_ISA {
namespace {

/// Largest logit of a row and its first place.
struct Top {
  float value;
  std::int64_t place;
};

template <typename T>
inline Top find_top(const T* row, std::int64_t vocabulary) {
  F32 largest = set1(-std::numeric_limits<float>::infinity());
  std::int64_t v = 0;
  for (; v + kLanes <= vocabulary; v += kLanes) largest = max(load(row + v), largest);
  Top top{reduce_max(largest), 0};
  for (; v < vocabulary; ++v) top.value = to_float(row[v]) > top.value ? to_float(row[v]) : top.value;
  const F32 wanted = set1(top.value);
  for (v = 0; v + kLanes <= vocabulary; v += kLanes) {
    const std::uint32_t lanes = bits(eq(load(row + v), wanted));
    if (lanes != 0) {
      top.place = v + std::countr_zero(lanes);
      return top;
    }
  }
  for (; v < vocabulary; ++v) {
    if (to_float(row[v]) == top.value) {
      top.place = v;
      return top;
    }
  }
  return top;
}

struct Sums {
  double reference = 0.0;  // sum exp(a)
  double logits = 0.0;     // sum exp(b)
  double weighted = 0.0;   // sum exp(a) * (a - b)
};

template <typename T>
inline Sums add_up(const T* reference, const T* logits, std::int64_t vocabulary, float reference_top, float top) {
  // Lanes collect at most this many registers before they join the float64 sums, so that rounding stays below 1e-6.
  constexpr std::int64_t kRun = 64 * kLanes;
  Sums sums;
  std::int64_t v = 0;
  for (std::int64_t first = 0; first + kLanes <= vocabulary; first += kRun) {
    F32 reference_sum = set1(0.0f);
    F32 sum = set1(0.0f);
    F32 weighted = set1(0.0f);
    const std::int64_t end = first + kRun < vocabulary ? first + kRun : vocabulary;
    for (v = first; v + kLanes <= end; v += kLanes) {
      const F32 a = sub(load(reference + v), set1(reference_top));
      const F32 b = sub(load(logits + v), set1(top));
      const F32 p = exp_nonpositive(a);
      reference_sum = add(reference_sum, p);
      sum = add(sum, exp_nonpositive(b));
      // p is 0 for a logit of -infinity, whose a - b would be NaN.
      weighted = add(weighted, blend(gt(p, set1(0.0f)), mul(p, sub(a, b)), set1(0.0f)));
    }
    sums.reference += static_cast<double>(reduce_add(reference_sum));
    sums.logits += static_cast<double>(reduce_add(sum));
    sums.weighted += static_cast<double>(reduce_add(weighted));
  }
  for (; v < vocabulary; ++v) {
    const double a = static_cast<double>(to_float(reference[v]) - reference_top);
    const double b = static_cast<double>(to_float(logits[v]) - top);
    const double p = std::exp(a);
    sums.reference += p;
    sums.logits += std::exp(b);
    if (p > 0.0) sums.weighted += p * (a - b);
  }
  return sums;
}

template <typename T>
void compare_position(const CompareLogitsProblem& problem, std::int64_t i) {
  const T* reference = static_cast<const T*>(problem.reference) + i * problem.reference_stride;
  const T* logits = static_cast<const T*>(problem.logits) + i * problem.logits_stride;
  const Top reference_top = find_top(reference, problem.vocabulary);
  const Top top = find_top(logits, problem.vocabulary);
  const Sums sums = add_up(reference, logits, problem.vocabulary, reference_top.value, top.value);
  const double log_sum = std::log(sums.logits);
  const double target = static_cast<double>(to_float(logits[problem.targets[i]])) - static_cast<double>(top.value);
  problem.nll[i] = log_sum - target;
  problem.kl[i] = sums.weighted / sums.reference - std::log(sums.reference) + log_sum;
  problem.top1[i] = reference_top.place == top.place ? 1.0 : 0.0;
}

}  // namespace

void compare_logits(const CompareLogitsProblem& problem) {
  constexpr std::int64_t kBlockPositions = 8;
  auto compare_block = [&](std::int64_t first, std::int64_t end) {
    with_float_type(problem.dtype, [&]<typename T>() {
      for (std::int64_t i = first; i < end; ++i) compare_position<T>(problem, i);
    });
  };
  parallel_for_blocks(0, problem.positions, kBlockPositions, compare_block);
}

}  // namespace kvpack::KVPACK_ISA
