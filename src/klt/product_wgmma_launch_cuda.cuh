// Which tiles of product_wgmma_cuda.cuh take which product.
#pragma once

#include <algorithm>

#include "cuda/check.h"
#include "cuda/device.h"
#include "klt/product_wgmma_cuda.cuh"

namespace kvpack::cuda {

namespace wgmma {

/// Bytes from 64 inputs of a split matrix to the next 64. Whatever tiles are chosen, the last of them ends inside.
inline std::int64_t split_step_bytes(std::int32_t columns) { return (round_up(columns, 32) + 256) * 128; }

/// Memory of a split matrix.
inline std::int64_t split_bytes(std::int32_t depth, std::int32_t columns) {
  return 2 * divide_up(depth, kDepth) * split_step_bytes(columns);
}

/// Splits a matrix into `memory` of split_bytes(), at a multiple of 16.
inline SplitBlocks launch_split(const float* matrix, std::int32_t depth, std::int32_t columns, unsigned char* memory,
                                cudaStream_t stream) {
  const std::int64_t steps = divide_up(depth, kDepth);
  const std::int64_t step_bytes = split_step_bytes(columns);
  const SplitBlocks result{memory, memory + steps * step_bytes, step_bytes};
  if (steps * columns == 0) return result;
  const dim3 blocks(static_cast<unsigned>(step_bytes / 128 / 32), static_cast<unsigned>(steps));
  split_blocks_kernel<<<blocks, dim3(32, 4), 0, stream>>>(matrix, depth, columns, step_bytes, memory,
                                                          memory + steps * step_bytes);
  check_cuda(cudaGetLastError(), "launch the splitting of a matrix");
  return result;
}

/// A choice of tiles and about how long a product takes with it, in columns of 128 rows.
struct Tiles {
  int groups;
  int columns;
  std::int64_t time(std::int64_t rows, std::int32_t all_columns, int processors) const {
    const std::int64_t tiles = divide_up(rows, groups * kGroupRows) * divide_up(all_columns, columns);
    // What a tile takes besides its products; alone on a multiprocessor, one group waits for memory more than it multiplies.
    const std::int64_t of_tile = groups == 2 ? columns + 16 : 64;
    return divide_up(tiles, processors) * of_tile;
  }
};

template <int kGroups, int kColumns, typename T, typename Store>
void launch_tiles(const ProductRows<T>& lhs, const SplitBlocks& matrix, Shape shape, const Store& store, int processors,
                  cudaStream_t stream) {
  using Memory = Stages<kColumns>;
  shape.column_blocks = static_cast<std::int32_t>(divide_up(shape.columns, kColumns));
  shape.tiles = divide_up(lhs.span.rows, kGroups * kGroupRows) * shape.column_blocks;
  const std::int64_t means = mean_bytes<T, Store>(shape.depth, shape.column_blocks * kColumns);
  const auto bytes = static_cast<int>(1024 + Memory::kAllBytes + Memory::kBarrierBytes + means);
  const auto kernel = product_kernel<T, Store, kGroups, kColumns>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
             "reserve shared memory for the product of transform-coded rows");
  const auto blocks = static_cast<unsigned>(std::min<std::int64_t>(shape.tiles, processors));
  kernel<<<blocks, (kGroups + 1) * kGroupThreads, static_cast<unsigned>(bytes), stream>>>(lhs, matrix, shape, store);
  check_cuda(cudaGetLastError(), "launch the product of transform-coded rows");
}

}  // namespace wgmma

/// Launches the product; nothing for no rows or no columns. `inputs`: that a row has in memory, those behind depth zeros.
/// Every choice of tiles gives the same bits: a sum's products and their order are the same.
template <typename T, typename Store>
void launch_wgmma_product(const ProductRows<T>& lhs, const wgmma::SplitBlocks& matrix, std::int32_t depth,
                          std::int32_t inputs, std::int32_t columns, const Store& store, cudaStream_t stream) {
  using namespace wgmma;
  if (lhs.span.rows == 0 || columns == 0) return;
  const KltMatrix& rows = lhs.matrix;
  constexpr std::uintptr_t kVectorBytes = std::min<std::uintptr_t>(4 * sizeof(T), 16);
  const bool is_plain = rows.channel_stride == 1 && inputs % 4 == 0 && rows.token_stride % 4 == 0 &&
                        rows.sequence_stride % 4 == 0 &&
                        reinterpret_cast<std::uintptr_t>(rows.data) % kVectorBytes == 0;
  const Shape shape{depth, inputs, columns, 0, 0, is_plain};
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
  constexpr Tiles kChoices[] = {{2, 256}, {2, 240}, {2, 192}, {1, 32}};
  const Tiles* best = std::ranges::min_element(
      kChoices, {}, [&](const Tiles& tiles) { return tiles.time(lhs.span.rows, columns, processors); });
  switch (best->columns) {
    case 256:
      return launch_tiles<2, 256>(lhs, matrix, shape, store, processors, stream);
    case 240:
      return launch_tiles<2, 240>(lhs, matrix, shape, store, processors, stream);
    case 192:
      return launch_tiles<2, 192>(lhs, matrix, shape, store, processors, stream);
    default:
      return launch_tiles<1, 32>(lhs, matrix, shape, store, processors, stream);
  }
}

}  // namespace kvpack::cuda
