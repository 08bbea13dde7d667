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
  float mean_factor;      // first threshold = this times the row's mean magnitude
  float ranks_per_count;  // how far a threshold must move to lose one entry, near there
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
      mma_m16n8k16(d[kRows == 4 ? step : 0], a, make_uint2(kOnes, kOnes), kType);
    }
  }
  if constexpr (kRows == 1) {
    sums[0] = d[0][0] + d[0][2];
  } else {
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums[r] = d[r / 2][r % 2 * 2];
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
  float d[4] = {};
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const std::uint32_t own = column == 2 * part + step ? ~0u : 0u;
#pragma unroll
    for (int w = 0; w < kRunWords; w += 2) {
      const int top = 15 - 2 * w;  // of the four entries in these two words
      const std::uint32_t low_pair = power_bits<kType>(top) | power_bits<kType>(top - 1) << 16;
      const std::uint32_t high_pair = power_bits<kType>(top - 2) | power_bits<kType>(top - 3) << 16;
      const std::uint32_t a[4] = {ones(step, w), ones(step + 2, w), ones(step, w + 1), ones(step + 2, w + 1)};
      mma_m16n8k16(d, a, make_uint2(low_pair & own, high_pair & own), kType);
    }
  }
  // Adding 2^23 puts a whole number into the low bits of a float32.
#pragma unroll
  for (int j = 0; j < kRuns; ++j) bits[j] = __float_as_uint(d[j] + 8388608.0f) & 0xffffu;
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

/// Where a row is cut. Ranks are magnitudes as integers, every NaN is infinity + 1.
struct RowCut {
  float at_least = 1.0f;  // ranks from here on survive
  float tied = 0.0f;      // rank of which the first num_ties survive as well
  float num_ties = 0.0f;
};

/// Finds the cut of the row that a lane answers for: row part * kRows / 4. Every lane of the warp must call.
///
/// Keeps ranks low < high with counts on either side of rank_from_top and guesses between them along the straight line:
/// magnitudes near a threshold are spread evenly enough that 3.7 counts do on average, and 7.5 until all rows of a warp
/// have theirs (normal numbers, 70 %, float16), where going bit by bit would take 12 and more.
///   rank_from_top 38; guess 0x3c25 has 41: low; guess 0x3c4a has 36: high; 0x3c3b has 38: found
/// From the seventh count on every other one halves the interval, which ends any search.
template <int kHeadDim, MmaType kType>
__device__ RowCut find_row_cut(const Runs& x, float rank_from_top, PruneRule rule, SearchHint hint) {
  constexpr int kRows = RunShape<kHeadDim>::kRows;
  constexpr int kLanesPerRow = kRunParts / kRows;
  constexpr int kPatience = 6;
  constexpr float kTop = static_cast<float>(PackedPair<kType>::kInfinity + 2u);
  const int row = static_cast<int>(threadIdx.x) % kRunParts / kLanesPerRow;
  float sums[kRows];
  const auto of_row = [row](const float (&of_rows)[kRows]) {
    float sum = of_rows[0];
#pragma unroll
    for (int r = 1; r < kRows; ++r) sum = row == r ? of_rows[r] : sum;
    return sum;
  };
  sum_rows<kHeadDim, kType>(sums, [&](int j, int w) { return x[j][w] & 0x7fff7fffu; });
  float low = 0.0f;
  float high = kTop;
  float above_low = static_cast<float>(kHeadDim);  // entries of rank >= low
  float above_high = 0.0f;
  float slope = hint.ranks_per_count;
  const std::uint32_t guess = bits_near<kType>(of_row(sums) * (hint.mean_factor / static_cast<float>(kHeadDim)));
  float candidate = fminf(fmaxf(static_cast<float>(guess & 0x7fffu), 1.0f), kTop - 1.0f);
  bool found = false;
  for (int step = 0;; ++step) {
    const std::uint32_t limit = (static_cast<std::uint32_t>(candidate) - 1u) * 0x10001u;
    std::uint32_t limits[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) limits[r] = __shfl_sync(kAllLanes, limit, r * kLanesPerRow, kRunParts);
    sum_rows<kHeadDim, kType>(
        sums, [&](int j, int w) { return ones_above<kType>(x[j][w], limits[j / RunShape<kHeadDim>::kRunsPerRow]); });
    const float count = of_row(sums);
    if (!found && high - low > 1.0f) {
      found = count == rank_from_top;
      if (count > rank_from_top) {
        low = candidate;
        above_low = count;
      } else if (count < rank_from_top) {
        high = candidate;
        above_high = count;
      }
    }
    const bool is_open = !found && high - low > 1.0f;
    if (__any_sync(kAllLanes, is_open) == 0) break;
    float next = low + __fdividef((high - low) * (above_low - rank_from_top), above_low - above_high);
    if (low == 0.0f || high == kTop) {  // one side only: walk along the expected slope, faster each time
      next = candidate + (count - rank_from_top) * slope;
      slope *= 2.0f;
    }
    if (step >= kPatience && step % 2 == 0) next = 0.5f * (low + high);
    next = fminf(fmaxf(next, low + 1.0f), high - 1.0f);
    if (is_open) candidate = (next + 8388608.0f) - 8388608.0f;  // to a whole number
  }
  if (found) return {candidate, 0.0f, 0.0f};
  // No threshold separates: the entries of rank `low` tie. Those of rank 0 are no survivors in any case.
  if (low == 0.0f) return {};
  if (rule == PruneRule::kKthValue) return {low, 0.0f, 0.0f};
  return {high, low, rank_from_top - above_high};
}

