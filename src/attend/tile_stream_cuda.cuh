// The loop that both products share: a warp's tiles through load, copy, expand and multiply, 32 tiles a step.
#pragma once

#include <cstdint>

#include "attend/tile_expand_cuda.cuh"
#include "attend/tile_source_cuda.cuh"
#include "cuda/mma.cuh"

namespace kvpack::cuda {

inline constexpr int kAttendWarps = 8;
inline constexpr int kAttendThreads = kAttendWarps * kWarpLanes;
/// Thread blocks of a multiprocessor, so 128 registers a thread. Spills (nvcc 13.0, sm_90a): at 8 columns 8 bytes in the
/// value kernels of 8 and 16 bits and none elsewhere, at 16 columns 12 to 128 bytes everywhere.
inline constexpr int kResident = 2;
inline constexpr int kStepTiles = kWarpLanes;         // a tile a lane
inline constexpr float kLog2E = 1.4426950408889634f;  // logits are in units of log2
inline constexpr int kColumnsOfMma = 8;               // query columns of one tensor-core product

/// Shared memory of one warp.
template <int kBits>
struct alignas(128) WarpMemory {
  uint4 rows[kStepTiles * 8];  // 32 expanded tiles of 64 numbers, chunks of 8 permuted: store_chunk
  std::uint32_t columns[kBits == kUnquantizedBits ? 1 : 2][kLaneWords<kBits> * kWarpLanes];
};

/// Shared memory of a block: the table, then the warps.
template <int kBits>
constexpr int stream_memory_bytes() {
  return kTableWords<kBits> * 4 + kAttendWarps * static_cast<int>(sizeof(WarpMemory<kBits>));
}

/// D[4 x 16 elements][kTiles x 8 columns] of a warp, as mma_m16n8k16 leaves them.
template <int kTiles>
struct Products {
  float of[kTiles][4][4];

  __device__ void clear() {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) of[n][m][i] = 0.0f;
      }
    }
  }
};

/// The thread's number in its block, read once: the compiler would rather read it again than keep what follows from it.
__device__ inline int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

/// Where a lane's part of ldmatrix starts in rows: XORed with 32*m it is that of elements 16*m .. 16*m+15.
__device__ inline std::uint32_t first_matrix(std::uint32_t rows, std::uint32_t lane) {
  return rows + (lane / 16 * 8 + lane % 8) * 128 + ((lane / 8 % 2) ^ lane % 8) * 16;
}

/// products[element][column] += sum over the step's 32 tiles of tile[element] * b[tile][column]; b(k, n) gives the B
/// fragment of tiles 16*k .. 16*k+15 and columns 8*n .. 8*n+7.
template <int kTiles, typename Fragments>
__device__ inline void multiply_rows(Products<kTiles>& products, std::uint32_t matrices, MmaType type, Fragments b) {
  uint2 fragments[2][kTiles];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) fragments[k][n] = b(k, n);
  }
#pragma unroll
  for (std::uint32_t m = 0; m < 4; ++m) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      std::uint32_t a[4];
      load_matrices_transposed(a, (matrices ^ (32 * m)) + k * 16 * 128);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) mma_m16n8k16(products.of[n][m], a, fragments[k][n], type);
    }
  }
}

/// Which tiles a warp takes: `blocks` times 2^step_bits steps of 32 tiles one after another, then a jump.
struct TileWalk {
  std::int32_t blocks = 0;
  std::int32_t step_bits = 0;
  std::int32_t jump = 0;  // tiles between the end of a block's steps and the next one's start
};

/// Runs the steps of a walk. prepare(step) is called before the tiles of a step are expanded, to start loads; consume(step)
/// with the expanded tiles in memory.rows.
template <int kBits, typename Prepare, typename Consume>
__device__ inline void stream_tiles(TileSource source, const TileWalk& walk, WarpMemory<kBits>& memory,
                                    const std::uint32_t* table, int lane, MmaType type, Prepare prepare,
                                    Consume consume) {
  if (walk.blocks == 0) return;
  ExpandLane expand_lane;
  expand_lane.table = kBits == kUnquantizedBits ? table : table + lane % kTableCopies;
  expand_lane.row = shared_address(memory.rows) + lane * 128 + lane % 8 * 16;
  std::uint32_t* column = memory.columns[0] + lane;
  const std::uint32_t column_address = shared_address(column);
  constexpr int kColumnWords = sizeof(memory.columns[0]) / 4;
  const int last_step = (1 << walk.step_bits) - 1;
  const int num_steps = walk.blocks << walk.step_bits;
  const auto load_next = [&](int step) {
    return load_tile<kBits>(source, kStepTiles + ((step & last_step) == last_step ? walk.jump : 0));
  };
  LaneTile current = load_next(0);
  LaneTile next;
  if (num_steps > 1) next = load_next(1);
  if constexpr (kBits == kUnquantizedBits) {
    store_halves(source, current, load_halves(source, current), column);
  } else {
    copy_words<kBits>(source, current, column_address);
  }
  for (int step = 0; step < num_steps; ++step) {
    LaneTile after;
    if (step + 2 < num_steps) after = load_next(step + 2);
    const bool has_next = step + 1 < num_steps;
    if constexpr (kBits == kUnquantizedBits) {
      const HeldHalves held = has_next ? load_halves(source, next) : HeldHalves{};
      prepare(step);
      expand_tile<kBits>(expand_lane, current, column, type);
      __syncwarp();
      consume(step);
      store_halves(source, next, held, column);  // a lane reads its own column alone
    } else {
      const int parity = step & 1;
      if (has_next) {
        copy_words<kBits>(source, next, column_address + (parity ^ 1) * kColumnWords * 4);
      } else {
        commit_copies();  // an empty group keeps the count below right
      }
      prepare(step);
      wait_copies<1>();  // a lane reads its own column alone, so no barrier
      expand_tile<kBits>(expand_lane, current, column + parity * kColumnWords, type);
      __syncwarp();
      consume(step);
    }
    __syncwarp();
    current = next;
    next = after;
  }
}

}  // namespace kvpack::cuda
