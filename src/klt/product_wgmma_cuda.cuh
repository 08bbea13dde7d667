// The products of transform-coded rows on Hopper: the arithmetic of product_tensor_cuda.cuh (three products of bfloat16) by
// wgmma. Rows go from memory through registers, where they are centred and split unless the codec has split them, into the
// tensor cores; the matrix comes split, in the order of shared memory, from split_blocks_kernel by the copy engine.
#pragma once

#include <algorithm>
#include <type_traits>

#include "core/divide_up.h"
#include "cuda/bulk_copy.cuh"
#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "cuda/shared_store.cuh"
#include "cuda/wgmma_columns.cuh"
#include "klt/lane_inputs_cuda.cuh"
#include "klt/store_tile_cuda.cuh"

namespace kvpack::cuda {

namespace wgmma {

constexpr int kGroupRows = 64;  // rows of a warpgroup
constexpr int kGroupThreads = 128;
constexpr int kEightBytes = 1024;  // 8 columns x 64 inputs

/// A matrix after split_blocks_kernel: for every 64 inputs all columns, 8 of them in 1024 bytes as wgmma_columns.cuh wants.
struct SplitBlocks {
  const unsigned char* high;
  const unsigned char* low;
  std::int64_t step_bytes;  // from 64 inputs to the next 64
};

/// Where input `i` of 16 stands among the rows of an instruction: a lane's 4 neighbours are what it holds of A.
///
///   inputs  0  1  2  3 | 4  5  6  7 | 8 ...
///   rows    0  1  8  9 | 2  3 10 11 | 4 ...
__host__ __device__ constexpr int row_of_input(int i) { return i / 4 * 2 + i % 2 + i % 4 / 2 * 8; }

/// Splits a matrix [depth, columns]; zeros fill up the columns and the inputs.
///
/// Launch  x: blocks of 32 columns, y: blocks of 4 x 16 inputs; 32 x 4 threads
/// Work    a thread has 16 inputs of a column: two chunks of 16 bytes each
/// Reads   matrix once
/// Writes  high, low once
/// Needs   as many columns as a multiple of 32
__global__ void __launch_bounds__(128)
    split_blocks_kernel(const float* matrix, std::int32_t depth, std::int32_t columns, std::int64_t step_bytes,
                        unsigned char* high, unsigned char* low) {
  const auto column = static_cast<std::int32_t>(blockIdx.x * 32 + threadIdx.x);
  const auto quad = static_cast<std::int32_t>(threadIdx.y);
  const std::int32_t first = static_cast<std::int32_t>(blockIdx.y) * kDepth + 16 * quad;
  float values[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const bool is_inside = column < columns && first + i < depth;
    values[row_of_input(i)] = is_inside ? matrix[static_cast<std::int64_t>(first + i) * columns + column] : 0.0f;
  }
  const std::int64_t line = blockIdx.y * step_bytes + column / 8 * kEightBytes + column % 8 * 128;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    std::uint32_t highs[4];
    std::uint32_t lows[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const SplitPair pair = split_pair(values[8 * half + 2 * i], values[8 * half + 2 * i + 1]);
      highs[i] = pair.high;
      lows[i] = pair.low;
    }
    const std::int64_t place = line + 16 * ((2 * quad + half) ^ (column % 8));
    *reinterpret_cast<uint4*>(high + place) = make_uint4(highs[0], highs[1], highs[2], highs[3]);
    *reinterpret_cast<uint4*>(low + place) = make_uint4(lows[0], lows[1], lows[2], lows[3]);
  }
}

/// Places in a block's shared memory, all from one multiple of 1024 on.
template <int kColumns>
struct Stages {
  static constexpr std::uint32_t kSideBytes = kColumns * 128;
  static constexpr std::uint32_t kBytes = 2 * kSideBytes;  // high, low
  static constexpr int kCount = std::min<int>(196608 / kBytes, 16);
  static constexpr std::uint32_t kAllBytes = kCount * kBytes;
  static constexpr std::uint32_t kBarrierBytes = kCount * 16;  // full and empty
  std::uint32_t base;
  [[nodiscard]] __device__ std::uint32_t tile(int stage) const { return base + stage * kBytes; }
  [[nodiscard]] __device__ std::uint32_t full(int stage) const { return base + kAllBytes + 16 * stage; }
  [[nodiscard]] __device__ std::uint32_t empty(int stage) const { return full(stage) + 8; }
};

/// Which stage comes next, and how often all of them have been used.
template <int kCount>
struct Turn {
  int stage = 0;
  std::uint32_t parity = 0;
  __device__ void advance() {
    if (++stage == kCount) {
      stage = 0;
      parity ^= 1u;
    }
  }
};

/// What a product is about. Trivially copyable.
struct Shape {
  std::int32_t depth;
  std::int32_t inputs;  // that a row has in memory; those behind depth are zeros
  std::int32_t columns;
  std::int32_t column_blocks;
  std::int64_t tiles;
  bool is_plain;  // four inputs can be read at once
};

/// Brings the matrix, step after step of tile after tile. One thread.
template <int kColumns>
__device__ inline void bring_matrix(const SplitBlocks& matrix, const Shape& shape, const Stages<kColumns>& stages) {
  using Memory = Stages<kColumns>;
  Turn<Memory::kCount> turn;
  const std::int32_t steps = (shape.depth + kDepth - 1) / kDepth;
  for (std::int64_t tile = blockIdx.x; tile < shape.tiles; tile += gridDim.x) {
    std::int64_t place = tile % shape.column_blocks * Memory::kSideBytes;
#pragma unroll 1
    for (std::int32_t step = 0; step < steps; ++step, place += matrix.step_bytes, turn.advance()) {
      wait_barrier(stages.empty(turn.stage), turn.parity ^ 1u);
      const std::uint32_t full = stages.full(turn.stage);
      const std::uint32_t target = stages.tile(turn.stage);
      arrive_and_expect(full, Memory::kBytes);
      copy_bulk_async(target, matrix.high + place, Memory::kSideBytes, full);
      copy_bulk_async(target + Memory::kSideBytes, matrix.low + place, Memory::kSideBytes, full);
    }
  }
}

/// Begins the three products of 16 inputs: high * high, high * low, low * high, one after another into the same sums.
template <int kColumns>
__device__ inline void multiply_quad(float (&sums)[kColumns / 8][4], const std::uint32_t (&high)[4],
                                     const std::uint32_t (&low)[4], std::uint64_t high_tile, std::uint64_t low_tile,
                                     int adds) {
  wgmma_columns<kColumns>(sums, high, high_tile, adds);
  wgmma_columns<kColumns>(sums, high, low_tile, 1);
  wgmma_columns<kColumns>(sums, low, high_tile, 1);
}

/// Waits for all products that this warpgroup began.
__device__ inline void end_products() {
  wgmma_commit();
  wgmma_wait<0>();
}

/// Multiplies a step of 64 inputs, of which `rest` belong to the matrix, with a stage.
template <int kColumns>
__device__ inline void multiply_step(float (&sums)[kColumns / 8][4], const std::uint32_t (&high)[kQuads][4],
                                     const std::uint32_t (&low)[kQuads][4], std::uint32_t stage, std::int32_t rest,
                                     int adds) {
  const std::uint64_t high_tile = wgmma_columns_tile(stage);
  const std::uint64_t low_tile = wgmma_tile_behind(high_tile, Stages<kColumns>::kSideBytes);
  if (rest > kDepth - 16) {
    wgmma_begin();
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      multiply_quad<kColumns>(sums, high[j], low[j], wgmma_tile_behind(high_tile, 32 * j),
                              wgmma_tile_behind(low_tile, 32 * j), adds || j > 0);
    }
    end_products();
  } else {
#pragma unroll
    for (int j = 0; j < kQuads - 1; ++j) {  // the end of the depth; the compiler wants whole groups in a branch
      if (16 * j >= rest) break;
      wgmma_begin();
      multiply_quad<kColumns>(sums, high[j], low[j], wgmma_tile_behind(high_tile, 32 * j),
                              wgmma_tile_behind(low_tile, 32 * j), adds || j > 0);
      end_products();
    }
  }
  hold_numbers<kColumns / 8>(sums);
}

