// The fast kernel that compresses 16-bit inputs: four lanes share a tile, and everything stays in registers and shared
// memory between one read of x and one write of a block's payload.
#pragma once

#include <cstdint>

#include "cuda/shared_store.cuh"
#include "formats/tile64/codes_cuda.cuh"
#include "formats/tile64/pack_cuda.cuh"
#include "formats/tile64/pack_few_bits_cuda.cuh"
#include "formats/tile64/prune_runs_cuda.cuh"

namespace kvpack::cuda {

/// Halves between two tiles in shared memory: 64 survivors, and 8 more so that 16-byte accesses hit all banks.
inline constexpr int kStagedTile = kTileSize + 8;

/// What a block of tokens has in shared memory.
template <int kHeadDim>
struct alignas(16) PackShared {
  /// First the pruned rows, [64][kHeadDim + 8]; later each tile's survivors, [kHeadDim][kStagedTile].
  std::uint16_t halves[kHeadDim * kStagedTile];
  float4 grids[kHeadDim];         // what quick_grid() tells
  uint4 words[kHeadDim];          // codes of 1 or 2 bits
  std::uint32_t tiles[kHeadDim];  // survivors; then also 256 times the payload units before the tile
};

/// Row of shared memory for a token: eight tokens that one 8x8 matrix takes are neighbours, so that its columns give
/// lane part p the tokens 16p + 2m and 16p + 2m + 1 of matrix m.
///   token  0 1 16 17 32 33 48 49 2 3 18 ...      row  0 1 2 3 4 5 6 7 8 9 10 ...
__device__ inline int row_of_token(int token) { return (token >> 1 & 7) * 8 + (token >> 4) * 2 + (token & 1); }

/// Loads a lane's runs; tokens that fill up the last block are zeros.
template <int kHeadDim>
__device__ void load_runs(Runs& x, const CompressTile64Problem& problem, std::int64_t batch, std::int64_t block) {
  using Shape = RunShape<kHeadDim>;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int first_row = static_cast<int>(threadIdx.x) / kWarpLanes * Shape::kRowsPerWarp + lane / kRunParts;
  const auto* data = static_cast<const std::uint16_t*>(problem.x.data) + matrix_start(problem.x, batch) +
                     lane % kRunParts * kRunElements;
#pragma unroll
  for (int j = 0; j < kRuns; ++j) {
    const std::int64_t token = block * kTileElements + first_row + 8 * (j / Shape::kRunsPerRow);
    uint4 low = make_uint4(0, 0, 0, 0);
    uint4 high = low;
    if (token < problem.out.tokens) {
      const auto* run =
          reinterpret_cast<const uint4*>(data + token * problem.x.token_stride + j % Shape::kRunsPerRow * kTileSize);
      low = __ldg(run);
      high = __ldg(run + 1);
    }
    x[j][0] = low.x, x[j][1] = low.y, x[j][2] = low.z, x[j][3] = low.w;
    x[j][4] = high.x, x[j][5] = high.y, x[j][6] = high.z, x[j][7] = high.w;
  }
}

/// Where a lane's run lies in the rows of shared memory, as a half.
template <int kHeadDim>
__device__ int staged_run(int j) {
  using Shape = RunShape<kHeadDim>;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int token = static_cast<int>(threadIdx.x) / kWarpLanes * Shape::kRowsPerWarp + lane / kRunParts +
                    8 * (j / Shape::kRunsPerRow);
  return row_of_token(token) * (kHeadDim + 8) + j % Shape::kRunsPerRow * kTileSize + lane % kRunParts * kRunElements;
}

/// Prunes a lane's runs and writes them to the rows of shared memory. Ties that must go are erased there, one by one:
/// they are few.
template <int kHeadDim, MmaType kType>
__device__ void prune_and_stage(Runs& x, const CompressTile64Problem& problem, SearchHint hint,
                                PackShared<kHeadDim>& shared) {
  using Shape = RunShape<kHeadDim>;
  std::uint32_t surplus[kRuns] = {};
  bool has_ties = false;
  if (problem.prunes && problem.rank_from_top < kHeadDim) {
    const auto cuts = find_row_cuts<kHeadDim, kType>(x, static_cast<float>(problem.rank_from_top), problem.rule, hint);
    has_ties = cuts.has_ties;
    if (has_ties) find_surplus_ties<kHeadDim, kType>(surplus, x, cuts);
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
#pragma unroll
      for (int w = 0; w < kRunWords; ++w) {
        x[j][w] &= mask_above<kType>(x[j][w], cuts.limits[j / Shape::kRunsPerRow]);
      }
    }
  }
  if (problem.out.kind == CacheKind::kValue && !has_ties) return;  // a run is already what its lane will pack
#pragma unroll
  for (int j = 0; j < kRuns; ++j) {
    auto* run = reinterpret_cast<uint4*>(shared.halves + staged_run<kHeadDim>(j));
    run[0] = make_uint4(x[j][0], x[j][1], x[j][2], x[j][3]);
    run[1] = make_uint4(x[j][4], x[j][5], x[j][6], x[j][7]);
  }
  if (!has_ties) return;
#pragma unroll
  for (int j = 0; j < kRuns; ++j) {
    const std::uint32_t run = shared_address(shared.halves + staged_run<kHeadDim>(j));
    for (; surplus[j] != 0; surplus[j] &= surplus[j] - 1) {
      const int entry = kRunElements - __ffs(static_cast<int>(surplus[j]));
      store_shared_half(run + 2u * static_cast<std::uint32_t>(entry), 0);
    }
  }
  if (problem.out.kind == CacheKind::kKey) return;
#pragma unroll
  for (int j = 0; j < kRuns; ++j) {  // written by this thread
    const auto* run = reinterpret_cast<const uint4*>(shared.halves + staged_run<kHeadDim>(j));
    const uint4 low = run[0];
    const uint4 high = run[1];
    x[j][0] = low.x, x[j][1] = low.y, x[j][2] = low.z, x[j][3] = low.w;
    x[j][4] = high.x, x[j][5] = high.y, x[j][6] = high.z, x[j][7] = high.w;
  }
}

