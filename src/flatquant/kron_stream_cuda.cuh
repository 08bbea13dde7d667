// The kernel of kron_quantize on Hopper for x as it is: the copy engine brings tokens, wgmma multiplies, a warpgroup owns a token,
// two own a large one, half of one a small one. What a producer or a diagonal stands in front of, and other shapes, take
// kron_kernel_cuda.cuh.
#pragma once

#include <cstdint>

#include "cuda/tensor_copy.cuh"
#include "cuda/wgmma.cuh"
#include "flatquant/stream_codes_cuda.cuh"
#include "flatquant/token_tiles_cuda.cuh"

namespace kvpack::cuda {

inline constexpr int kMaxStreamStages = 4;
inline constexpr int kSharedBytesOfHopper = 227 * 1024;
inline constexpr int kExchangeBytes = 192;  // of StreamExchange

constexpr int stages_that_fit(int bytes, int fixed) {
  const int count = (kSharedBytesOfHopper - kTileAlignment - fixed - 8 * kExchangeBytes) / bytes;
  return count < kMaxStreamStages ? count : kMaxStreamStages;
}

/// One shape of the kernel, all of it known when it is compiled.
/// kRowSteps: M in steps of 16 rows. kTokenGroups: groups of a thread block, each with tokens of its own.
template <MmaType kElement, int kN, int kRowSteps, int kTokenGroups>
struct StreamShape {
  static constexpr MmaType kType = kElement;
  static constexpr int kColumns = kN;
  static constexpr int kSteps = kRowSteps;
  static constexpr int kRows = 16 * kSteps;  // of a tile of X
  static constexpr int kGroups = kTokenGroups;
  // Two tokens of up to 32 rows share the 64 rows of the second product, two warps each. Z of either is made by all warps, and each
  // takes that of its own token: left twice on a diagonal would make both at once, but 0 * NaN would spoil the other token.
  static constexpr int kStacked = kSteps <= 2 ? 2 : 1;
  static constexpr int kTiles = kColumns / 8;
  static constexpr int kBlocks = (kColumns + 63) / 64;
  static_assert(kStacked == 1 || kBlocks == 1, "a copy brings tokens of one block of columns behind one another");
  // A warpgroup's registers hold 64 rows of Y, or 128 where a row is not too long.
  static constexpr int kWarpgroups = kSteps > 4 && kColumns > 128 ? 2 : 1;
  static constexpr int kHalves = kSteps <= 4 ? 1 : 2 / kWarpgroups;
  static constexpr int kTokenWarps = 4 * kWarpgroups / kStacked;
  static constexpr int kGroupThreads = 128 * kWarpgroups;
  static constexpr int kThreads = kGroupThreads * kGroups;
  // Whether the next token's Z begins before this one's codes are made. Where more than two groups take turns, that costs more
  // registers than it hides: docs/decisions/0009 has both for each shape.
  static constexpr bool kAhead = kSteps > 4;
  static constexpr int kZColumns = kColumns <= 96 ? kColumns : (kColumns == 224 ? 32 : 64);
  static constexpr int kZTiles = kZColumns / 8;
  static constexpr int kZSteps = kZColumns / 16;
  static constexpr int kZParts = kColumns / kZColumns;
  static constexpr int kTileBytes = kBlocks * kRows * kRowBytes;  // of X of one token
  static constexpr int kStageBytes = kStacked * kTileBytes;
  static constexpr int kRightBytes = kBlocks * kColumns * kRowBytes;
  static constexpr int kLeftBlocks = kSteps <= 4 ? 1 : 2;
  static constexpr int kLeftBytes = kLeftBlocks * kRows * kRowBytes;
  static constexpr int kFixedBytes = kRightBytes + kLeftBytes;
  static constexpr int kStages = stages_that_fit(kGroups * kStageBytes, kFixedBytes);  // on their way to a group
  static constexpr int kSharedBytes = kTileAlignment + kFixedBytes + kGroups * (kStages * kStageBytes + kExchangeBytes);
};

/// What warps of a group tell each other, and the barriers of its stages; behind the tiles, one per group.
struct StreamExchange {
  std::uint32_t highest[2][8];  // of even and odd tokens: a warp may be a token ahead
  std::uint32_t lowest[2][8];
  std::uint64_t arrived[kMaxStreamStages];
};
static_assert(sizeof(StreamExchange) <= kExchangeBytes);

template <typename Shape>
struct StreamKernel {
  static constexpr MmaType kType = Shape::kType;
  static constexpr int kTiles = Shape::kTiles;
  using StackedZ = float[Shape::kStacked][Shape::kZTiles][4];
  __device__ static constexpr TileShape right_tile() { return {Shape::kColumns, Shape::kBlocks}; }
  __device__ static constexpr TileShape left_tile() { return {Shape::kRows, Shape::kLeftBlocks}; }

