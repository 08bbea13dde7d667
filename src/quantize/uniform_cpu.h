// Simulated quantisation in the SIMD vocabulary: what both axes share, and the tasks. Compiled once per
// instruction set by uniform_cpu.cpp.

namespace kvpack::KVPACK_ISA {
namespace {

enum class Outliers { kNone, kKept };

/// What happens to a value. The first two differ in how (code + offset) / qs is computed; both round once, so they give
/// the same bits.
enum class Steps { kDivision, kReciprocal, kCodebook };

/// One register of grids, for simulate_lanes().
struct GridLanes {
  F32 qs;
  F32 offset;
  F32 inverse;  // 1 / qs, read only with Steps::kReciprocal
};

/// What all registers of a call share.
struct RuleLanes {
  F32 levels;
  Mask keeps_degenerate;
  const CodebookTable* codebook;
};

inline RuleLanes make_rule(const UniformProblem& problem) {
  return {set1(largest_code(problem.options.bits)), mask_from_bits(problem.options.compat ? 0u : ~0u),
          problem.codebook};
}

/// True when a / qs may be computed from 1 / qs: far from underflow and overflow in every step of divide_exactly().
inline bool suits_reciprocal(float qs, float offset) {
  const float magnitude = std::fabs(offset);
  return qs == 0.0f ||
         (qs >= 0x1p-40f && qs <= 0x1p40f && (magnitude == 0.0f || magnitude >= 0x1p-60f) && magnitude <= 0x1p60f);
}

/// a / b rounded to nearest, without the divider, which takes 10 cycles a register and was half the time. With
/// y = RN(1/b), a*y is within 2 units in the last place, one correction makes it faithful, and from a faithful quotient
/// the next is the correctly rounded one (Markstein's theorem; Handbook of Floating-Point Arithmetic, section 4.7).
inline F32 divide_exactly(F32 a, F32 b, F32 y) {
  const F32 minus_b = sub(set1(0.0f), b);
  F32 quotient = mul(a, y);
  quotient = fma(fma(minus_b, quotient, a), y, quotient);
  return fma(fma(minus_b, quotient, a), y, quotient);
}

/// What one register of normalised values comes back as. Boundaries ascend, so the last one below y decides. Comparing
/// with all of them beats halving, which would gather at each step; a single lane halves.
inline F32 nearest_values(F32 y, const CodebookTable& codebook) {
  if constexpr (kLanes == 1) {
    float lane[kLanes];
    store(lane, y);
    return set1(codebook.values[nearest_centroid(lane[0], codebook.boundaries, codebook.levels)]);
  }
  F32 value = set1(codebook.values[0]);
  for (std::int32_t k = 1; k < codebook.levels; ++k) {
    value = blend(gt(y, set1(codebook.boundaries[k - 1])), set1(codebook.values[k]), value);
  }
  return value;
}

/// Quantises and dequantises one register. The lines are those of simulate_value() in quantize/uniform.h and of
/// simulate_with_codebook() in quantize/codebook.h; lanes with a degenerate grid (qs 0) give the value back, or the
/// grid's offset where `keeps_degenerate` is clear.
template <Outliers kOutliers, Steps kSteps>
inline F32 simulate_lanes(F32 x, const GridLanes& grid, F32 upper, F32 lower, const RuleLanes& rule) {
  const F32 zero = set1(0.0f);
  F32 value;
  if constexpr (kSteps == Steps::kCodebook) {
    const F32 y = div(sub(x, grid.offset), grid.qs);
    value = add(mul(nearest_values(y, *rule.codebook), grid.qs), grid.offset);
  } else {
    const F32 rounded = round_even(sub(mul(x, grid.qs), grid.offset));
    const F32 shifted = add(min(max(rounded, zero), rule.levels), grid.offset);
    value = kSteps == Steps::kReciprocal ? divide_exactly(shifted, grid.qs, grid.inverse) : div(shifted, grid.qs);
  }
  F32 result = blend(eq(grid.qs, zero), blend(rule.keeps_degenerate, x, grid.offset), value);
  if constexpr (kOutliers == Outliers::kKept) result = blend(either(ge(x, upper), le(x, lower)), x, result);
  return result;
}

/// The same for one element, whose bits stay when it is exact: a float64 would lose some on its way through float32.
template <Outliers kOutliers, typename T>
inline T simulate_element(T x, UniformGrid grid, float upper, float lower, const UniformProblem& problem) {
  const float value = to_float(x);
  if (kOutliers == Outliers::kKept && (value >= upper || value <= lower)) return x;
  if (grid.qs == 0.0f && !problem.options.compat) return x;
  T result{};
  if (grid.qs == 0.0f) {
    from_float(grid.offset, result);
  } else if (problem.codebook != nullptr) {
    const CodebookTable& codebook = *problem.codebook;
    from_float(simulate_with_codebook(value, grid, codebook.boundaries, codebook.values, codebook.levels), result);
  } else {
    from_float(simulate_value(value, grid, largest_code(problem.options.bits)), result);
  }
  return result;
}

}  // namespace
}  // namespace kvpack::KVPACK_ISA

#include "quantize/uniform_tile_cpu.h"

#include "quantize/uniform_per_channel_cpu.h"
#include "quantize/uniform_per_token_cpu.h"

