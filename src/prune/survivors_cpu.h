// Which entries of a row survive pruning, in the SIMD vocabulary: shared by magnitude pruning and the tile formats.
// Included inside a source that for_each_isa.h compiles, once per instruction set.
//
// A row's threshold is found bit by bit from the top: `count(rank >= candidate)` decides each bit of the wanted rank's
// value. No sort, no branches on data:
//
//   ranks (|x| as integers)   5 9 1 7   want the 2nd largest
//   candidate 8 (1000b)       . # . .   1 < 2, bit stays 0
//   candidate 4 (0100b)       # # . #   3 >= 2, bit set
//   candidate 6 (0110b)       . # . #   2 >= 2, bit set
//   candidate 7 (0111b)       . # . #   2 >= 2, bit set: the threshold is 7

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

/// The rank of NaN among the bits of a 16-bit type: one above infinity.
inline std::uint32_t nan_rank_of(Half /*type*/) { return 0x7c01u; }
inline std::uint32_t nan_rank_of(BFloat16 /*type*/) { return 0x7f81u; }

/// Which entries of a row to keep: docs/numerics.md section 1.
struct Keep {
  int rank_from_top;  // 1 .. head_dim
  PruneRule rule;
};

/// The masks of one row of ranks whose threshold is known; bit c mod 64 of word c div 64 is channel c.
template <int kHeadDim>
inline void mask_row(const U16* ranks, std::uint32_t threshold, Keep keep, std::uint64_t* masks) {
  constexpr int kWords = kHeadDim / 64;
  constexpr int kVectorsPerWord = 64 / kLanes16;
  int count = 0;
  for (int w = 0; w < kWords; ++w) {
    masks[w] = mask64_ge_u16(ranks + w * kVectorsPerWord, set1_u16(threshold));
    count += std::popcount(masks[w]);
  }
  if (count == keep.rank_from_top || keep.rule == PruneRule::kKthValue) return;
  // Too many tie at the threshold: the lower channels win.
  std::uint64_t above[kWords];
  int ties = keep.rank_from_top;
  for (int w = 0; w < kWords; ++w) {
    above[w] = mask64_ge_u16(ranks + w * kVectorsPerWord, set1_u16(threshold + 1));
    ties -= std::popcount(above[w]);
  }
  for (int w = 0; w < kWords; ++w) {
    const std::uint64_t tied = masks[w] & ~above[w];
    const int available = std::popcount(tied);
    if (ties < available) masks[w] = above[w] | lowest_set_bits64(tied, ties);
    ties -= ties < available ? ties : available;
  }
}

/// Survivors of rows of a 16-bit type, several at a time: one row alone would wait for each count. `masks` holds
/// kHeadDim / 64 words a row, word w of row r at masks[w * part_stride + r * row_stride].
template <int kHeadDim, typename T>
inline void mask_rows_of_words(const T* x, std::int64_t token_stride, int num_rows, Keep keep, std::int64_t part_stride,
                               std::int64_t row_stride, std::uint64_t* masks) {
  constexpr int kVectors = kHeadDim / kLanes16;
  constexpr int kWords = kHeadDim / 64;
  constexpr int kRows = kVectors < kVectorsInFlight ? kVectorsInFlight / kVectors : 1;
  const U16 nan_rank = set1_u16(nan_rank_of(T{}));
  for (int first = 0; first < num_rows; first += kRows) {
    U16 ranks[kRows][kVectors];
    std::uint32_t thresholds[kRows] = {};
    for (int r = 0; r < kRows; ++r) {
      // Past the end the last row stands in, and its masks are written again.
      const int row = first + r < num_rows ? first + r : num_rows - 1;
      const std::uint16_t* words = &(x + row * token_stride)->bits;
      for (int i = 0; i < kVectors; ++i) {
        ranks[r][i] = magnitude_rank_u16(load_u16(words + i * kLanes16), nan_rank);
      }
    }
    for (int bit = 14; bit >= 0; --bit) {
      for (int r = 0; r < kRows; ++r) {
        const std::uint32_t candidate = thresholds[r] | (1u << bit);
        const bool reached = count_ge_u16<kVectors>(ranks[r], set1_u16(candidate)) >= keep.rank_from_top;
        thresholds[r] |= static_cast<std::uint32_t>(reached) << bit;
      }
    }
    for (int r = 0; r < kRows; ++r) {
      const int row = first + r < num_rows ? first + r : num_rows - 1;
      std::uint64_t row_masks[kWords];
      mask_row<kHeadDim>(ranks[r], thresholds[r], keep, row_masks);
      for (int w = 0; w < kWords; ++w) masks[w * part_stride + row * row_stride] = row_masks[w];
    }
  }
}

/// The same for every type and with scores (null: none), a row at a time through float32. `ranks` has room for head_dim.
template <typename T>
inline void mask_rows_of_floats(const T* x, std::int64_t token_stride, int num_rows, std::int64_t head_dim,
                                const float* scores, Keep keep, std::int64_t part_stride, std::int64_t row_stride,
                                std::uint32_t* ranks, std::uint64_t* masks) {
  for (int row = 0; row < num_rows; ++row) {
    rank_row(x + row * token_stride, scores, head_dim, ranks);
    std::uint32_t largest = 0;
    for (std::int64_t i = 0; i < head_dim; ++i) largest |= ranks[i];
    Cut cut = find_cut(ranks, head_dim, keep.rank_from_top, keep.rule, largest);
    for (std::int64_t part = 0; part < head_dim / 64; ++part) {
      std::uint64_t above = 0;
      std::uint64_t tied = 0;
      for (int i = 0; i < 64; i += kLanes) {
        const U32 rank = load_u32(ranks + part * 64 + i);
        above |= static_cast<std::uint64_t>(bits(ge_u32(rank, set1_u32(cut.at_least)))) << i;
        if (cut.num_ties > 0) {
          tied |= static_cast<std::uint64_t>(bits(ge_u32(rank, set1_u32(cut.at_least - 1u)))) << i;
        }
      }
      tied &= ~above;
      const int available = std::popcount(tied);
      if (cut.num_ties < available) tied = lowest_set_bits64(tied, static_cast<int>(cut.num_ties));
      cut.num_ties -= std::popcount(tied);
      masks[part * part_stride + row * row_stride] = above | tied;
    }
  }
}

}  // namespace
}  // namespace kvpack::KVPACK_ISA