  const StreamParams& params;
  std::uint32_t right;
  std::uint32_t left;
  std::uint32_t stages;    // of this group
  std::uint32_t barriers;  // of this group
  int lane;
  int warp;  // within the group: owns rows 16*warp .. of Y
  int group;
  std::uint32_t left_of_warp[Shape::kSteps][4];

  /// left and right, all of them on their way before the first is stored. right's columns are dealt to lanes:
  /// stream_codes_cuda.cuh.
  __device__ void load_matrices() const {
    constexpr int kLeftChunks = left_tile().blocks * 8;
    constexpr int kLeftCount = left_tile().rows * kLeftChunks;
    constexpr int kRightChunks = Shape::kColumns / kChunk;
    constexpr int kRightCount = Shape::kColumns * kRightChunks;
    MatrixPart<kType, kLeftCount, kLeftChunks, Shape::kThreads> part_of_left;
    MatrixPart<kType, kRightCount, kRightChunks, Shape::kThreads> part_of_right;
    part_of_left.load(params.left, params.rows, 0);
    for (int first = 0; first < part_of_right.kMine; first += part_of_right.kBatch) {
      part_of_right.load(params.right, Shape::kColumns, first);
      if (first == 0) {
        part_of_left.store(0, [&](int row, int chunk, uint4 value) {
          store_shared_chunk(left + left_tile().offset(row, chunk), value);
        });
      }
      part_of_right.store(first, [&](int row, int chunk, uint4 value) {
        const std::uint32_t words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const DealtPair pair = deal_pair<kTiles>(chunk * kChunk + 2 * w);
          store_shared_word(right + right_tile().offset(row, pair.tile) + 4 * pair.lane, words[w]);
        }
      });
    }
  }

  /// A fragments of left^T for rows 64*half + 16*warp .., from left itself: the transposed load exchanges rows and columns.
  __device__ void load_left_fragments(int half) {
    const int strip = 4 * half + warp % Shape::kTokenWarps;
#pragma unroll
    for (int k = 0; k < Shape::kSteps; ++k) {
      const int row = 16 * k + lane / 16 * 8 + lane % 8;
      load_matrices_transposed(left_of_warp[k], left + left_tile().offset(row, 2 * strip + lane / 8 % 2));
    }
  }

  /// Starts to bring tokens, where there are some.
  __device__ void start_copy(int token, int slot) const {
    if (token >= params.tokens) return;
    const std::uint32_t barrier = barriers + 8 * slot;
    arrive_and_expect(barrier, Shape::kStageBytes);
#pragma unroll
    for (int block = 0; block < Shape::kBlocks; ++block) {
      copy_box_async(stages + slot * Shape::kStageBytes + block * Shape::kRows * kRowBytes, params.x_map,
                     block * kBlockColumns, 0, token, barrier);
    }
  }

  /// Begins a part of Z = left^T * X.
  __device__ void begin_left(std::uint32_t stage, int part, StackedZ& z) const {
    constexpr int kBlockBytes = Shape::kRows * kRowBytes;
    const int first = part * Shape::kZColumns;
#pragma unroll
    for (int s = 0; s < Shape::kStacked; ++s) {
      const std::uint64_t tile = wgmma_tile(
          stage + s * Shape::kTileBytes + first / kBlockColumns * kBlockBytes + first % kBlockColumns * 2, kBlockBytes);
#pragma unroll
      for (int k = 0; k < Shape::kSteps; ++k) {
        wgmma_m64k16<kType, Shape::kZTiles>(z[s], left_of_warp[k], wgmma_tile_behind(tile, 16 * k * kRowBytes), k > 0);
      }
    }
  }

