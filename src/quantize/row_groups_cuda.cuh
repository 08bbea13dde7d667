// Per-token quantisation in groups of channels that lie side by side, aligned: a few lanes share a group. The rules are
// quantize/uniform.h and quantize/codebook.h.
#pragma once

#include "quantize/rows_cuda.cuh"

namespace kvpack::cuda {

inline constexpr int kGroupPacks = 4;    // of a lane, on their way together
inline constexpr int kGroupsAtOnce = 8;  // whose squares are joined together

/// Elements that a warp takes at a time.
template <typename T>
inline constexpr int kGroupSpan = kGroupPacks * kWarpLanes * kPack<T>;

/// Joins the strands of eight vectors, lane i holding strand i of each: join_strands() of all, in nine shuffles where forty
/// would do it one by one. At each distance a lane passes on the half of its vectors that the other half of lanes keeps:
///   distance 16   lanes 0 ... 15 keep vectors 0 1 2 3, lanes 16 ... 31 keep 4 5 6 7; then two each, then one
__device__ inline float join_eight(float (&sums)[kGroupsAtOnce], int lane) {
#pragma unroll
  for (int half = kGroupsAtOnce / 2; half > 0; half /= 2) {
    const int distance = 4 * half;
    const bool keeps_upper = (lane & distance) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float kept = keeps_upper ? sums[i + half] : sums[i];
      sums[i] = kept + __shfl_xor_sync(kAllLanes, keeps_upper ? sums[i] : sums[i + half], distance);
    }
  }
  float sum = sums[0] + __shfl_xor_sync(kAllLanes, sums[0], 2);
  sum = sum + __shfl_xor_sync(kAllLanes, sum, 1);
  return sum;
}

/// A lane that holds vector `index` of join_eight().
__device__ inline int lane_of_joined(int index) { return (index & 4) * 4 + (index & 2) * 4 + (index & 1) * 4; }

/// Root mean squares of the groups that a warp's packs hold, qs[p] that of this lane's group in pack p. Strands run across
/// lanes, so elements pass through `staged` [kGroupSpan], of this warp; what lies behind the row's end is 0.
template <typename T>
__device__ void rms_of_groups(const Pack<T> (&packs)[kGroupPacks], T* staged, int group, int span, int lane,
                              float (&qs)[kGroupPacks]) {
  const int lanes = group / kPack<T>;
#pragma unroll
  for (int p = 0; p < kGroupPacks; ++p) {
    *reinterpret_cast<Pack<T>*>(staged + (p * kWarpLanes + lane) * kPack<T>) = packs[p];
    qs[p] = 0.0f;
  }
  __syncwarp();
  for (int first = 0; first * group < span; first += kGroupsAtOnce) {
    float sums[kGroupsAtOnce];
#pragma unroll
    for (int g = 0; g < kGroupsAtOnce; ++g) {
      float sum = 0.0f;
      const int start = (first + g) * group;
      const int end = min(start + group, kGroupSpan<T>);
#pragma unroll 4
      for (int i = start + lane; i < end; i += kStrands) {
        const float value = element_value(staged[i]);
        sum = sum + value * value;
      }
      sums[g] = sum;
    }
    const float sum = join_eight(sums, lane);
    const int own_start = (first + lane / 16 * 4 + lane / 8 % 2 * 2 + lane / 4 % 2) * group;
    const float own_qs = make_rms_grid(sum, min(group, max(span - own_start, 1))).qs;
#pragma unroll
    for (int p = 0; p < kGroupPacks; ++p) {
      const int index = (p * kWarpLanes + lane) / lanes - first;
      const float found = __shfl_sync(kAllLanes, own_qs, lane_of_joined(index & (kGroupsAtOnce - 1)));
      if (index >= 0 && index < kGroupsAtOnce) qs[p] = found;
    }
  }
  __syncwarp();  // the next packs go there
}

