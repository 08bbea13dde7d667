// Where X, left and right lie in shared memory for the tensor cores, and how they get there.
#pragma once

#include <cstdint>

#include "cuda/async_copy.cuh"
#include "cuda/mma.cuh"
#include "cuda/packed_pair.cuh"
#include "cuda/reduce.cuh"
#include "cuda/shared_store.cuh"
#include "flatquant/implementations.h"

namespace kvpack::cuda {

inline constexpr int kChunk = 8;       // 16-bit numbers in 16 bytes
inline constexpr int kRowBytes = 128;  // a tile's row: 64 numbers
inline constexpr int kBlockColumns = 64;
inline constexpr int kTileAlignment = 1024;  // of shared memory, for the tensor cores' addresses
inline constexpr int kMaxStages = 3;         // tokens on their way at a time
inline constexpr int kMaxWarps = 16;

/// A matrix of 16-bit numbers in shared memory: blocks of 64 columns, each with all rows of 128 bytes, whose 16-byte chunks are
/// XORed with the row so that neither copies nor ldmatrix meet a bank twice:
///   row 0   chunk 0 1 2 3 4 5 6 7        row 1   chunk 1 0 3 2 5 4 7 6        row 8 as row 0
struct TileShape {
  std::int32_t rows = 0;    // a multiple of 16
  std::int32_t blocks = 0;  // of 64 columns

  KVPACK_HOST_DEVICE constexpr std::int32_t bytes() const { return rows * blocks * kRowBytes; }
  /// Offset of chunk `chunk` of row `row`.
  KVPACK_HOST_DEVICE constexpr std::int32_t offset(int row, int chunk) const {
    return (chunk / 8 * rows + row) * kRowBytes + ((chunk % 8) ^ (row % 8)) * 16;
  }
};

/// One launch. Bytes of shared memory: right, left (where it stays there), vectors, stages of each group, then what groups
/// exchange.
struct KronKernelParams {
  KronQuantizeProblem problem;
  KronOutputData outputs[kMaxKronOutputs] = {};  // those of the problem: std::array has no [] on a device
  std::int32_t rows = 0;                         // M
  std::int32_t columns = 0;                      // N
  TileShape x_tile;
  TileShape right_tile;
  TileShape left_tile;
  std::int32_t group_warps = 0;  // warps of one token
  std::int32_t groups = 0;       // tokens that a thread block works on at a time
  std::int32_t stages = 0;
  std::int32_t stage_bytes = 0;  // one x tile, or two: copies_second
  std::int32_t chunks = 0;       // of 16 bytes in a row of X, the last one perhaps in part
  std::int32_t row_step = 0;     // the threads of a group divided by that
  std::int32_t chunk_step = 0;   // and what is left
  std::int32_t vectors = 0;      // x tiles that hold weight and diagonal
  std::int32_t left_bytes = 0;   // of left where it stays in shared memory
  std::int32_t tiles_bytes = 0;  // of everything up to the end of the stages
  bool copies_second =
      false;  // kSiluMul: `second` has a tile of its own in each stage; else it is read when it is needed
  bool loads_chunks = false;      // rows of x may be copied 16 bytes at a time
  bool copies_columns = false;    // and a thread always brings the same chunk of rows that are a multiple of 8 apart
  bool stores_words = false;      // a word of codes never crosses a row of X, and codes are aligned to it
  bool stores_vectors = false;    // all of a thread's codes lie together, aligned to 16 bytes
  bool needs_both_sides = false;  // largest and smallest value, not only the largest magnitude
  bool clamps = false;
};

/// What the warps of a token tell each other; behind the tiles, one per group.
struct GroupExchange {
  std::uint32_t highest[kMaxWarps];  // bits of numbers that are not negative
  std::uint32_t lowest[kMaxWarps];   // of -lowest
  float squares[kMaxWarps];
};

/// The warps that work on one token together.
struct Group {
  int index;
  int warp;    // within the group
  int thread;  // within the group
  int threads;
  int first_row;  // of X, and chunk of it: the first ones that this thread brings
  int first_chunk;

