// Both products of a token by Hopper's wgmma: 64 rows of Y a warpgroup, one or two of them a token.
#pragma once

#include <cstdint>

#include "cuda/wgmma.cuh"
#include "flatquant/token_tiles_cuda.cuh"

namespace kvpack::cuda {

/// kBlocks: N in blocks of 64 columns; kSteps: M in steps of 16 rows, all of which are multiplied, so padding must be zeros.
template <MmaType kElement, int kBlocks, int kSteps>
struct WgmmaProducts {
  static constexpr bool kExists = KVPACK_HAS_WGMMA;
  static constexpr MmaType kType = kElement;
  static constexpr int kTiles = 8 * kBlocks;
  // As many registers as 32 or 64 columns of Z, Y and left need: 128, 168 or 255 a thread.
  static constexpr int kThreads = kBlocks == 1 ? 512 : (kBlocks == 2 && kSteps <= 4 ? 384 : 256);
  static constexpr bool kKeepsLeft = false;
  static constexpr int kGroupWarps = kSteps <= 4 ? 4 : 8;
  static constexpr int kStepBytes = 16 * kRowBytes;

  std::uint32_t left[kSteps][4];  // A fragments of left^T, rows 16*warp ..

  __device__ WgmmaProducts(const KronKernelParams& params, const Group& group, std::uint32_t,
                           std::uint32_t loaded_left) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int row = 16 * k + lane / 16 * 8 + lane % 8;
      const int chunk = 2 * group.warp + lane / 8 % 2;
      load_matrices_transposed(left[k], loaded_left + params.left_tile.offset(row, chunk));
    }
  }

  __device__ static void show_memory() { show_shared_to_wgmma(); }

  /// Begins Z of 64 columns.
  __device__ void begin_left(std::uint64_t x, int block, float (*z)[4]) const {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      wgmma_m64k16<kType, 8>(z, left[k], wgmma_tile_behind(x, (block * kSteps + k) * kStepBytes), k > 0);
    }
  }

  /// Begins what 64 columns of Z add to Y.
  __device__ static void begin_right(std::uint64_t right, int block, const std::uint32_t (&z)[4][4], float (*y)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        const std::uint64_t tile = wgmma_tile_behind(right, (4 * (n * kBlocks + block) + k) * kStepBytes);
        wgmma_m64k16<kType, 8>(y + 8 * n, z[k], tile, block > 0 || k > 0);
      }
    }
  }

  /// Z of one block of columns is multiplied with right while that of the next block is made.
  __device__ void multiply(const KronKernelParams&, std::uint32_t x, std::uint32_t right, float (&y)[kTiles][4]) const {
    const std::uint64_t x_tile = wgmma_tile(x, kSteps * kStepBytes);
    const std::uint64_t right_tile = wgmma_tile(right, 4 * kBlocks * kStepBytes);
    float z[8][4];
    wgmma_begin();
    begin_left(x_tile, 0, z);
    wgmma_commit();
    wgmma_wait<0>();
    hold_numbers<8>(z);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      // What the lanes hold of two groups of 8 columns of a result is what they must hold of 16 as a factor.
      std::uint32_t rounded[4][4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        rounded[k][0] = pair_near<kType>(z[2 * k][0], z[2 * k][1]);
        rounded[k][1] = pair_near<kType>(z[2 * k][2], z[2 * k][3]);
        rounded[k][2] = pair_near<kType>(z[2 * k + 1][0], z[2 * k + 1][1]);
        rounded[k][3] = pair_near<kType>(z[2 * k + 1][2], z[2 * k + 1][3]);
      }
      wgmma_begin();
      if (block + 1 < kBlocks) begin_left(x_tile, block + 1, z);
      begin_right(right_tile, block, rounded, y);
      wgmma_commit();
      wgmma_wait<0>();
      hold_numbers<8>(z);
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) hold_numbers<8>(y + 8 * n);
    }
  }
};

}  // namespace kvpack::cuda
