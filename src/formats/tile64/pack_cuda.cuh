// What the kernels that compress share, and the first of them: it takes any input type, stride and channel scores, one
// thread a tile. 16-bit inputs without scores have a faster one in pack_halves_cuda.cuh.
#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "formats/tile64/elements_cuda.cuh"
#include "formats/tile64/implementations.h"
#include "formats/tile64/tiles.h"
#include "formats/tile64/workspace.h"
#include "formats/tile64_f16/layout.h"
#include "formats/tile64_q/layout.h"
#include "prune/magnitude_cuda.cuh"

namespace kvpack::cuda {

inline constexpr int kTileSize = static_cast<int>(kTileElements);

/// The working memory of formats/tile64/workspace.h, and how many blocks of 64 tokens there are.
struct PackWorkspace {
  std::int32_t* sizes = nullptr;  // [blocks]: payload units of each block
  std::uint8_t* slots = nullptr;  // [blocks, slot_bytes]
  std::int64_t slot_bytes = 0;
  std::int64_t blocks = 0;
  std::int64_t blocks_per_batch = 0;
};

/// A block of tokens and the batch it belongs to. There are fewer than 2^31 tiles, so of blocks too.
struct PackPlace {
  std::int64_t batch;
  std::int64_t block;

  __device__ PackPlace(std::int64_t index, const PackWorkspace& workspace)
      : batch(static_cast<std::uint32_t>(index) / static_cast<std::uint32_t>(workspace.blocks_per_batch)),
        block(static_cast<std::uint32_t>(index) % static_cast<std::uint32_t>(workspace.blocks_per_batch)) {}
};

/// Halves of a payload unit for 16 bits: sizes and places count 16 bytes there, and words of 32 bits for codes.
inline constexpr int kUnitHalves = static_cast<int>(tile64_f16::kTilePadHalves);

/// Payload units of a tile with `count` survivors.
__device__ inline int tile_units(int count, int bits) {
  if (bits == kUnquantizedBits) return static_cast<int>(tile64_f16::tile_halves(count)) / kUnitHalves;
  return static_cast<int>(tile64_q::tile_words(count, bits));
}

/// The number that stands in offsets for a tile `units` payload units into its block.
__device__ inline int offset_of_units(int units, int bits) {
  return bits == kUnquantizedBits ? units * (kUnitHalves / static_cast<int>(tile64_f16::kHalvesPerOffset)) : units;
}

/// Sum of `value` over the threads before this one; *total gets that over all. Every thread must call, once.
template <int kThreads>
__device__ int exclusive_block_sum(int value, int* total) {
  __shared__ int of_warps[kThreads / kWarpLanes];
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  int sum = value;
#pragma unroll
  for (int distance = 1; distance < kWarpLanes; distance *= 2) {
    const int below = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += below;
  }
  if (lane == kWarpLanes - 1) of_warps[warp] = sum;
  __syncthreads();
  int before = 0;
  int all = 0;
#pragma unroll
  for (int w = 0; w < kThreads / kWarpLanes; ++w) {
    if (w < warp) before += of_warps[w];
    all += of_warps[w];
  }
  *total = all;
  return before + sum - value;
}

/// One tile as its thread sees it: float32 words in shared memory, `stride` apart; 0 and -0 are no survivors.
struct StagedTile {
  const std::uint32_t* words;
  int stride;