/// The channels that must not survive although their rank ties: all but the first num_ties of each row. Bits as in
/// find_run_bits; every lane must call.
template <int kHeadDim, MmaType kType>
__device__ void find_surplus_ties(std::uint32_t (&surplus)[kRuns], const Runs& x, const RowCut& cut) {
  constexpr int kRows = RunShape<kHeadDim>::kRows;
  constexpr int kRunsPerRow = RunShape<kHeadDim>::kRunsPerRow;
  const bool has_ties = cut.num_ties > 0.0f;
  constexpr std::uint32_t kNoTie = 0x7fffu;  // a NaN that no rank is
  const std::uint32_t rank = has_ties ? static_cast<std::uint32_t>(cut.tied) : kNoTie;
  std::uint32_t tied[kRows];
  int num_ties[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    tied[r] = __shfl_sync(kAllLanes, rank * 0x10001u, r * kRunParts / kRows, kRunParts);
    num_ties[r] = __shfl_sync(kAllLanes, static_cast<int>(cut.num_ties), r * kRunParts / kRows, kRunParts);
  }
  std::uint32_t ties[kRuns];
  find_run_bits<kType>(ties, [&](int j, int w) { return ones_equal<kType>(x[j][w], tied[j / kRunsPerRow]); });
  // A NaN equals nothing, so rows with too many of them, which are rare, need a second look.
  if (__any_sync(kAllLanes, rank > PackedPair<kType>::kInfinity && has_ties) != 0) {
    std::uint32_t nans[kRuns];
    find_run_bits<kType>(
        nans, [&](int j, int w) { return ones_above<kType>(x[j][w], PackedPair<kType>::kInfinity * 0x10001u); });
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      if (tied[j / kRunsPerRow] == (PackedPair<kType>::kInfinity + 1u) * 0x10001u) ties[j] = nans[j];
    }
  }
  std::uint32_t counts = 0;
#pragma unroll
  for (int j = 0; j < kRuns; ++j) counts |= static_cast<std::uint32_t>(__popc(ties[j])) << (8 * j);
  const PartSums sums = sum_parts(counts);
#pragma unroll
  for (int j = 0; j < kRuns; ++j) {
    int room = num_ties[j / kRunsPerRow] - byte_of(sums.before, j);
#pragma unroll
    for (int earlier = j / kRunsPerRow * kRunsPerRow; earlier < j; ++earlier) room -= byte_of(sums.all, earlier);
    surplus[j] = ties[j];
    for (int kept = 0; kept < room && surplus[j] != 0; ++kept) {
      surplus[j] &= ~(1u << (31 - __clz(static_cast<int>(surplus[j]))));  // the lowest channel stays
    }
  }
}

}  // namespace kvpack::cuda