/// Rows of a tile that a lane has: `first` and 8 further.
template <typename T>
__device__ inline void find_sources(const ProductRows<T>& lhs, std::int64_t first, const T* (&sources)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const std::int64_t row = first + 8 * r;
    sources[r] = row < lhs.span.rows ? token_of<const T>(lhs.matrix, lhs.span, row) : nullptr;
  }
}

/// Multiplies a warpgroup's rows of tile after tile.
template <typename T, typename Store, int kGroups, int kColumns>
__device__ inline void multiply_tiles(const ProductRows<T>& lhs, const Shape& shape, const Store& store,
                                      const Stages<kColumns>& stages, const float* mean) {
  const int thread = static_cast<int>(threadIdx.x);
  const std::int32_t steps = (shape.depth + kDepth - 1) / kDepth;
  const int lane = thread % kWarpLanes;
  const int own_row = thread / kWarpLanes * 16 + lane / 4;
  const int own_input = lane % 4 * 4;
  const std::int64_t stride = lhs.matrix.channel_stride;
  const auto row_of = [&](std::int64_t tile) { return tile / shape.column_blocks * (kGroups * kGroupRows) + own_row; };
  LaneInputs<T> inputs;
  const T* sources[2];
  find_sources(lhs, row_of(blockIdx.x), sources);
  inputs.fetch(sources, stride, own_input, shape.inputs, shape.is_plain);
  bool waits_for_other = kGroups == 2;
  Turn<Stages<kColumns>::kCount> turn;
  for (std::int64_t tile = blockIdx.x; tile < shape.tiles; tile += gridDim.x) {
    float sums[kColumns / 8][4] = {};
    for (std::int32_t step = 0; step < steps; ++step, turn.advance()) {
      std::uint32_t high[kQuads][4];
      std::uint32_t low[kQuads][4];
      inputs.split(mean + step * kDepth + own_input, high, low);
      const bool ends = step + 1 == steps;
      if (ends) find_sources(lhs, row_of(tile + gridDim.x), sources);
      inputs.fetch(sources, stride, ends ? own_input : (step + 1) * kDepth + own_input, shape.inputs, shape.is_plain);
      if (waits_for_other && thread >= kGroupThreads) sync_some_threads(1, 2 * kGroupThreads);
      wait_barrier(stages.full(turn.stage), turn.parity);
      multiply_step<kColumns>(sums, high, low, stages.tile(turn.stage), shape.depth - step * kDepth, step > 0);
      if (lane == 0) arrive(stages.empty(turn.stage));
      if (waits_for_other && thread < kGroupThreads) sync_some_threads(1, 2 * kGroupThreads);
      waits_for_other = false;
    }
    store_tile(sums, row_of(tile), lhs.span.rows, static_cast<std::int32_t>(tile % shape.column_blocks) * kColumns,
               shape.columns, store);
  }
}

