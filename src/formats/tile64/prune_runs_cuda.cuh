// Pruning 16-bit rows in the registers of a warp, with counts by the tensor cores: a compare gives 1.0 or 0.0, and a
// product with ones adds up a row over its four lanes. The same product with powers of two gives bits.
//
// A lane holds four runs of 16 adjacent channels, eight registers each; lane = 4*g + part.
//   head_dim 64     run j is row 8*j + g,           channels      16*part ..
//   head_dim 128    run j is row 8*(j / 2) + g,     channels 64*(j % 2) + 16*part ..
//   head_dim 256    run j is row g,                 channels 64*j + 16*part ..
#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "cuda/packed_pair.cuh"
#include "cuda/reduce.cuh"
#include "kvpack/prune.h"

namespace kvpack::cuda {

inline constexpr int kRuns = 4;          // of a lane
inline constexpr int kRunElements = 16;  // of a run
inline constexpr int kRunWords = 8;      // registers of a run
inline constexpr int kRunParts = 4;      // lanes that share a tile or 64 channels of a row

/// Where the runs of a lane lie, by head_dim.
template <int kHeadDim>
struct RunShape {
  static constexpr int kRunsPerRow = kHeadDim / 64;
  static constexpr int kRows = kRuns / kRunsPerRow;  // of a lane
  static constexpr int kRowsPerWarp = 8 * kRows;
};

using Runs = std::uint32_t[kRuns][kRunWords];

/// What the host tells the search: where to begin and how far to go.
struct SearchHint {
  float mean_factor;       // first threshold = this times the row's mean magnitude
  float growth_per_count;  // which part of itself a threshold must grow by to lose one entry, near there
};

/// Adds entries(run, word) of all lanes of a row: 1.0 or 0.0 each, or magnitudes.
template <int kHeadDim, MmaType kType, typename Entries>
__device__ void sum_rows(float (&sums)[RunShape<kHeadDim>::kRows], Entries entries) {
  constexpr int kRows = RunShape<kHeadDim>::kRows;
  constexpr std::uint32_t kOnes = power_bits<kType>(0) * 0x10001u;
  float d[2][4] = {};
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const int upper = kRows == 4 ? 2 * step : step;
    const int lower = kRows == 4 ? 2 * step + 1 : step + 2;
#pragma unroll
    for (int w = 0; w < kRunWords; w += 2) {
      const std::uint32_t a[4] = {entries(upper, w), entries(lower, w), entries(upper, w + 1), entries(lower, w + 1)};
      mma_m16n8k16(d[step], a, make_uint2(kOnes, kOnes), kType);
    }
  }
  if constexpr (kRows == 1) {
    sums[0] = (d[0][0] + d[0][2]) + (d[1][0] + d[1][2]);
  } else {
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums[r] = kRows == 4 ? d[r / 2][r % 2 * 2] : d[0][2 * r] + d[1][2 * r];
  }
}

/// The 16 bits of each of a lane's runs, most significant first: bit 15 - e tells entry e of ones(run, word).
///
///   run      0.5 0 0 2 0 0 ... 0
///   bits     1001 0000 0000 0000       = 1*2^15 + 1*2^12, added up by one row of the tensor core
///
/// Column 2*part + s of the product belongs to the lanes of that part, so B holds weights only there.
template <MmaType kType, typename Ones>
__device__ void find_run_bits(std::uint32_t (&bits)[kRuns], Ones ones) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int column = lane / kRunParts;
  const int part = lane % kRunParts;
  float d[2][4] = {};  // two sums: a product waits for the one before
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const std::uint32_t own = column == 2 * part + step ? ~0u : 0u;
#pragma unroll
    for (int w = 0; w < kRunWords; w += 2) {
      const int top = 15 - 2 * w;  // of the four entries in these two words
      const std::uint32_t low_pair = power_bits<kType>(top) | power_bits<kType>(top - 1) << 16;
      const std::uint32_t high_pair = power_bits<kType>(top - 2) | power_bits<kType>(top - 3) << 16;
      const std::uint32_t a[4] = {ones(step, w), ones(step + 2, w), ones(step, w + 1), ones(step + 2, w + 1)};
      mma_m16n8k16(d[step], a, make_uint2(low_pair & own, high_pair & own), kType);
    }
  }
  // Adding 2^23 puts a whole number into the low bits of a float32.
#pragma unroll
  for (int j = 0; j < kRuns; ++j) bits[j] = __float_as_uint(d[0][j] + d[1][j] + 8388608.0f) & 0xffffu;
}

/// Sums of four packed bytes over the lanes of lower part, and over all four parts.
struct PartSums {
  std::uint32_t before;
  std::uint32_t all;
};

