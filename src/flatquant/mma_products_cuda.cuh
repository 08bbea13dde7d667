// Both products of a token by mma.sync, 16 rows of Y a warp (sm_80 and later).
#pragma once

#include <cstdint>

#include "flatquant/token_tiles_cuda.cuh"

namespace kvpack::cuda {

/// kSteps: registers for left of up to 16*kSteps rows, or 0: left stays in shared memory.
template <MmaType kElement, int kColumnTiles, int kSteps>
struct MmaProducts {
  static constexpr bool kExists = true;
  static constexpr MmaType kType = kElement;
  static constexpr int kTiles = kColumnTiles;
  static constexpr int kThreads = kTiles > 16 ? 256 : (kTiles == 16 && kSteps > 0 ? 384 : 512);
  static constexpr bool kKeepsLeft = kSteps == 0;
  static constexpr int kHeld = kKeepsLeft ? 1 : kSteps;

  std::uint32_t left[kHeld][4];  // A fragments of left^T, rows 16*warp ..
  std::uint32_t left_tile;
  int lane;
  int strip;

  /// Fragment k of this warp's rows of left^T, from left itself: the transposed load exchanges rows and columns.
  __device__ void load_left(const KronKernelParams& params, int k, std::uint32_t (&a)[4]) const {
    const int row = 16 * k + lane / 16 * 8 + lane % 8;
    const int chunk = 2 * strip + lane / 8 % 2;
    load_matrices_transposed(a, left_tile + params.left_tile.offset(row, chunk));
  }

  __device__ MmaProducts(const KronKernelParams& params, const Group& group, std::uint32_t kept_left,
                         std::uint32_t loaded_left)
      : left_tile(kKeepsLeft ? kept_left : loaded_left),
        lane(static_cast<int>(threadIdx.x) % kWarpLanes),
        strip(group.warp) {
    if constexpr (!kKeepsLeft) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        if (16 * k < params.left_tile.rows) load_left(params, k, left[k]);
      }
    }
  }

  __device__ static void show_memory() {}

  /// B fragments of 16 rows and two groups of 8 columns of a tile.
  __device__ void load_pair(TileShape shape, std::uint32_t tile, int k, int group_of_8, std::uint32_t (&b)[4]) const {
    const int row = 16 * k + lane % 16;
    load_matrices_transposed(b, tile + shape.offset(row, group_of_8 + lane / 16));
  }

  /// Z of 16 columns as an A fragment: what the lanes hold of two groups of 8 columns is what they must hold of 16.
  __device__ void multiply_left(const KronKernelParams& params, std::uint32_t x, int chunk,
                                std::uint32_t (&z)[4]) const {
    float sums[2][4] = {};
    const auto step = [&](int k, const std::uint32_t (&a)[4]) {
      std::uint32_t b[4];
      load_pair(params.x_tile, x, k, 2 * chunk, b);
      mma_m16n8k16(sums[0], a, make_uint2(b[0], b[1]), kType);
      mma_m16n8k16(sums[1], a, make_uint2(b[2], b[3]), kType);
    };
    if constexpr (kKeepsLeft) {
      for (int k = 0; 16 * k < params.x_tile.rows; ++k) {
        std::uint32_t a[4];
        load_left(params, k, a);
        step(k, a);
      }
    } else {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        if (16 * k < params.x_tile.rows) step(k, left[k]);
      }
    }
    z[0] = pair_near<kType>(sums[0][0], sums[0][1]);
    z[1] = pair_near<kType>(sums[0][2], sums[0][3]);
    z[2] = pair_near<kType>(sums[1][0], sums[1][1]);
    z[3] = pair_near<kType>(sums[1][2], sums[1][3]);
  }

  __device__ void multiply(const KronKernelParams& params, std::uint32_t x, std::uint32_t right,
                           float (&y)[kTiles][4]) const {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) y[t][i] = 0.0f;
    }
#pragma unroll 1
    for (int chunk = 0; 16 * chunk < params.columns; ++chunk) {
      std::uint32_t z[4];
      multiply_left(params, x, chunk, z);
#pragma unroll
      for (int t = 0; t < kTiles; t += 2) {
        std::uint32_t b[4];
        load_pair(params.right_tile, right, chunk, t, b);
        mma_m16n8k16(y[t], z, make_uint2(b[0], b[1]), kType);
        mma_m16n8k16(y[t + 1], z, make_uint2(b[2], b[3]), kType);
      }
    }
  }
};

}  // namespace kvpack::cuda