  /// Rounds the part of Z that is this warp's. What the lanes hold of two groups of 8 columns of a result is what they must hold of
  /// 16 as a factor.
  __device__ void round_left(const StackedZ& z, std::uint32_t (&rounded)[Shape::kZSteps][4]) const {
    const bool is_second = Shape::kStacked == 2 && warp >= Shape::kTokenWarps;
#pragma unroll
    for (int k = 0; k < Shape::kZSteps; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int tile = 2 * k + i / 2;
        const int first = i % 2 * 2;
        const float (&own)[4] = z[0][tile];
        const float (&other)[4] = z[Shape::kStacked - 1][tile];
        rounded[k][i] =
            pair_near<kType>(is_second ? other[first] : own[first], is_second ? other[first + 1] : own[first + 1]);
      }
    }
  }

  /// Begins what a part of Z adds to Y.
  __device__ void begin_right(int part, const std::uint32_t (&z)[Shape::kZSteps][4], float (&y)[kTiles][4]) const {
    const std::uint64_t tile = wgmma_tile(right, Shape::kColumns * kRowBytes);
#pragma unroll
    for (int k = 0; k < Shape::kZSteps; ++k) {
      const int row = part * Shape::kZColumns + 16 * k;
      wgmma_m64k16<kType, kTiles>(y, z[k], wgmma_tile_behind(tile, row * kRowBytes), part > 0 || k > 0);
    }
  }

  /// Begins the first part of Z of tokens that have arrived.
  __device__ void begin_tokens(std::uint32_t stage, StackedZ& z) {
    if constexpr (Shape::kHalves == 2) load_left_fragments(0);
    wgmma_begin();
    begin_left(stage, 0, z);
    wgmma_commit();
  }

  /// Both products; the first part of Z has begun. Each part is multiplied with right while the next one is made.
  __device__ void multiply(std::uint32_t stage, StackedZ& z, float (&y)[Shape::kHalves][kTiles][4]) {
    constexpr int kParts = Shape::kZParts * Shape::kHalves;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      wgmma_wait<0>();
#pragma unroll
      for (int stacked = 0; stacked < Shape::kStacked; ++stacked) hold_numbers<Shape::kZTiles>(z[stacked]);
      if (part > 0) hold_numbers<kTiles>(y[(part - 1) / Shape::kZParts]);
      std::uint32_t rounded[Shape::kZSteps][4];
      round_left(z, rounded);
      if (part + 1 == Shape::kZParts && Shape::kHalves == 2) load_left_fragments(1);
      wgmma_begin();
      begin_right(part % Shape::kZParts, rounded, y[part / Shape::kZParts]);
      if (part + 1 < kParts) begin_left(stage, (part + 1) % Shape::kZParts, z);
      wgmma_commit();
    }
    wgmma_wait<0>();
    hold_numbers<kTiles>(y[Shape::kHalves - 1]);
  }

  __device__ void sync_group() const { sync_some_threads(group + 1, Shape::kGroupThreads); }

  __device__ void run(StreamExchange& exchange) {
    constexpr int kStages = Shape::kStages;
    const bool is_first = threadIdx.x % Shape::kGroupThreads == 0;
    const int step = static_cast<int>(gridDim.x) * Shape::kGroups * Shape::kStacked;
    int token = static_cast<int>(blockIdx.x + gridDim.x * group) * Shape::kStacked;
    if (is_first) {
      prefetch_map(params.x_map);
#pragma unroll
      for (int slot = 0; slot < kStages; ++slot) init_barrier(barriers + 8 * slot, 1);
      show_barriers();
#pragma unroll 1
      for (int slot = 0; slot < kStages; ++slot) start_copy(token + slot * step, slot);
    }
    load_matrices();
    show_shared_to_wgmma();
    __syncthreads();
    if (Shape::kHalves == 1) load_left_fragments(0);

    int slot = 0;
    std::uint32_t parity = 0;
    std::uint32_t odd = 0;
    StackedZ z;
    float y[Shape::kHalves][kTiles][4];
    if constexpr (Shape::kAhead) {
      if (token < params.tokens) {
        wait_barrier(barriers, 0);
        begin_tokens(stages, z);
      }
    }
    for (; token < params.tokens; token += step) {
      const std::uint32_t stage = stages + slot * Shape::kStageBytes;
      if constexpr (!Shape::kAhead) {
        wait_barrier(barriers + 8 * slot, parity);
        begin_tokens(stage, z);
      }
      multiply(stage, z, y);
      publish_stream_range<Shape>(params, y, exchange.highest[odd], exchange.lowest[odd], warp);
      sync_group();  // now nobody reads the stage any more
      if (is_first) start_copy(token + kStages * step, slot);
      ++slot;
      if (slot == kStages) {
        slot = 0;
        parity ^= 1;
      }
      if constexpr (Shape::kAhead) {
        // Behind the last token this multiplies whatever lies there.
        if (token + step < params.tokens) wait_barrier(barriers + 8 * slot, parity);
        begin_tokens(stages + slot * Shape::kStageBytes, z);
      }
      const int first_warp = warp / Shape::kTokenWarps * Shape::kTokenWarps;
      const RowRange range =
          read_stream_range<Shape::kTokenWarps>(exchange.highest[odd] + first_warp, exchange.lowest[odd] + first_warp);
      store_stream<Shape>(params, token + warp / Shape::kTokenWarps, warp % Shape::kTokenWarps, lane, range, y);
      odd ^= 1;
    }
    if constexpr (Shape::kAhead) wgmma_wait<0>();
  }
};