/// Reads runs along tokens: run j becomes tokens 16*part .. of channel 32*warp + 8*j + g.
template <int kHeadDim>
__device__ void load_channels(Runs& x, const PackShared<kHeadDim>& shared) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int first = static_cast<int>(threadIdx.x) / kWarpLanes * kWarpLanes;
  // Lane l names row l % 8 of matrix l / 8 of the four that one instruction loads.
  const std::uint32_t address = shared_address(shared.halves + lane * (kHeadDim + 8) + first);
#pragma unroll
  for (int j = 0; j < kRuns; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      std::uint32_t words[4];
      const int halves = half * kWarpLanes * (kHeadDim + 8) + 8 * j;
      load_matrices_transposed(words, address + static_cast<std::uint32_t>(halves) * 2u);
#pragma unroll
      for (int w = 0; w < 4; ++w) x[j][4 * half + w] = words[w];
    }
  }
}

/// The tile that a lane's run belongs to after load_channels(), within its block.
template <int kHeadDim>
__device__ int tile_of_run(CacheKind kind, int j) {
  using Shape = RunShape<kHeadDim>;
  const int group = static_cast<int>(threadIdx.x) % kWarpLanes / kRunParts;
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  if (kind == CacheKind::kKey) return warp * kWarpLanes + 8 * j + group;
  return j % Shape::kRunsPerRow * kTileSize + warp * Shape::kRowsPerWarp + 8 * (j / Shape::kRunsPerRow) + group;
}

/// Finds a lane's bitmap bits, writes them and counts tiles[]; returns the survivors of each run's tile.
template <int kHeadDim, MmaType kType>
__device__ PartSums write_bitmaps(std::uint32_t (&bits)[kRuns], const Runs& x, const Tile64Data& out,
                                  std::int64_t first_tile, PackShared<kHeadDim>& shared) {
  const int part = static_cast<int>(threadIdx.x) % kRunParts;
  find_run_bits<kType>(bits, [&](int j, int w) { return ones_above<kType>(x[j][w], 0u); });
  std::uint32_t counts = 0;
#pragma unroll
  for (int j = 0; j < kRuns; ++j) counts |= static_cast<std::uint32_t>(__popc(bits[j])) << (8 * j);
  const PartSums sums = sum_parts(counts);
  auto* pieces = reinterpret_cast<std::uint16_t*>(out.bitmaps + first_tile);
#pragma unroll
  for (int j = 0; j < kRuns; ++j) {
    const int tile = tile_of_run<kHeadDim>(out.kind, j);
    pieces[tile * kRunParts + kRunParts - 1 - part] = static_cast<std::uint16_t>(bits[j]);
    if (part == 0) shared.tiles[tile] = static_cast<std::uint32_t>(byte_of(sums.all, j));
  }
  return sums;
}

