// The rule of magnitude pruning on the GPU, for every kernel that prunes: what entries are ranked by and where a row is
// cut. Counts of ranks decide each bit of the threshold, as in prune/magnitude_cpu.h; nothing is sorted.
#pragma once

#include <cstdint>

#include "cuda/reduce.cuh"
#include "kvpack/prune.h"

namespace kvpack::cuda {

/// What entries are ranked by: |x| * score as an integer, every NaN above infinity.
__device__ inline std::uint32_t magnitude_rank(float value, const float* score) {
  const float scaled = score == nullptr ? value : value * *score;
  return min(__float_as_uint(scaled) & 0x7fffffffu, 0x7f800001u);
}

/// Entries of rank >= at_least survive, and of those of rank == at_least - 1 the first num_ties.
struct Cut {
  std::uint32_t at_least;
  std::int64_t num_ties;
};

/// The cut that keeps the rank_from_top largest ranks of a row. count(candidate) gives how many ranks are at least the
/// candidate, the same number to every thread; all_bits is the OR of all ranks, and more bits do no harm.
///   ranks 5 9 1 7, want the 2nd largest: candidate 8 has 1, too few; 4 has 3, too many: bit set; 6 has 2: done
/// A bit that no rank has stays 0 without a count: a candidate with it is reached only by ranks above the whole prefix,
/// which are too few. Rows that end in a tie go down to the last bit; float16 ranks have 13 low zeros to skip.
template <typename Count>
__device__ Cut find_cut(std::uint32_t all_bits, std::int64_t rank_from_top, PruneRule rule, Count count) {
  std::uint32_t threshold = 0;
  while (all_bits != 0) {
    const std::uint32_t bit = 1u << (31 - __clz(static_cast<int>(all_bits)));
    all_bits ^= bit;
    const std::uint32_t candidate = threshold | bit;
    const std::int64_t reached = count(candidate);
    if (reached == rank_from_top) return {candidate, 0};
    if (reached > rank_from_top) threshold = candidate;
  }
  // The threshold is the wanted rank itself, and it is shared: several entries tie there.
  if (rule == PruneRule::kKthValue) return {threshold, 0};
  return {threshold + 1, rank_from_top - count(threshold + 1)};
}

/// find_cut of a row that a warp holds, kSlots ranks a lane; `own_bits` is the OR of the lane's. All lanes call.
template <int kSlots>
__device__ Cut find_warp_cut(const std::uint32_t (&ranks)[kSlots], std::uint32_t own_bits, std::int64_t rank_from_top,
                             PruneRule rule) {
  const auto count_at_least = [&ranks](std::uint32_t candidate) {
    std::uint32_t count = 0;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) count += ranks[s] >= candidate;
    return static_cast<std::int64_t>(warp_sum(count));
  };
  return find_cut(warp_or(own_bits), rank_from_top, rule, count_at_least);
}

}  // namespace kvpack::cuda