namespace kvpack::KVPACK_ISA {
namespace {

/// A task's sums; tasks merge theirs at their end.
struct TaskTotals {
  std::atomic<std::int64_t> quantized{0};
  std::atomic<std::int64_t> vectors{0};
  std::atomic<std::int64_t> outliers{0};
  std::atomic<bool> all_finite{true};

  void add(const UniformCounts& counts, bool task_all_finite) {
    quantized.fetch_add(counts.quantized, std::memory_order_relaxed);
    vectors.fetch_add(counts.vectors, std::memory_order_relaxed);
    outliers.fetch_add(counts.outliers, std::memory_order_relaxed);
    if (!task_all_finite) all_finite.store(false, std::memory_order_relaxed);
  }
};

/// Elements that make a task worth handing to another thread.
inline constexpr std::int64_t kTaskElements = 32768;

template <Outliers kOutliers, typename T>
void run_per_token(const UniformProblem& problem, TaskTotals& totals) {
  const std::int64_t block = 1 + kTaskElements / problem.channels;
  auto task = [&](std::int64_t first, std::int64_t end) {
    UniformCounts counts;
    const bool all_finite = simulate_tokens<kOutliers, T>(problem, first, end, counts);
    totals.add(counts, all_finite);
  };
  parallel_for_blocks(problem.options.protected_tokens, problem.tokens, block, task);
}

template <Outliers kOutliers, typename T>
void run_per_channel(const UniformProblem& problem, TaskTotals& totals) {
  const std::int64_t groups = num_token_groups(problem);
  const bool splits_tokens = problem.options.scale == ScaleRule::kRange;  // strands of a sum of squares stay together
  if (kOutliers == Outliers::kNone && splits_tokens && groups == 1 &&
      problem.tokens * problem.channels > kTaskElements) {
    UniformCounts counts;
    bool all_finite = true;
    const TokenRange range = token_group(problem, 0);
    const std::int64_t done = simulate_long_group<T>(problem, range, counts, all_finite);
    if (range.first < range.end)
      scalar::simulate_channels<scalar::Outliers::kNone, T>(problem, range, done, problem.channels, counts, all_finite);
    totals.add(counts, all_finite);
    return;
  }
  // One long group is shared by channels, many groups by tokens.
  const std::int64_t threads = groups > 1 ? 1 : num_threads();
  const std::int64_t share = round_up(divide_up(problem.channels, threads), 32);
  const std::int64_t tile_channels = share < kMaxTileChannels ? share : kMaxTileChannels;
  const std::int64_t tiles = divide_up(problem.channels, tile_channels);
  const std::int64_t groups_per_task = 1 + kTaskElements / (problem.group * tile_channels);
  auto task = [&](std::int64_t index) {
    const std::int64_t first = index % tiles * tile_channels;
    const std::int64_t end = first + tile_channels < problem.channels ? first + tile_channels : problem.channels;
    const std::int64_t first_group = index / tiles * groups_per_task;
    const std::int64_t end_group = first_group + groups_per_task < groups ? first_group + groups_per_task : groups;
    UniformCounts counts;
    bool all_finite = true;
    for (std::int64_t g = first_group; g < end_group; ++g) {
      const TokenRange range = token_group(problem, g);
      if (range.first == range.end) continue;
      const std::int64_t done = simulate_channels<kOutliers, T>(problem, range, first, end, counts, all_finite);
      scalar::simulate_channels<static_cast<scalar::Outliers>(kOutliers), T>(problem, range, first + done, end, counts,
                                                                             all_finite);
    }
    totals.add(counts, all_finite);
  };
  parallel_for(tiles * divide_up(groups, groups_per_task), task);
}

/// Tokens that come back exactly: the protected ones, and in causal mode an incomplete last group.
template <typename T>
void copy_exact_tokens(const UniformProblem& problem) {
  if (problem.x == problem.out) return;
  const bool by_channel = problem.options.axis == Axis::kPerChannel;
  const std::int64_t head_end = problem.options.protected_tokens;
  const std::int64_t groups_end = by_channel ? num_token_groups(problem) * problem.group : problem.tokens;
  const std::int64_t tail_first = groups_end > head_end ? groups_end : head_end;
  for (std::int64_t t = 0; t < problem.tokens; ++t) {
    if (t == head_end && tail_first > t) t = tail_first;
    if (t >= problem.tokens) break;
    std::memcpy(static_cast<T*>(problem.out) + t * problem.out_token_stride,
                static_cast<const T*>(problem.x) + t * problem.x_token_stride,
                static_cast<std::size_t>(problem.channels) * sizeof(T));
  }
}

template <Outliers kOutliers, typename T>
void run(const UniformProblem& problem, TaskTotals& totals) {
  if (problem.options.axis == Axis::kPerToken) {
    run_per_token<kOutliers, T>(problem, totals);
  } else {
    run_per_channel<kOutliers, T>(problem, totals);
  }
  copy_exact_tokens<T>(problem);
}

}  // namespace

UniformOutcome simulate_uniform(const UniformProblem& problem) {
  TaskTotals totals;
  with_float_type(problem.dtype, [&]<typename T>() {
    if (problem.options.outlier_fraction > 0.0) {
      run<Outliers::kKept, T>(problem, totals);
    } else {
      run<Outliers::kNone, T>(problem, totals);
    }
  });
  return {{totals.quantized, totals.vectors, totals.outliers}, totals.all_finite};
}

}  // namespace kvpack::KVPACK_ISA
