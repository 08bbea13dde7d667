// Packing survivors to codes of 1 or 2 bits without leaving the registers: every element of a run gets a code, survivor
// or not, and the survivors' ones are shifted together. The tile's four lanes join their pieces in shared memory.
#pragma once

#include <cstdint>

#include "formats/tile64/codes_cuda.cuh"
#include "formats/tile64/pack_cuda.cuh"
#include "formats/tile64/prune_runs_cuda.cuh"

namespace kvpack::cuda {

/// Maxima of four numbers' halves over the lanes that share tiles; the lane of part j gets those of tile j.
template <typename Larger>
__device__ std::uint32_t join_parts(const std::uint32_t (&of_runs)[kRuns], Larger larger) {
  const int part = static_cast<int>(threadIdx.x) % kRunParts;
  const bool is_odd = (part & 1) != 0;
  const bool is_upper = (part & 2) != 0;
  const std::uint32_t from_low = __shfl_xor_sync(kAllLanes, is_odd ? of_runs[0] : of_runs[1], 1);
  const std::uint32_t from_high = __shfl_xor_sync(kAllLanes, is_odd ? of_runs[2] : of_runs[3], 1);
  const std::uint32_t low = larger(is_odd ? of_runs[1] : of_runs[0], from_low);
  const std::uint32_t high = larger(is_odd ? of_runs[3] : of_runs[2], from_high);
  const std::uint32_t other = __shfl_xor_sync(kAllLanes, is_upper ? low : high, 2);
  return larger(is_upper ? high : low, other);
}

/// The grid of tile `part`, from its four lanes. Elements that do not survive are zeros, which stand aside only between
/// survivors of both signs; where all have one, a second look finds the survivor next to zero.
template <MmaType kType>
__device__ tile64_q::Grid runs_grid(const Runs& x, int count, int bits) {
  constexpr std::uint32_t kSigns = 0x80008000u;
  std::uint32_t spans[kRuns];  // largest, then minus smallest
#pragma unroll
  for (int j = 0; j < kRuns; ++j) {
    std::uint32_t high = x[j][0];
    std::uint32_t low = x[j][0];
#pragma unroll
    for (int w = 1; w < kRunWords; ++w) {
      high = pair_max<kType>(high, x[j][w]);
      low = pair_min<kType>(low, x[j][w]);
    }
    low ^= kSigns;
    spans[j] = pair_max<kType>(__byte_perm(high, low, 0x5410), __byte_perm(high, low, 0x7632));
  }
  const std::uint32_t span = join_parts(spans, [](std::uint32_t a, std::uint32_t b) { return pair_max<kType>(a, b); });
  float high = lower_value<kType>(span);
  float low = -upper_value<kType>(span);
  const bool has_one_sign = count > 0 && (high == 0.0f || low == 0.0f);
  if (__any_sync(kAllLanes, has_one_sign) != 0) {
    std::uint32_t smallest[kRuns];
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      smallest[j] = 0x7fff7fffu;
#pragma unroll
      for (int w = 0; w < kRunWords; ++w) {  // zeros become NaNs, which are not looked at
        const std::uint32_t magnitudes = (x[j][w] | mask_equal<kType>(x[j][w], 0u)) & 0x7fff7fffu;
        smallest[j] = pair_min_known<kType>(smallest[j], magnitudes);
      }
      smallest[j] = pair_min_known<kType>(smallest[j], smallest[j] >> 16 | smallest[j] << 16);
    }
    const float near_zero = lower_value<kType>(
        join_parts(smallest, [](std::uint32_t a, std::uint32_t b) { return pair_min_known<kType>(a, b); }));
    if (has_one_sign && high == 0.0f) high = -near_zero;
    if (has_one_sign && low == 0.0f) low = near_zero;
  }
  return count == 0 ? tile64_q::Grid{} : tile64_q::grid_of(low, high, bits);
}

/// Writes the codes of a lane's runs to `words` of each tile, which are zeros: run j's tile has its words at
/// words[tile_of(j)], and before's byte j survivors in lanes of lower part.
template <MmaType kType, int kBits, typename TileOf>
__device__ void join_codes(const Runs& x, const std::uint32_t (&bits)[kRuns], std::uint32_t before, uint2 own_steps,
                           uint4* words, TileOf tile_of) {
#pragma unroll
  for (int j = 0; j < kRuns; ++j) {
    const uint2 steps = make_uint2(__shfl_sync(kAllLanes, own_steps.x, j, kRunParts),
                                   kBits == 1 ? 0u : __shfl_sync(kAllLanes, own_steps.y, j, kRunParts));
    std::uint32_t codes = 0;  // the last one in the highest bits
#pragma unroll
    for (int w = 0; w < kRunWords; ++w) {
      const std::uint32_t pair = pair_codes<kType, kBits>(x[j][w], steps);
      if ((bits[j] >> (15 - 2 * w) & 1u) != 0) codes = __funnelshift_r(codes, pair, kBits);
      if ((bits[j] >> (14 - 2 * w) & 1u) != 0) codes = __funnelshift_r(codes, pair >> 16, kBits);
    }
    const std::uint32_t aligned = __funnelshift_rc(codes, 0u, tile64_q::kWordBits - kBits * __popc(bits[j]));
    const std::uint32_t place = static_cast<std::uint32_t>(byte_of(before, j)) * kBits;
    auto* target = reinterpret_cast<std::uint32_t*>(words + tile_of(j)) + place / tile64_q::kWordBits;
    const std::uint32_t spilled = __funnelshift_l(aligned, 0u, place % tile64_q::kWordBits);
    atomicOr(target, aligned << place % tile64_q::kWordBits);
    if (spilled != 0) atomicOr(target + 1, spilled);
  }
}

}  // namespace kvpack::cuda