/// Rows that are split already have no mean.
template <typename T>
constexpr bool kCentres = !std::is_same_v<T, SplitFloat>;

/// Bytes of shared memory for the means that a product reads for every tile: one that is subtracted, one that is added.
template <typename T, typename Store>
std::int64_t mean_bytes(std::int32_t depth, std::int32_t padded_columns) {
  return 4 * ((kCentres<T> ? round_up(depth, kDepth) : 0) + (Store::kAddsMean ? padded_columns : 0));
}

/// A mean into shared memory, zeros behind it; null stands for zeros.
__device__ inline void copy_mean(const float* mean, std::int32_t count, std::int64_t padded, float* shared) {
  for (auto i = static_cast<std::int32_t>(threadIdx.x); i < padded; i += static_cast<std::int32_t>(blockDim.x)) {
    shared[i] = mean != nullptr && i < count ? mean[i] : 0.0f;
  }
}

/// Multiplies rows with a split matrix.
///
///   block        kGroups x 64 rows x kColumns; a warpgroup more brings the matrix
///   warpgroup    | row's 64 inputs -> registers, - mean, high | low (or both from memory) | x stage: high | low -> sums
///   two groups   0 multiplies | 0 splits, 1 multiplies | 0 multiplies, 1 splits | ... half a step apart from the start on
///
/// Launch  as many blocks as multiprocessors, or fewer; kGroups * 128 + 128 threads
/// Work    tiles blockIdx.x, blockIdx.x + gridDim.x, ...; those of the same rows are neighbours, so that rows come from the cache
/// Reads   each row once per block of columns, the matrix once per block of rows
/// Writes  each output once, through `store`
/// Needs   Stages::kAllBytes + kBarrierBytes + 1024 + mean_bytes() of dynamic shared memory
template <typename T, typename Store, int kGroups, int kColumns>
__global__ void __launch_bounds__((kGroups + 1) * kGroupThreads, 1)
    product_kernel(ProductRows<T> lhs, SplitBlocks matrix, Shape shape, Store store) {
#if KVPACK_HAS_WGMMA
  using Memory = Stages<kColumns>;
  extern __shared__ __align__(16) unsigned char shared[];
  const std::uint32_t address = shared_address(shared);
  const std::uint32_t gap = (1024u - address % 1024u) % 1024u;
  const Memory stages{address + gap};
  auto* mean = reinterpret_cast<float*>(shared + gap + Memory::kAllBytes + Memory::kBarrierBytes);
  const int thread = static_cast<int>(threadIdx.x);
  if constexpr (kCentres<T>) copy_mean(lhs.mean, shape.depth, round_up(shape.depth, kDepth), mean);
  if constexpr (Store::kAddsMean) {
    float* added = mean + (kCentres<T> ? round_up(shape.depth, kDepth) : 0);
    copy_mean(store.mean, shape.columns, shape.column_blocks * kColumns, added);
    store.mean = added;
  }
  if (thread == 0) {
    for (int stage = 0; stage < Memory::kCount; ++stage) {
      init_barrier(stages.full(stage), 1);
      init_barrier(stages.empty(stage), kGroups * kGroupThreads / kWarpLanes);
    }
    show_barriers();
  }
  __syncthreads();
  if (thread >= kGroups * kGroupThreads) {
    if constexpr (kGroups == 2) give_up_registers<24>();
    if (thread == kGroups * kGroupThreads) bring_matrix(matrix, shape, stages);
  } else {
    if constexpr (kGroups == 2) take_registers<240>();
    multiply_tiles<T, Store, kGroups>(lhs, shape, store, stages, mean);
  }
#else
  __trap();
#endif
}

}  // namespace wgmma

}  // namespace kvpack::cuda