/// Quantises tokens: Y = left^T * X * right, codes of Y.
///   Launch    one thread block a multiprocessor, of Shape::kGroups groups; dynamic shared memory: kTileAlignment, right, left,
///             stages of each group, StreamExchange of each group
///   Work      a group takes every (blocks*groups)-th token, or every such pair of tokens of up to 32 rows
///   Reads     x once, by the copy engine, Shape::kStages tokens ahead; left and right once per thread block
///   Writes    codes, scales, zeros once per output
///   Needs     problem.tokens > 0; columns = Shape::kColumns, rows at most Shape::kRows
///
///                     shared memory            registers of warp w
///   X [M x N]         a stage; M up to 32: two   -
///   Z = left^T * X    -                        rows 16w .. 16w+15 of 64, some columns at a time, rounded to the type of x
///   Y = Z * right     -                        rows 16w .. 16w+15 of 64 or of both 64, all columns, float32
template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) kron_stream_kernel(const __grid_constant__ StreamParams params) {
#if KVPACK_HAS_WGMMA
  extern __shared__ __align__(1024) std::byte unaligned[];
  std::byte* shared = unaligned + (kTileAlignment - 1 - (shared_address(unaligned) - 1) % kTileAlignment);
  const std::uint32_t right = shared_address(shared);
  // Of the first lane, so that the compiler knows that a warp has one number and one group.
  const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpLanes, 0);
  constexpr int kGroupWarps = Shape::kGroupThreads / kWarpLanes;
  const int group = warp / kGroupWarps;
  constexpr int kGroupBytes = Shape::kStages * Shape::kStageBytes;
  StreamExchange& exchange =
      reinterpret_cast<StreamExchange*>(shared + Shape::kFixedBytes + Shape::kGroups * kGroupBytes)[group];
  StreamKernel<Shape> kernel{params,
                             right,
                             right + Shape::kRightBytes,
                             right + Shape::kFixedBytes + group * kGroupBytes,
                             shared_address(exchange.arrived),
                             static_cast<int>(threadIdx.x) % kWarpLanes,
                             warp % kGroupWarps,
                             group,
                             {}};
  kernel.run(exchange);
#else
  __trap();
#endif
}

}  // namespace kvpack::cuda