/// Quantises groups of kPack * 2^k channels of rows: 2^k lanes of one pack share a group.
///
///   groups of 64 halves      pack 0: lanes 0 ... 7 group 0, lanes 8 ... 15 group 1 ...     pack 1: groups 4 ... 7     ...
///
/// Launch  any number of blocks of kRowThreads
/// Work    a warp takes kGroupSpan channels of a row: ranges by shuffles, squares by strands
/// Reads   x of the quantised tokens once
/// Writes  out of the quantised tokens, may be x if *findings has been through all of x; kSomewhere into *findings
/// Needs   as check_rows_kernel; no outlier quantiles, no calibrated grids
template <bool kCodebook, bool kRms, typename T>
__global__ void __launch_bounds__(kRowThreads, 4)
    simulate_row_groups_kernel(VectorPlan<T> plan, const __grid_constant__ CodebookTable codebook, Findings* findings) {
  __shared__ float boundaries[kCodebook ? kMaxCentroids : 1];
  __shared__ float values[kCodebook ? kMaxCentroids : 1];
  __shared__ alignas(16) T staged[kRms ? kRowWarps : 1][kRms ? kGroupSpan<T> : 1];
  if (plan.x == plan.out && findings->first_bad != ~Counter{0}) return;
  const FastRule rule = load_rule(codebook, plan.options, boundaries, values);
  __syncthreads();
  constexpr int kStep = kWarpLanes * kPack<T>;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int group = static_cast<int>(plan.group);
  const std::int64_t parts = divide_up(plan.channels, kGroupSpan<T>);
  float finite = 0.0f;
  for (std::int64_t task = static_cast<std::int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpLanes;
       task < (plan.end_token - plan.first_token) * parts; task += static_cast<std::int64_t>(gridDim.x) * kRowWarps) {
    const std::int64_t t = plan.first_token + task / parts;
    const std::int64_t first = task % parts * kGroupSpan<T>;
    const int span = static_cast<int>(min(plan.channels - first, static_cast<std::int64_t>(kGroupSpan<T>)));
    const T* x = plan.x + t * plan.x_token_stride + first;
    T* out = plan.out + t * plan.out_token_stride + first;
    Pack<T> packs[kGroupPacks] = {};
#pragma unroll
    for (int p = 0; p < kGroupPacks; ++p) {
      const int c = p * kStep + lane * kPack<T>;
      if (c < span) packs[p] = load_pack(x + c);
    }
    float qs[kGroupPacks] = {};
    if constexpr (kRms) rms_of_groups(packs, staged[threadIdx.x / kWarpLanes], group, span, lane, qs);
#pragma unroll
    for (int p = 0; p < kGroupPacks; ++p) {
      if (p * kStep >= span) break;
      const int c = p * kStep + lane * kPack<T>;
      const bool is_active = c < span;
      VectorGrid grid{qs[p], 0.0f, HUGE_VALF, -HUGE_VALF};
      if constexpr (kRms) {
        finite = finite_sum(packs[p], finite);
      } else {
        PackRange<T> range;
        range.clear();
        if (is_active) range.add(packs[p]);
        float low = HUGE_VALF;
        float high = -HUGE_VALF;
        add_whole_pack(range, low, high);
        grid = range_grid_of_lanes(low, high, group / kPack<T>, plan.options, findings);
      }
      if (!is_active) continue;
      if (suits_reciprocal(grid.qs, grid.offset)) {
        const FastGrid grids[1] = {{grid.qs, grid.offset, 1.0f / grid.qs}};
        simulate_pack<kCodebook>(packs[p], grids, rule);
        store_pack(out + c, packs[p]);
      } else {
        simulate_pack_plainly<kCodebook>(x + c, out + c, rule, [&grid](int) { return grid; });
      }
    }
  }
  if constexpr (kRms) tell_bad(!(finite == 0.0f), findings);
}

}  // namespace kvpack::cuda
