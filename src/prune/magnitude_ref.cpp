// Reference of magnitude pruning: which entries are kept. The rule in its plainest form; every other implementation is
// compared with this one.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "core/half.h"
#include "core/with_type.h"
#include "prune/implementations.h"

namespace kvpack::reference {

namespace {

/// |x| * score with NaN above everything: what entries are ranked by.
float magnitude(float value, float score) {
  const float result = std::fabs(value * score);
  return std::isnan(result) ? std::nanf("") : result;
}

/// Strict order of magnitudes in which NaN is larger than every number and equal to itself.
bool is_smaller(float a, float b) {
  if (std::isnan(a)) return false;
  return std::isnan(b) || a < b;
}

/// Marks the entries of one row that survive.
std::vector<bool> choose_survivors(const std::vector<float>& magnitudes, const PruneProblem& problem) {
  const auto rank = static_cast<std::size_t>(problem.rank_from_top);
  std::vector<bool> kept(magnitudes.size(), false);
  std::vector<std::size_t> order(magnitudes.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  // A stable sort from large to small leaves ties in channel order: the lower channel wins.
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return is_smaller(magnitudes[b], magnitudes[a]); });
  const float threshold = magnitudes[order[rank - 1]];
  for (std::size_t place = 0; place < order.size(); ++place) {
    const bool ties_stay = problem.rule == PruneRule::kKthValue && !is_smaller(magnitudes[order[place]], threshold);
    kept[order[place]] = place < rank || ties_stay;
  }
  return kept;
}

template <typename T>
std::int64_t prune_as(const PruneProblem& problem) {
  const auto* x = static_cast<const T*>(problem.x);
  auto* out = static_cast<T*>(problem.out);
  std::int64_t survivors = 0;
  std::vector<float> magnitudes(static_cast<std::size_t>(problem.head_dim));
  for (std::int64_t token = 0; token < problem.tokens; ++token) {
    const T* x_row = x + token * problem.x_token_stride;
    T* out_row = out + token * problem.out_token_stride;
    for (std::int64_t first = 0; first < problem.channels; first += problem.head_dim) {
      for (std::int64_t i = 0; i < problem.head_dim; ++i) {
        const float score = problem.channel_scores == nullptr ? 1.0f : problem.channel_scores[first + i];
        magnitudes[static_cast<std::size_t>(i)] = magnitude(to_float(x_row[first + i]), score);
      }
      const bool is_protected = token < problem.protected_tokens;
      const std::vector<bool> kept =
          is_protected ? std::vector<bool>(magnitudes.size(), true) : choose_survivors(magnitudes, problem);
      for (std::int64_t i = 0; i < problem.head_dim; ++i) {
        const bool survives = kept[static_cast<std::size_t>(i)];
        out_row[first + i] = survives ? x_row[first + i] : T{};
        survivors += survives && !is_protected;
      }
    }
  }
  return survivors;
}

}  // namespace

std::int64_t prune_magnitude(const PruneProblem& problem) {
  return with_float_type(problem.dtype, [&]<typename T>() { return prune_as<T>(problem); });
}

}  // namespace kvpack::reference
