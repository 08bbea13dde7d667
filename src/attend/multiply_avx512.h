// Expanding and multiplying in one loop, for up to four columns: tiles never leave the registers. Included by
// attend/multiply_cpu.h behind the other pieces.
//
// Work a tile (2 bits, four columns): 16 multiply-adds, 15 more on the same two ports, of which 8 permute and can only take
// one of them. In two loops each has its own bottleneck; in one the processor fills the gaps of one with the other.
#pragma once

namespace kvpack::avx512 {
namespace {

/// sums += x * tiles [first, first + count). With `kept`, the tiles are also written there for further columns, as
/// expand_tiles would. Reader and columns are copies, so that no store can make the loop load their members again.
template <typename Survivor, int kColumns>
inline void expand_and_multiply(TileReader<Survivor> reader, std::int64_t first, std::int64_t count, Columns columns,
                                float* kept) {
  std::uint64_t masks[kTileElements];
  reader.load_masks(first, masks);
  __m512 sums[kColumns][4];
#pragma GCC unroll 4
  for (int n = 0; n < kColumns; ++n) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sums[n][v] = load(columns.sums + n * columns.sums_stride + 16 * v);
  }
  const auto multiply = [&](std::int64_t k) __attribute__((always_inline)) {
    const TileVectors tile = expand(Survivor{}, masks[k], reader.bytes_of(first + k), reader.grid_of(first + k));
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n) {
      const __m512 x = set1(columns.x[n * columns.x_stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sums[n][v] = fma(x, tile.of[v], sums[n][v]);
    }
    return tile;
  };
  if (kept == nullptr) {
    for (std::int64_t k = 0; k < count; ++k) multiply(k);
  } else {
    for (std::int64_t k = 0; k < count; ++k) store_tile(multiply(k), kept + k * kTileElements);
  }
#pragma GCC unroll 4
  for (int n = 0; n < kColumns; ++n) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) store(columns.sums + n * columns.sums_stride + 16 * v, sums[n][v]);
  }
}

/// The first columns of a block, at most four; returns how many. Further ones find the tiles in `expanded`.
template <typename Survivor>
inline std::int64_t multiply_first_columns(const TileReader<Survivor>& reader, std::int64_t first, std::int64_t count,
                                           const Columns& columns, std::int64_t num_columns, float* expanded) {
  if (num_columns > 4) {
    expand_and_multiply<Survivor, 4>(reader, first, count, columns, expanded);
    return 4;
  }
  if (num_columns == 4) expand_and_multiply<Survivor, 4>(reader, first, count, columns, nullptr);
  if (num_columns == 3) expand_and_multiply<Survivor, 3>(reader, first, count, columns, nullptr);
  if (num_columns == 2) expand_and_multiply<Survivor, 2>(reader, first, count, columns, nullptr);
  if (num_columns == 1) expand_and_multiply<Survivor, 1>(reader, first, count, columns, nullptr);
  return num_columns;
}

}  // namespace
}  // namespace kvpack::avx512