  [[nodiscard]] __device__ std::uint32_t word(int element) const { return words[element * stride]; }
};

/// Writes bitmap words' worth of survivors as halves, then zeros up to a whole unit.
__device__ inline void write_halves(StagedTile tile, std::uint64_t bitmap, DType x_dtype, DType payload_type,
                                    std::uint16_t* target) {
  int place = 0;
  for (; bitmap != 0; bitmap &= ~tile64::bitmap_bit(__clzll(static_cast<long long>(bitmap)))) {
    const std::uint32_t word = tile.word(__clzll(static_cast<long long>(bitmap)));
    target[place++] = x_dtype == DType::kFloat32 ? narrow(word, payload_type) : narrow_back(word, payload_type);
  }
  while (place % kUnitHalves != 0) target[place++] = 0;
}

/// Writes survivors as codes, low bits first; the last word is filled up with zeros.
__device__ inline void write_codes(StagedTile tile, std::uint64_t bitmap, tile64_q::Grid grid, int bits,
                                   std::uint32_t* target) {
  std::uint32_t word = 0;
  int used_bits = 0;
  for (; bitmap != 0; bitmap &= ~tile64::bitmap_bit(__clzll(static_cast<long long>(bitmap)))) {
    const float value = __uint_as_float(tile.word(__clzll(static_cast<long long>(bitmap))));
    word |= tile64_q::code_of(value, grid, bits) << used_bits;
    used_bits += bits;
    if (used_bits < tile64_q::kWordBits) continue;
    *target++ = word;
    word = 0;
    used_bits = 0;
  }
  if (used_bits != 0) *target = word;
}

/// Grid of a tile's survivors. A NaN among them makes every comparison false, so it is looked for.
__device__ inline tile64_q::Grid staged_grid(StagedTile tile, std::uint64_t bitmap, int bits) {
  if (bitmap == 0) return {};
  float low = __uint_as_float(0x7f800000u);
  float high = -low;
  bool has_nan = false;
  for (; bitmap != 0; bitmap &= ~tile64::bitmap_bit(__clzll(static_cast<long long>(bitmap)))) {
    const float value = __uint_as_float(tile.word(__clzll(static_cast<long long>(bitmap))));
    has_nan |= value != value;
    low = fminf(low, value);
    high = fmaxf(high, value);
  }
  if (has_nan) high = __uint_as_float(0x7fffffffu);
  return tile64_q::grid_of(low, high, bits);
}

inline constexpr int kPackThreads = 256;

/// Bytes of shared memory of pack_any_kernel: 64 rows of float32, each one word longer so that columns hit all banks.
constexpr std::int64_t pack_any_shared_bytes(std::int64_t head_dim) {
  return kTileElements * (head_dim + 1) * static_cast<std::int64_t>(sizeof(float));
}

/// Prunes the rows of a block of 64 tokens, a warp a row, and packs its tiles, a thread a tile.
///
///   keys, head_dim 64, two survivors a row            slot: | tile 0 | tile 2 | ...   sizes 1 0 1 ... in units
///   token 0   5 0 -3 0 ...   tile 0 (channel 0): bitmap 0xc000000000000000, halves 5 7 0 0 0 0 0 0
///   token 1   7 0  0 9 ...   offsets of the block: 0 4 4 8 ... (until place_blocks_kernel adds the block's own)
///
/// Launch  any number of blocks of kPackThreads, pack_any_shared_bytes of shared memory
/// Work    block i takes blocks of tokens i, i + gridDim.x, ...
/// Reads   x once, channel_scores
/// Writes  bitmaps, scales, zeros; offsets within the block; the block's payload to its slot, its size to sizes
/// Needs   head_dim = 32 * kSlots <= kPackThreads
template <int kSlots>
__global__ void __launch_bounds__(kPackThreads)
    pack_any_kernel(CompressTile64Problem problem, PackWorkspace workspace) {
  extern __shared__ std::uint32_t staged[];
  constexpr int kHeadDim = kSlots * kWarpLanes;
  constexpr int kStride = kHeadDim + 1;
  const Tile64Data& out = problem.out;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  for (std::int64_t b = blockIdx.x; b < workspace.blocks; b += gridDim.x) {
    const auto [batch, block] = PackPlace(b, workspace);
    const std::int64_t start = matrix_start(problem.x, batch);
    const float* scores = problem.channel_scores == nullptr
                              ? nullptr
                              : problem.channel_scores + batch * problem.channel_scores_batch_stride;
    for (int row = warp; row < kTileSize; row += kPackThreads / kWarpLanes) {
      const std::int64_t token = block * kTileElements + row;
      const bool is_real = token < out.tokens;  // the same for the whole warp
      std::uint32_t words[kSlots];
      std::uint32_t ranks[kSlots];
      std::uint32_t all_bits = 0;
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        const int channel = s * kWarpLanes + lane;
        words[s] = is_real ? load_bits(problem.x, start + token * problem.x.token_stride + channel) : 0u;
        ranks[s] = magnitude_rank(__uint_as_float(words[s]), scores == nullptr ? nullptr : scores + channel);
        all_bits |= ranks[s];
      }
      Cut cut{0, 0};  // everything survives
      if (problem.prunes && is_real) cut = find_warp_cut(ranks, all_bits, problem.rank_from_top, problem.rule);
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        const bool is_tie = cut.num_ties > 0 && ranks[s] == cut.at_least - 1u;
        const std::uint32_t ties = __ballot_sync(kAllLanes, is_tie);
        const bool survives = ranks[s] >= cut.at_least || (is_tie && __popc(ties & ((1u << lane) - 1u)) < cut.num_ties);
        cut.num_ties -= __popc(ties);
        staged[row * kStride + s * kWarpLanes + lane] = survives ? words[s] : 0u;
      }
    }
    __syncthreads();
    const int tile = static_cast<int>(threadIdx.x);
    const bool has_tile = tile < kHeadDim;
    const StagedTile mine = out.kind == CacheKind::kKey
                                ? StagedTile{staged + tile, kStride}
                                : StagedTile{staged + tile % kTileSize * kStride + tile / kTileSize * kTileSize, 1};
    std::uint64_t bitmap = 0;
    for (int i = 0; has_tile && i < kTileSize; ++i) {
      if ((mine.word(i) & 0x7fffffffu) != 0) bitmap |= tile64::bitmap_bit(i);
    }
    int total = 0;
    const int units = tile_units(__popcll(bitmap), out.bits);
    const int place = exclusive_block_sum<kPackThreads>(units, &total);
    if (threadIdx.x == 0) workspace.sizes[b] = total;
    if (has_tile) {
      const std::int64_t index = batch * out.tiles + block * kHeadDim + tile;
      std::uint8_t* slot = workspace.slots + b * workspace.slot_bytes;
      out.bitmaps[index] = bitmap;
      out.offsets[batch * out.offsets_stride() + block * kHeadDim + tile] = offset_of_units(place, out.bits);
      if (out.bits == kUnquantizedBits) {
        write_halves(mine, bitmap, problem.x.dtype, out.payload_type,
                     reinterpret_cast<std::uint16_t*>(slot) + place * kUnitHalves);
      } else {
        const tile64_q::Grid grid = staged_grid(mine, bitmap, out.bits);
        out.scales[index] = grid.scale;
        out.zeros[index] = grid.zero;
        write_codes(mine, bitmap, grid, out.bits, reinterpret_cast<std::uint32_t*>(slot) + place);
      }
    }
    __syncthreads();  // the next block of tokens writes `staged` and the sums
  }
}

}  // namespace kvpack::cuda