__device__ inline PartSums sum_parts(std::uint32_t counts) {
  const int part = static_cast<int>(threadIdx.x) % kRunParts;
  std::uint32_t sum = counts;
#pragma unroll
  for (int distance = 1; distance < kRunParts; distance *= 2) {
    const std::uint32_t below = __shfl_up_sync(kAllLanes, sum, distance, kRunParts);
    if (part >= distance) sum += below;
  }
  return {sum - counts, __shfl_sync(kAllLanes, sum, kRunParts - 1, kRunParts)};
}

/// Byte j of four packed ones.
__device__ inline int byte_of(std::uint32_t bytes, int j) { return static_cast<int>(bytes >> (8 * j) & 0xffu); }

/// Where the rows of a lane are cut: the same in all four lanes of a row. Ranks are magnitudes as integers, every NaN is
/// infinity + 1; each stands in both halves of its register.
template <int kRows>
struct RowCuts {
  std::uint32_t limits[kRows];  // ranks above survive
  std::uint32_t tied[kRows];    // but of this rank only the first num_ties; a NaN that no rank is: no ties
  int num_ties[kRows];
  bool has_ties;  // any row
};

inline constexpr std::uint32_t kNoTie = 0x7fff7fffu;

/// Finds the cuts of a lane's rows. Every lane of the warp must call.
///
/// Keeps limits low < high with counts above them on either side of rank_from_top, two rows in a register, and guesses
/// between them along the straight line: magnitudes near a threshold are spread evenly enough that 3.7 counts do on
/// average, and 7.5 until all rows of a warp have theirs (normal numbers, 70 %, float16).
///   rank_from_top 38; 41 are above 1.03: low; 36 are above 1.07: high; 38 are above 1.05: found
/// A row whose cut is found goes on, which harms nothing. From the seventh count on every other one halves the interval
/// of ranks, which ends any search.
template <int kHeadDim, MmaType kType>
__device__ RowCuts<RunShape<kHeadDim>::kRows> find_row_cuts(const Runs& x, float rank_from_top, PruneRule rule,
                                                            SearchHint hint) {
  constexpr int kRows = RunShape<kHeadDim>::kRows;
  constexpr int kPairs = (kRows + 1) / 2;  // of rows
  constexpr int kPatience = 6;
  constexpr std::uint32_t kInfinities = PackedPair<kType>::kInfinity * 0x10001u;
  constexpr std::uint32_t kTop = kInfinities + 0x10001u;  // as a number it is a NaN
  const std::uint32_t wanted = pair_near<kType>(rank_from_top, rank_from_top);
  std::uint32_t slope = pair_near<kType>(hint.growth_per_count, hint.growth_per_count);
  float sums[kRows];
  sum_rows<kHeadDim, kType>(sums, [&](int j, int w) { return x[j][w] & 0x7fff7fffu; });
  std::uint32_t limits[kPairs];
  std::uint32_t low[kPairs];
  std::uint32_t high[kPairs];
  std::uint32_t above_low[kPairs];
  std::uint32_t above_high[kPairs];
  const float factor = hint.mean_factor / static_cast<float>(kHeadDim);
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const std::uint32_t guess = pair_near<kType>(sums[2 * p] * factor, sums[(2 * p + 1) % kRows] * factor);
    limits[p] = pair_max_known<kType>(pair_min_known<kType>(guess, kInfinities), 0x10001u);
    low[p] = 0;
    high[p] = kTop;
    above_low[p] = pair_near<kType>(kHeadDim, kHeadDim);
    above_high[p] = 0;
  }
  for (int step = 0;; ++step) {
    std::uint32_t row_limits[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      row_limits[r] = r % 2 == 0 ? lower_twice<kType>(limits[r / 2]) : upper_twice<kType>(limits[r / 2]);
    }
    sum_rows<kHeadDim, kType>(sums, [&](int j, int w) {
      return ones_above<kType>(x[j][w], row_limits[j / RunShape<kHeadDim>::kRunsPerRow]);
    });
    std::uint32_t surplus[kPairs];
    std::uint32_t is_open = 0;
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const std::uint32_t count = pair_near<kType>(sums[2 * p], sums[(2 * p + 1) % kRows]);
      const std::uint32_t enough = mask_at_least<kType>(count, wanted);
      low[p] = (limits[p] & enough) | (low[p] & ~enough);
      above_low[p] = (count & enough) | (above_low[p] & ~enough);
      high[p] = (high[p] & enough) | (limits[p] & ~enough);
      above_high[p] = (above_high[p] & enough) | (count & ~enough);
      surplus[p] = pair_difference<kType>(above_low[p], wanted);
      is_open |= mask_differs<kType>(above_low[p], wanted) & mask_differs<kType>(high[p] - low[p], 0x10001u);
    }
    if (__any_sync(kAllLanes, is_open != 0) == 0) break;
    const bool halves = step >= kPatience && step % 2 == 0;
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      // With a lower limit only, walk along the expected slope, faster each time.
      const std::uint32_t has_high = mask_equal<kType>(high[p], high[p]);
      const std::uint32_t share = pair_ratio<kType>(surplus[p], pair_difference<kType>(above_low[p], above_high[p]));
      const std::uint32_t factors = (share & has_high) | (pair_product<kType>(surplus[p], slope) & ~has_high);
      const std::uint32_t widths = (pair_difference<kType>(high[p], low[p]) & has_high) | (low[p] & ~has_high);
      std::uint32_t next = pair_fma<kType>(factors, widths, low[p]);
      if (halves) next = low[p] + ((high[p] - low[p]) >> 1 & 0x7fff7fffu);
      limits[p] = pair_max_known<kType>(pair_min_known<kType>(next, high[p] - 0x10001u), low[p] + 0x10001u);
    }
    slope = pair_sum<kType>(slope, slope);
  }
  RowCuts<kRows> cuts;
  std::uint32_t any_tie = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int p = r / 2;
    const bool is_lower = r % 2 == 0;
    cuts.limits[r] = is_lower ? lower_twice<kType>(low[p]) : upper_twice<kType>(low[p]);
    cuts.tied[r] = is_lower ? lower_twice<kType>(high[p]) : upper_twice<kType>(high[p]);
    const std::uint32_t over = is_lower ? above_high[p] : above_high[p] >> 16;
    cuts.num_ties[r] = static_cast<int>(rank_from_top - lower_value<kType>(over));
    // No limit separates: the entries of rank `high` tie.
    const std::uint32_t ties = rule == PruneRule::kKthValue ? 0u : mask_differs<kType>(above_low[p], wanted);
    any_tie |= ties;
    if ((is_lower ? ties & 0xffffu : ties >> 16) == 0) cuts.tied[r] = kNoTie;
  }
  cuts.has_ties = __any_sync(kAllLanes, any_tie != 0) != 0;
  return cuts;
}

