// Reference of comparing predictions: softmax, cross-entropy and KL in float64, from the definitions.
#include <cmath>
#include <vector>

#include "core/half.h"
#include "core/with_type.h"
#include "evaluate/implementations.h"

namespace kvpack::reference {

namespace {

/// log softmax of one row; `top` is the place of the first largest logit.
template <typename T>
std::vector<double> log_softmax(const T* row, std::int64_t vocabulary, std::int64_t& top) {
  std::vector<double> result(static_cast<std::size_t>(vocabulary));
  top = 0;
  for (std::int64_t v = 0; v < vocabulary; ++v) {
    result[static_cast<std::size_t>(v)] = static_cast<double>(to_float(row[v]));
    if (result[static_cast<std::size_t>(v)] > result[static_cast<std::size_t>(top)]) top = v;
  }
  const double largest = result[static_cast<std::size_t>(top)];
  double sum = 0.0;
  for (const double logit : result) sum += std::exp(logit - largest);
  const double log_sum = largest + std::log(sum);
  for (double& logit : result) logit -= log_sum;
  return result;
}

template <typename T>
void compare_as(const CompareLogitsProblem& problem) {
  for (std::int64_t i = 0; i < problem.positions; ++i) {
    std::int64_t reference_top = 0;
    std::int64_t top = 0;
    const auto p = log_softmax(static_cast<const T*>(problem.reference) + i * problem.reference_stride,
                               problem.vocabulary, reference_top);
    const auto q =
        log_softmax(static_cast<const T*>(problem.logits) + i * problem.logits_stride, problem.vocabulary, top);
    double kl = 0.0;
    for (std::size_t v = 0; v < p.size(); ++v) {
      const double probability = std::exp(p[v]);
      if (probability > 0.0) kl += probability * (p[v] - q[v]);  // a logit of -infinity on both sides adds nothing
    }
    problem.nll[i] = -q[static_cast<std::size_t>(problem.targets[i])];
    problem.kl[i] = kl;
    problem.top1[i] = reference_top == top ? 1.0 : 0.0;
  }
}

}  // namespace

void compare_logits(const CompareLogitsProblem& problem) {
  with_float_type(problem.dtype, [&]<typename T>() { compare_as<T>(problem); });
}

}  // namespace kvpack::reference
