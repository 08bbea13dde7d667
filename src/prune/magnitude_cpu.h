// Magnitude pruning in the SIMD vocabulary. Compiled once per instruction set by magnitude_cpu.cpp.
//
// A row's threshold is found bit by bit from the top: `count(rank >= candidate)` decides each bit of the wanted rank's
// value. No sort, no branches on data, and most rows end early, when a candidate splits the row exactly:
//
//   ranks (|x| as integers)   5 9 1 7   want the 2nd largest
//   candidate 8 (1000b)       . # . .   1 < 2, bit stays 0
//   candidate 4 (0100b)       # # . #   3 >= 2, bit set
//   candidate 6 (0110b)       . # . #   2 == 2, done: keep what is >= 6

namespace kvpack::KVPACK_ISA {
namespace {

/// Ranks of one row, padded with 0 to whole vectors: a rank of 0 never counts, candidates are at least 1.
template <typename T>
inline void rank_row(const T* x, const float* scores, std::int64_t head_dim, std::uint32_t* ranks) {
  std::int64_t i = 0;
  for (; i + kLanes <= head_dim; i += kLanes) {
    F32 value = load(x + i);
    if (scores != nullptr) value = mul(value, load(scores + i));
    store_u32(ranks + i, magnitude_rank(value));
  }
  for (; i < head_dim; ++i) {
    const float value = scores == nullptr ? to_float(x[i]) : to_float(x[i]) * scores[i];
    const std::uint32_t magnitude = std::bit_cast<std::uint32_t>(value) & 0x7fffffffu;
    ranks[i] = magnitude < 0x7f800001u ? magnitude : 0x7f800001u;
  }
  for (; i % kLanes != 0; ++i) ranks[i] = 0;
}

inline std::int64_t count_at_least(const std::uint32_t* ranks, std::int64_t padded, std::uint32_t candidate) {
  const U32 limit = set1_u32(candidate);
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < padded; i += kLanes) {
    count += std::popcount(bits(ge_u32(load_u32(ranks + i), limit)));
  }
  return count;
}

/// Entries of rank >= `at_least` survive, and of those of rank == at_least - 1 the first `num_ties`.
struct Cut {
  std::uint32_t at_least;
  std::int64_t num_ties;
};

inline Cut find_cut(const std::uint32_t* ranks, std::int64_t padded, std::int64_t rank_from_top, PruneRule rule,
                    std::uint32_t largest) {
  std::uint32_t threshold = 0;
  for (int bit = std::bit_width(largest) - 1; bit >= 0; --bit) {
    const std::uint32_t candidate = threshold | (1u << bit);
    const std::int64_t count = count_at_least(ranks, padded, candidate);
    if (count == rank_from_top) return {candidate, 0};
    if (count > rank_from_top) threshold = candidate;
  }
  // The threshold is the wanted rank itself, and it is shared: several entries tie there.
  if (rule == PruneRule::kKthValue) return {threshold, 0};
  return {threshold + 1, rank_from_top - count_at_least(ranks, padded, threshold + 1)};
}

/// Lowest `count` set bits of a mask of lanes.
inline std::uint32_t lowest_set_bits(std::uint32_t mask, std::int64_t count) {
  std::uint32_t result = 0;
  for (; count > 0 && mask != 0; --count) {
    result |= mask & (~mask + 1u);
    mask &= mask - 1u;
  }
  return result;
}

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

template <typename T>
std::int64_t prune_tokens(const PruneProblem& problem, std::int64_t first_token, std::int64_t end_token,
                          std::uint32_t* ranks) {
  const std::int64_t padded = (problem.head_dim + kLanes - 1) / kLanes * kLanes;
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
  constexpr std::int64_t kBlockTokens = 64;
  constexpr std::int64_t kInlineRanks = 1024;
  const std::int64_t num_blocks = (problem.tokens + kBlockTokens - 1) / kBlockTokens;
  std::atomic<std::int64_t> kept{0};
  auto prune_block = [&](std::int64_t block) {
    alignas(64) std::uint32_t inline_ranks[kInlineRanks];
    std::vector<std::uint32_t> heap_ranks;  // only for heads wider than any model has
    std::uint32_t* ranks = inline_ranks;
    if (problem.head_dim + kLanes > kInlineRanks) {
      heap_ranks.resize(static_cast<std::size_t>(problem.head_dim + kLanes));
      ranks = heap_ranks.data();
    }
    const std::int64_t first = block * kBlockTokens;
    const std::int64_t end = first + kBlockTokens < problem.tokens ? first + kBlockTokens : problem.tokens;
    const std::int64_t survivors =
        with_float_type(problem.dtype, [&]<typename T>() { return prune_tokens<T>(problem, first, end, ranks); });
    kept.fetch_add(survivors, std::memory_order_relaxed);
  };
  parallel_for(num_blocks, prune_block);
  return kept.load();
}

}  // namespace kvpack::KVPACK_ISA