/// The channels that must not survive although their rank ties: all but the first num_ties of each row. Bits as in
/// find_run_bits; every lane must call.
template <int kHeadDim, MmaType kType>
__device__ void find_surplus_ties(std::uint32_t (&surplus)[kRuns], const Runs& x,
                                  const RowCuts<RunShape<kHeadDim>::kRows>& cuts) {
  constexpr int kRows = RunShape<kHeadDim>::kRows;
  constexpr int kRunsPerRow = RunShape<kHeadDim>::kRunsPerRow;
  constexpr std::uint32_t kNans = PackedPair<kType>::kInfinity * 0x10001u + 0x10001u;
  std::uint32_t ties[kRuns];
  find_run_bits<kType>(ties, [&](int j, int w) { return ones_equal<kType>(x[j][w], cuts.tied[j / kRunsPerRow]); });
  // A NaN equals nothing, so rows with too many of them, which are rare, need a second look.
  bool has_nans = false;
#pragma unroll
  for (int r = 0; r < kRows; ++r) has_nans |= cuts.tied[r] == kNans;
  if (__any_sync(kAllLanes, has_nans) != 0) {
    std::uint32_t nans[kRuns];
    find_run_bits<kType>(
        nans, [&](int j, int w) { return ones_above<kType>(x[j][w], PackedPair<kType>::kInfinity * 0x10001u); });
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      if (cuts.tied[j / kRunsPerRow] == kNans) ties[j] = nans[j];
    }
  }
  std::uint32_t counts = 0;
#pragma unroll
  for (int j = 0; j < kRuns; ++j) counts |= static_cast<std::uint32_t>(__popc(ties[j])) << (8 * j);
  const PartSums sums = sum_parts(counts);
#pragma unroll
  for (int j = 0; j < kRuns; ++j) {
    int room = cuts.num_ties[j / kRunsPerRow] - byte_of(sums.before, j);
#pragma unroll
    for (int earlier = j / kRunsPerRow * kRunsPerRow; earlier < j; ++earlier) room -= byte_of(sums.all, earlier);
    surplus[j] = ties[j];
    for (int kept = 0; kept < room && surplus[j] != 0; ++kept) {
      surplus[j] &= ~(1u << (31 - __clz(static_cast<int>(surplus[j]))));  // the lowest channel stays
    }
  }
}

}  // namespace kvpack::cuda
