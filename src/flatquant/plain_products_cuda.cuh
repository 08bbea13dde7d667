// Products of small matrices without tensor cores, for float32, for sides that the fast kernels do not have and for old GPUs.
#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace kvpack::cuda {

inline constexpr int kPlainThreads = 256;

/// Calls store(i, j, sum over k < steps of a(k, i) * b(k, j)) once for each i < rows and j < columns, float32 in the order of k.
/// A warp takes 8 rows x 64 columns: a() is the same for all its lanes, b() is of neighbours.
template <typename A, typename B, typename Store>
__device__ void multiply_plainly(int rows, int columns, int steps, A a, B b, Store store) {
  constexpr int kRows = 8;
  constexpr int kWarps = kPlainThreads / kWarpLanes;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int across = (columns + 2 * kWarpLanes - 1) / (2 * kWarpLanes);
  const int pieces = (rows + kRows - 1) / kRows * across;
  for (int piece = static_cast<int>(threadIdx.x) / kWarpLanes; piece < pieces; piece += kWarps) {
    const int row = piece / across * kRows;
    const int first = piece % across * 2 * kWarpLanes + lane;
    const int second = first + kWarpLanes;
    float sums[kRows][2] = {};
    for (int k = 0; k < steps; ++k) {
      // What lies behind the ends is the last row or column once more; nobody stores it.
      const float left = b(k, min(first, columns - 1));
      const float right = b(k, min(second, columns - 1));
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float factor = a(k, min(row + r, rows - 1));
        sums[r][0] = __fmaf_rn(factor, left, sums[r][0]);
        sums[r][1] = __fmaf_rn(factor, right, sums[r][1]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r >= rows) break;
      if (first < columns) store(row + r, first, sums[r][0]);
      if (second < columns) store(row + r, second, sums[r][1]);
    }
  }
}

}  // namespace kvpack::cuda