/// Writes bitmaps and grids, and each tile's codes to shared memory; returns with tiles[] counted.
template <int kHeadDim, MmaType kType, int kBits>
__device__ void pack_few_bits(const Runs& x, const Tile64Data& out, std::int64_t first_tile,
                              PackShared<kHeadDim>& shared) {
  const int part = static_cast<int>(threadIdx.x) % kRunParts;
  const int own = tile_of_run<kHeadDim>(out.kind, part);  // the lanes of a quad answer for one of its tiles each
  shared.words[own] = make_uint4(0, 0, 0, 0);
  std::uint32_t bits[kRuns];
  const PartSums sums = write_bitmaps<kHeadDim, kType>(bits, x, out, first_tile, shared);
  const tile64_q::Grid grid = runs_grid<kType>(x, byte_of(sums.all, part), kBits);
  out.scales[first_tile + own] = grid.scale;
  out.zeros[first_tile + own] = grid.zero;
  __syncwarp();  // zeroed words
  join_codes<kType, kBits>(x, bits, sums.before, code_steps<kType, kBits>(grid), shared.words,
                           [&](int j) { return tile_of_run<kHeadDim>(out.kind, j); });
}

/// Writes bitmaps, and each tile's survivors behind one another to shared memory; returns with tiles[] counted.
template <int kHeadDim, MmaType kType>
__device__ void scatter_survivors(const Runs& x, const Tile64Data& out, std::int64_t first_tile,
                                  PackShared<kHeadDim>& shared) {
  const int part = static_cast<int>(threadIdx.x) % kRunParts;
  std::uint32_t bits[kRuns];
  const PartSums sums = write_bitmaps<kHeadDim, kType>(bits, x, out, first_tile, shared);
  std::uint32_t targets[kRuns];  // addresses in shared memory
#pragma unroll
  for (int j = 0; j < kRuns; ++j) {
    const int count = byte_of(sums.all, j);
    std::uint16_t* survivors = shared.halves + tile_of_run<kHeadDim>(out.kind, j) * kStagedTile;
    if (part == 0 && count % kUnitHalves != 0) {
      reinterpret_cast<uint4*>(survivors)[count / kUnitHalves] = make_uint4(0, 0, 0, 0);
    }
    targets[j] = shared_address(survivors + byte_of(sums.before, j));
  }
  __syncwarp();  // zeros that fill up a unit come before the survivors in it
#pragma unroll
  for (int j = 0; j < kRuns; ++j) {
#pragma unroll
    for (int w = 0; w < kRunWords; ++w) {
      if ((bits[j] >> (15 - 2 * w) & 1u) != 0) {
        store_shared_half(targets[j], static_cast<std::uint16_t>(x[j][w]));
        targets[j] += 2;
      }
      if ((bits[j] >> (14 - 2 * w) & 1u) != 0) {
        store_shared_half(targets[j], static_cast<std::uint16_t>(x[j][w] >> 16));
        targets[j] += 2;
      }
    }
  }
}