  __device__ static Group of_this_thread(const KronKernelParams& params) {
    const int threads = params.group_warps * kWarpLanes;
    const int index = static_cast<int>(threadIdx.x) / threads;
    const int thread = static_cast<int>(threadIdx.x) % threads;
    return {index, thread / kWarpLanes, thread, threads, thread / params.chunks, thread % params.chunks};
  }
  __device__ void sync() const {
    if (threads == kWarpLanes) {
      __syncwarp();
    } else {
      sync_some_threads(index + 1, threads);
    }
  }
};

/// Up to 8 neighbours of a row as a chunk; what is missing is zeros.
__device__ inline uint4 gather_chunk(const std::uint16_t* source, int count) {
  std::uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (i < count) words[i / 2] |= static_cast<std::uint32_t>(source[i]) << (16 * (i % 2));
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

/// Chunk `chunk` of a row of `columns` numbers; zeros behind its end.
__device__ inline uint4 read_chunk(const std::uint16_t* row, int columns, int chunk, bool is_aligned) {
  const int left = columns - chunk * kChunk;
  if (is_aligned && left >= kChunk) return *reinterpret_cast<const uint4*>(row + chunk * kChunk);
  return left > 0 ? gather_chunk(row + chunk * kChunk, left) : make_uint4(0, 0, 0, 0);
}

__device__ inline bool has_aligned_rows(const void* data, std::int64_t columns) {
  return columns % kChunk == 0 && reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
}

/// 1.0 of a 16-bit type.
template <MmaType kType>
__device__ constexpr std::uint32_t one_bits() {
  return power_bits<kType>(0);
}

/// Calls body(row, chunk) for the chunks of a side x side matrix and its padding that are this thread's, with the chunk's
/// numbers: those of `matrix`, or of the identity where there is none.
template <MmaType kType, typename Body>
__device__ void for_matrix_chunks(const void* matrix, int side, TileShape tile, Body body) {
  const auto* numbers = static_cast<const std::uint16_t*>(matrix);
  const bool is_aligned = has_aligned_rows(matrix, side);
  const int chunks = tile.blocks * 8;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < tile.rows * chunks; i += static_cast<int>(blockDim.x)) {
    const int row = i / chunks;
    const int chunk = i % chunks;
    uint4 value = make_uint4(0, 0, 0, 0);
    if (matrix == nullptr) {
      const std::uint32_t one = row / kChunk == chunk ? one_bits<kType>() << (16 * (row % 2)) : 0u;
      const int word = row % kChunk / 2;
      value = make_uint4(word == 0 ? one : 0u, word == 1 ? one : 0u, word == 2 ? one : 0u, word == 3 ? one : 0u);
    } else if (row < side) {
      value = read_chunk(numbers + static_cast<std::int64_t>(row) * side, side, chunk, is_aligned);
    }
    body(row, chunk, value);
  }
}

/// left, as it is.
template <MmaType kType>
__device__ void load_left(const KronKernelParams& params, std::uint32_t tile) {
  for_matrix_chunks<kType>(
      params.problem.matrices.left, params.rows, params.left_tile,
      [&](int row, int chunk, uint4 value) { store_shared_chunk(tile + params.left_tile.offset(row, chunk), value); });
}

/// right with its columns dealt to threads: what a lane of a product's result holds, two columns of each of kTiles tiles of 8,
/// becomes 2*kTiles neighbours, so that codes are packed without asking other lanes. With 4 tiles:
///   column of right     0 1 2 3 4 5 6 7 | 8 9 ...         lane i of 4 holds columns 8*i .. 8*i+7
///   tile, column of it  0 0 1 1 2 2 3 3 | 0 0 ...
///                       0 1 0 1 0 1 0 1 | 2 3 ...
template <MmaType kType, int kTiles>
__device__ void load_right(const KronKernelParams& params, std::uint32_t tile) {
  constexpr int kRun = 2 * kTiles;
  for_matrix_chunks<kType>(params.problem.matrices.right, params.columns, params.right_tile,
                           [&](int row, int chunk, uint4 value) {
                             const int column = chunk * kChunk;
                             if (column >= 8 * kTiles) return;
                             const int lane = column / kRun;
                             const int first = column % kRun / 2;
                             const std::uint32_t words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
                             for (int i = 0; i < 4; ++i) {
                               const std::uint32_t address = tile + params.right_tile.offset(row, first + i) + 4 * lane;
                               store_shared_word(address, words[i]);
                             }
                           });
}

/// Calls body(row, chunk) for the chunks of X that are this thread's: always the same ones, so that a thread may change in place
/// what it copied.
template <typename Body>
__device__ void for_own_chunks(const KronKernelParams& params, const Group& group, Body body) {
  int row = group.first_row;
  int chunk = group.first_chunk;
  while (row < params.rows) {
    body(row, chunk);
    row += params.row_step;
    chunk += params.chunk_step;
    if (chunk >= params.chunks) {
      chunk -= params.chunks;
      ++row;
    }
  }
}

/// Starts to copy one row of x or `second` as X into a tile.
__device__ inline void copy_token(const KronKernelParams& params, const Group& group, const void* source,
                                  std::int64_t first, std::uint32_t tile) {
  const auto* x = static_cast<const std::uint16_t*>(source) + first;
  if (params.copies_columns) {
    std::uint32_t address = tile + params.x_tile.offset(group.first_row, group.first_chunk);
    const std::uint16_t* numbers = x + group.first_row * params.columns + group.first_chunk * kChunk;
#pragma unroll 4
    for (int row = group.first_row; row < params.rows; row += params.row_step) {
      copy_quad_async(address, numbers);
      address += params.row_step * kRowBytes;
      numbers += params.row_step * params.columns;
    }
    return;
  }
  for_own_chunks(params, group, [&](int row, int chunk) {
    const std::uint16_t* numbers = x + row * params.columns;
    const std::uint32_t address = tile + params.x_tile.offset(row, chunk);
    if (params.loads_chunks) {
      copy_quad_async(address, numbers + chunk * kChunk);
    } else {
      store_shared_chunk(address, read_chunk(numbers, params.columns, chunk, false));
    }
  });
}

/// Starts to copy a token; every thread of its group calls, also behind the last token, so that groups of copies can be counted.
__device__ inline void start_token(const KronKernelParams& params, const Group& group, std::int64_t token,
                                   std::uint32_t stage) {
  const KronQuantizeProblem& problem = params.problem;
  if (token < problem.tokens) {
    copy_token(params, group, problem.x, token * problem.x_stride, stage);
    if (params.copies_second) {
      copy_token(params, group, problem.second, token * problem.second_stride, stage + params.x_tile.bytes());
    }
  }
  commit_copies();
}

/// Waits for the oldest of `stages` tokens on their way.
__device__ inline void wait_for_token(int stages) {
  if (stages == 3) {
    wait_copies<2>();
  } else if (stages == 2) {
    wait_copies<1>();
  } else {
    wait_copies<0>();
  }
}

}  // namespace kvpack::cuda
