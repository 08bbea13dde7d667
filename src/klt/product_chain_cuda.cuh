// The products of transform-coded rows on CUDA cores: each output is one chain of fused multiply-adds in the order of
// docs/numerics.md, so that the bits equal the CPU's. The measure for product_tensor_cuda.cuh, which rounds otherwise.
#pragma once

#include <algorithm>

#include "core/divide_up.h"
#include "cuda/check.h"
#include "cuda/launch.h"
#include "klt/tokens_cuda.cuh"

namespace kvpack::cuda {

namespace chain {

constexpr int kThreads = 256;
constexpr int kTile = 64;   // rows and columns of a block
constexpr int kDepth = 16;  // of a step
constexpr int kOwn = 4;     // rows and columns of a thread

/// Multiplies rows with a matrix [depth, columns].
///
///   block   64 rows x 64 columns           thread (16 x 16)   rows 4y .. 4y+3, columns x, x+16, x+32, x+48
///   step    rows' 16 inputs and the matrix's 16 rows in shared memory, one after another into every sum
///
/// Launch  x: blocks of columns, y: any number of blocks of rows
/// Work    a block of outputs at a time
/// Reads   each row once per block of columns, the matrix once per block of rows
/// Writes  each output once, through `store`
/// Needs   kThreads threads
template <typename T, typename Store>
__global__ void __launch_bounds__(kThreads)
    product_kernel(ProductRows<T> lhs, const float* matrix, std::int32_t depth, std::int32_t columns, Store store) {
  __shared__ float inputs[kDepth][kTile + 1];
  __shared__ float factors[kDepth][kTile];
  const int x = static_cast<int>(threadIdx.x) % 16;
  const int y = static_cast<int>(threadIdx.x) / 16;
  const std::int32_t first_column = static_cast<std::int32_t>(blockIdx.x) * kTile;
  for (std::int64_t first_row = static_cast<std::int64_t>(blockIdx.y) * kTile; first_row < lhs.span.rows;
       first_row += static_cast<std::int64_t>(gridDim.y) * kTile) {
    float sums[kOwn][kOwn] = {};
    for (std::int32_t i = 0; i < depth; i += kDepth) {
      for (int place = static_cast<int>(threadIdx.x); place < kTile * kDepth; place += kThreads) {
        const std::int64_t row = first_row + place / kDepth;
        const std::int32_t input = i + place % kDepth;
        float value = 0.0f;
        if (row < lhs.span.rows && input < depth) {
          value = element_value(token_of<const T>(lhs.matrix, lhs.span, row)[input * lhs.matrix.channel_stride]);
          if (lhs.mean != nullptr) value -= lhs.mean[input];
        }
        inputs[place % kDepth][place / kDepth] = value;
        const std::int32_t column = first_column + place % kTile;
        const std::int32_t line = i + place / kTile;
        const bool is_inside = line < depth && column < columns;
        factors[place / kTile][place % kTile] =
            is_inside ? matrix[static_cast<std::int64_t>(line) * columns + column] : 0.0f;
      }
      __syncthreads();
      const int count = min(kDepth, depth - i);
      for (int k = 0; k < count; ++k) {
        for (int r = 0; r < kOwn; ++r) {
          for (int c = 0; c < kOwn; ++c) {
            sums[r][c] = __fmaf_rn(inputs[k][kOwn * y + r], factors[k][x + 16 * c], sums[r][c]);
          }
        }
      }
      __syncthreads();
    }
    for (int r = 0; r < kOwn; ++r) {
      const std::int64_t row = first_row + kOwn * y + r;
      if (row >= lhs.span.rows) break;
      const auto line = store.at(row);
      for (int c = 0; c < kOwn; ++c) {
        const std::int32_t column = first_column + x + 16 * c;
        if (column < columns) line.one(column, sums[r][c]);
      }
    }
  }
}

}  // namespace chain

/// Launches the product; nothing for no rows or no columns.
template <typename T, typename Store>
void launch_chain_product(const ProductRows<T>& lhs, const float* matrix, std::int32_t depth, std::int32_t columns,
                          const Store& store, cudaStream_t stream) {
  if (lhs.span.rows == 0 || columns == 0) return;
  constexpr std::int64_t kMostRowBlocks = 65535;
  const auto across = static_cast<unsigned>(divide_up(columns, chain::kTile));
  const auto down = static_cast<unsigned>(std::min(divide_up(lhs.span.rows, chain::kTile), kMostRowBlocks));
  chain::product_kernel<T><<<dim3(across, down), chain::kThreads, 0, stream>>>(lhs, matrix, depth, columns, store);
  check_cuda(cudaGetLastError(), "launch the product of transform-coded rows");
}

}  // namespace kvpack::cuda
