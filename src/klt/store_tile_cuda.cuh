// How the sums of a wgmma tile leave a warp: as pairs of columns, or turned among four lanes into 16 bytes of a row.
#pragma once

#include "cuda/global_store.cuh"
#include "cuda/reduce.cuh"
#include "klt/tokens_cuda.cuh"

namespace kvpack::cuda {

namespace wgmma {

/// Word j of lane 4*g + i becomes word i of lane 4*g + j: first among neighbours, then among pairs of them.
__device__ inline uint4 turn_words(const std::uint32_t (&words)[4], int lane) {
  const bool is_odd = lane % 2 != 0;
  const bool is_upper = lane / 2 % 2 != 0;
  const std::uint32_t a = __shfl_xor_sync(kAllLanes, is_odd ? words[0] : words[1], 1);
  const std::uint32_t b = __shfl_xor_sync(kAllLanes, is_odd ? words[2] : words[3], 1);
  const uint2 first = is_odd ? make_uint2(a, words[1]) : make_uint2(words[0], a);
  const uint2 second = is_odd ? make_uint2(b, words[3]) : make_uint2(words[2], b);
  const std::uint32_t x = __shfl_xor_sync(kAllLanes, is_upper ? first.x : second.x, 2);
  const std::uint32_t y = __shfl_xor_sync(kAllLanes, is_upper ? first.y : second.y, 2);
  return is_upper ? make_uint4(x, y, second.x, second.y) : make_uint4(first.x, first.y, x, y);
}

/// Hands sums over 8 columns at a time: lane i of four gets group i of every four groups of 8 columns. All lanes of a warp; the
/// mean goes on to the end of the tile.
template <int kTiles, typename Store>
__device__ inline void store_chunks(const float (&sums)[kTiles][4], std::int64_t first_row, std::int64_t rows,
                                    std::int32_t tile_column, std::int32_t columns, const Store& store) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const auto line_of = [&](std::int64_t row) { return store.at(row < rows ? row : rows - 1); };
  const decltype(line_of(0)) lines[2] = {line_of(first_row), line_of(first_row + 8)};
  const auto* means = reinterpret_cast<const float2*>(store.mean + tile_column) + lane % 4;
#pragma unroll
  for (int n = 0; n < kTiles; n += 4) {
    const std::int32_t column = tile_column + 8 * (n + lane % 4);
    const bool has_chunk = n + lane % 4 < kTiles && column < columns;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      std::uint32_t words[4] = {};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (n + j < kTiles) words[j] = lines[r].word(means[4 * (n + j)], sums[n + j][2 * r], sums[n + j][2 * r + 1]);
      }
      const uint4 chunk = turn_words(words, lane);
      store_quad_if(has_chunk && first_row + 8 * r < rows, lines[r].token + column, chunk);
    }
  }
}

/// Hands sums over as pairs of columns, those of rows and columns that exist.
template <int kTiles, typename Store>
__device__ inline void store_pairs(const float (&sums)[kTiles][4], std::int64_t first_row, std::int64_t rows,
                                   std::int32_t tile_column, std::int32_t columns, const Store& store) {
  const std::int32_t first_column = tile_column + static_cast<std::int32_t>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (first_row + 8 * r >= rows) return;
    const auto line = store.at(first_row + 8 * r);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const std::int32_t column = first_column + 8 * n;
      if (column + 1 < columns) {
        line.pair(column, sums[n][2 * r], sums[n][2 * r + 1]);
      } else if (column < columns) {
        line.one(column, sums[n][2 * r]);
      }
    }
  }
}

/// Hands the sums of a warp over; `first_row` is the first of the lane's two rows, 8 apart.
template <int kTiles, typename Store>
__device__ inline void store_tile(const float (&sums)[kTiles][4], std::int64_t first_row, std::int64_t rows,
                                  std::int32_t tile_column, std::int32_t columns, const Store& store) {
  if constexpr (Store::kHasChunks) {
    if (store.takes_chunks(columns)) {
      store_chunks(sums, first_row, rows, tile_column, columns, store);
      return;
    }
  }
  store_pairs(sums, first_row, rows, tile_column, columns, store);
}

}  // namespace wgmma

}  // namespace kvpack::cuda