/// Prunes a block of 64 tokens and packs its tiles, as pack_any_kernel does.
///
///   x [64][128]  ->  rows, pruned, in registers: lane 4*g + part has 16 channels of four runs (prune_runs_cuda.cuh)
///   keys         ->  shared memory  ->  the same registers along tokens: 16 tokens of four channels
///   survivors    ->  shared memory, each tile's own 64 places: | 5 7 0 0 0 0 0 0 | (two of them, one unit)
///   units        ->  slot: halves as they are, or the 8 codes of a unit
///
/// Launch  any number of blocks of kHeadDim threads
/// Work    block i takes blocks of tokens i, i + gridDim.x, ...; 16 rows a warp, four lanes a tile
/// Reads   x once, 16 bytes at a time
/// Writes  bitmaps, scales, zeros; offsets within the block; the block's payload to its slot, its size to sizes
/// Needs   x of 16 bits on boundaries of 16 bytes, without channel scores; sm_80 for the product and the minima
///         kFewBits is out.bits if that is 1 or 2, else 0
template <int kHeadDim, MmaType kType, int kFewBits>
__global__ void __launch_bounds__(kHeadDim)
    pack_halves_kernel(CompressTile64Problem problem, PackWorkspace workspace, SearchHint hint) {
  __shared__ PackShared<kHeadDim> shared;
  const Tile64Data& out = problem.out;
  const int thread = static_cast<int>(threadIdx.x);
  for (std::int64_t b = blockIdx.x; b < workspace.blocks; b += gridDim.x) {
    const auto [batch, block] = PackPlace(b, workspace);
    const std::int64_t first_tile = batch * out.tiles + block * kHeadDim;
    std::uint8_t* slot = workspace.slots + b * workspace.slot_bytes;
    {
      Runs x;
      load_runs<kHeadDim>(x, problem, batch, block);
      prune_and_stage<kHeadDim, kType>(x, problem, hint, shared);
      __syncthreads();
      if (out.kind == CacheKind::kKey) {
        load_channels<kHeadDim>(x, shared);
        if constexpr (kFewBits == 0) __syncthreads();  // survivors replace the rows
      }
      if constexpr (kFewBits != 0) {
        pack_few_bits<kHeadDim, kType, kFewBits>(x, out, first_tile, shared);
      } else {
        scatter_survivors<kHeadDim, kType>(x, out, first_tile, shared);
      }
    }
    __syncthreads();
    const int count = static_cast<int>(shared.tiles[thread]);
    int total = 0;
    const int place = exclusive_block_sum<kHeadDim>(tile_units(count, out.bits), &total);
    if (thread == 0) workspace.sizes[b] = total;
    out.offsets[batch * out.offsets_stride() + block * kHeadDim + thread] = offset_of_units(place, out.bits);
    if constexpr (kFewBits != 0) {
      const uint4 words = shared.words[thread];
      auto* target = reinterpret_cast<std::uint32_t*>(slot) + place;
      const int num_words = tile_units(count, out.bits);
      if (num_words > 0) target[0] = words.x;
      if (num_words > 1) target[1] = words.y;
      if (num_words > 2) target[2] = words.z;
      if (num_words > 3) target[3] = words.w;
      __syncthreads();  // the next block of tokens
      continue;
    }
    shared.tiles[thread] = static_cast<std::uint32_t>(count | place << 8);
    if (out.bits != kUnquantizedBits) {
      const tile64_q::Grid grid = packed_grid<kType>(shared.halves + thread * kStagedTile, count, out.bits);
      out.scales[first_tile + thread] = grid.scale;
      out.zeros[first_tile + thread] = grid.zero;
      shared.grids[thread] = quick_grid(grid, out.bits);
    }
    __syncthreads();
    for (int tile = thread / kRunParts; tile < kHeadDim; tile += kHeadDim / kRunParts) {
      const std::uint16_t* survivors = shared.halves + tile * kStagedTile;
      const int tile_count = static_cast<int>(shared.tiles[tile] & 0xffu);
      const int tile_place = static_cast<int>(shared.tiles[tile] >> 8);
      const int units = tile_units(tile_count, out.bits);
      if (out.bits == kUnquantizedBits) {
        auto* target = reinterpret_cast<uint4*>(slot) + tile_place;
        for (int u = thread % kRunParts; u < units; u += kRunParts) {
          target[u] = reinterpret_cast<const uint4*>(survivors)[u];
        }
        continue;
      }
      const float4 grid = shared.grids[tile];
      const int pieces = (units * tile64_q::kWordBits + 8 * out.bits - 1) / (8 * out.bits);  // 8 codes each
      for (int u = thread % kRunParts; u < pieces; u += kRunParts) {
        write_unit_codes<kType>(survivors, tile_count, u, grid, out.bits, units, slot + tile_place * 4);
      }
    }
    __syncthreads();  // the next block of tokens
  }
}

}  // namespace kvpack::cuda
