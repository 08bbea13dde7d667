// Magnitude pruning in the SIMD vocabulary. Compiled once per instruction set by magnitude_cpu.cpp.

#include "prune/survivors_cpu.h"

namespace kvpack::KVPACK_ISA {
namespace {

inline constexpr int kBlockTokens = 64;  // what a task prunes

/// Copies the elements of set lanes and clears the others. Every way moves bits, so a NaN keeps its payload.
template <typename T>
inline void copy_survivors(const T* x, T* out, std::uint32_t lanes, std::int64_t count) {
  if (count < kLanes || std::is_same_v<T, double>) {
    for (std::int64_t lane = 0; lane < count; ++lane) out[lane] = ((lanes >> lane) & 1u) != 0 ? x[lane] : T{};
  } else if constexpr (std::is_same_v<T, float>) {
    store(out, blend(mask_from_bits(lanes), load(x), set1(0.0f)));
  } else if constexpr (sizeof(T) == 2) {
    // Through float a signalling NaN would become quiet; the compiler makes vector shifts and masks of this.
    std::uint16_t words[kLanes];
    std::memcpy(words, x, sizeof(words));
    for (std::uint32_t lane = 0; lane < kLanes; ++lane) {
      words[lane] = static_cast<std::uint16_t>(words[lane] & (0u - ((lanes >> lane) & 1u)));
    }
    std::memcpy(out, words, sizeof(words));
  }
}

/// Writes survivors with their bits and +0 elsewhere.
template <typename T>
inline std::int64_t write_row(const T* x, T* out, const std::uint32_t* ranks, std::int64_t head_dim, Cut cut) {
  std::int64_t kept = 0;
  const U32 at_least = set1_u32(cut.at_least);
  const U32 tie = set1_u32(cut.at_least - 1u);
  for (std::int64_t i = 0; i < head_dim; i += kLanes) {
    const U32 rank = load_u32(ranks + i);
    std::uint32_t lanes = bits(ge_u32(rank, at_least));
    if (cut.num_ties > 0) {
      const std::uint32_t ties = lowest_set_bits(bits(ge_u32(rank, tie)) & ~lanes, cut.num_ties);
      cut.num_ties -= std::popcount(ties);
      lanes |= ties;
    }
    const std::int64_t count = head_dim - i < kLanes ? head_dim - i : kLanes;
    if (count < 32) lanes &= (1u << count) - 1u;  // the padding ranks of 0 reach a cut at 0
    kept += std::popcount(lanes);
    copy_survivors(x + i, out + i, lanes, count);
  }
  return kept;
}

/// Rows of a 16-bit type without scores, whose heads are as wide as models have them: a batch of rows at a time, found
/// as masks.
template <int kHeadDim, typename T>
std::int64_t prune_rows_of_words(const T* x, std::int64_t x_stride, T* out, std::int64_t out_stride, int num_rows,
                                 Keep keep) {
  constexpr int kWords = kHeadDim / 64;
  std::uint64_t masks[kBlockTokens * kWords];
  mask_rows_of_words<kHeadDim>(x, x_stride, num_rows, keep, 1, kWords, masks);
  std::int64_t kept = 0;
  for (int row = 0; row < num_rows; ++row) {
    for (int w = 0; w < kWords; ++w) {
      const std::uint64_t mask = masks[row * kWords + w];
      kept += std::popcount(mask);
      copy_words_of_mask(&x[row * x_stride + w * 64].bits, mask, &out[row * out_stride + w * 64].bits);
    }
  }
  return kept;
}

/// The heads of a block of tokens one after another where prune_rows_of_words can do it; -1 where it cannot.
template <typename T>
std::int64_t prune_words(const PruneProblem& problem, std::int64_t first_token, std::int64_t end_token) {
  if constexpr (sizeof(T) == 2) {
    const bool is_known = problem.head_dim == 64 || problem.head_dim == 128 || problem.head_dim == 256;
    if (!is_known || problem.channel_scores != nullptr || first_token < problem.protected_tokens) return -1;
    const Keep keep{static_cast<int>(problem.rank_from_top), problem.rule};
    const auto num_rows = static_cast<int>(end_token - first_token);
    std::int64_t kept = 0;
    for (std::int64_t first = 0; first < problem.channels; first += problem.head_dim) {
      const T* x = static_cast<const T*>(problem.x) + first_token * problem.x_token_stride + first;
      T* out = static_cast<T*>(problem.out) + first_token * problem.out_token_stride + first;
      const auto prune = problem.head_dim == 64    ? prune_rows_of_words<64, T>
                         : problem.head_dim == 128 ? prune_rows_of_words<128, T>
                                                   : prune_rows_of_words<256, T>;
      kept += prune(x, problem.x_token_stride, out, problem.out_token_stride, num_rows, keep);
    }
    return kept;
  }
  return -1;
}

template <typename T>
std::int64_t prune_tokens(const PruneProblem& problem, std::int64_t first_token, std::int64_t end_token,
                          std::uint32_t* ranks) {
  if (problem.rank_from_top < problem.head_dim) {
    const std::int64_t survivors = prune_words<T>(problem, first_token, end_token);
    if (survivors >= 0) return survivors;
  }
  const std::int64_t padded = round_up(problem.head_dim, kLanes);
  std::int64_t kept = 0;
  for (std::int64_t token = first_token; token < end_token; ++token) {
    const T* x = static_cast<const T*>(problem.x) + token * problem.x_token_stride;
    T* out = static_cast<T*>(problem.out) + token * problem.out_token_stride;
    if (token < problem.protected_tokens || problem.rank_from_top == problem.head_dim) {
      if (x != out) std::memcpy(out, x, static_cast<std::size_t>(problem.channels) * sizeof(T));
      if (token >= problem.protected_tokens) kept += problem.channels;
      continue;
    }
    for (std::int64_t first = 0; first < problem.channels; first += problem.head_dim) {
      const float* scores = problem.channel_scores == nullptr ? nullptr : problem.channel_scores + first;
      rank_row(x + first, scores, problem.head_dim, ranks);
      std::uint32_t largest = 0;
      for (std::int64_t i = 0; i < problem.head_dim; ++i) largest |= ranks[i];
      const Cut cut = find_cut(ranks, padded, problem.rank_from_top, problem.rule, largest);
      kept += write_row(x + first, out + first, ranks, problem.head_dim, cut);
    }
  }
  return kept;
}

}  // namespace

std::int64_t prune_magnitude(const PruneProblem& problem) {
  constexpr std::int64_t kInlineRanks = 1024;
  std::atomic<std::int64_t> kept{0};
  auto prune_block = [&](std::int64_t first, std::int64_t end) {
    alignas(64) std::uint32_t inline_ranks[kInlineRanks];
    std::vector<std::uint32_t> heap_ranks;  // only for heads wider than any model has
    std::uint32_t* ranks = inline_ranks;
    if (problem.head_dim + kLanes > kInlineRanks) {
      heap_ranks.resize(static_cast<std::size_t>(problem.head_dim + kLanes));
      ranks = heap_ranks.data();
    }
    const std::int64_t survivors =
        with_float_type(problem.dtype, [&]<typename T>() { return prune_tokens<T>(problem, first, end, ranks); });
    kept.fetch_add(survivors, std::memory_order_relaxed);
  };
  parallel_for_blocks(0, problem.tokens, kBlockTokens, prune_block);
  return kept.load();
}

}  // namespace kvpack::KVPACK_ISA
