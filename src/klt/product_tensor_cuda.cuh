// The products of transform-coded rows on tensor cores: each float32 is a sum of two bfloat16, and of the four products of two
// such sums the three largest are taken. docs/decisions/0007-products-of-klt.md states the bound.
//
//   x = hi + lo + at most 2^-18 |x|        x * a = hi*hi' + hi*lo' + lo*hi' + at most 3 * 2^-18 |x * a|
#pragma once

#include <cuda_bf16.h>

#include <algorithm>

#include "core/divide_up.h"
#include "cuda/async_copy.cuh"
#include "cuda/check.h"
#include "cuda/launch.h"
#include "cuda/mma.cuh"
#include "cuda/split_float.cuh"
#include "klt/tokens_cuda.cuh"

namespace kvpack::cuda {

namespace tensor {

constexpr int kThreads = 128;
constexpr int kTile = 128;     // rows and columns of a block
constexpr int kDepth = 32;     // inputs of a step
constexpr int kWarpRows = 64;  // of a warp: 2 warps down, 2 across
constexpr int kWarpColumns = 64;
constexpr int kOwnInputs = 16;  // of its row that a thread brings at a time, and of one instruction
constexpr int kLineBytes = 80;  // of 32 inputs: 16 bytes more than they take, so that 8 lines meet 8 bank groups
constexpr int kSideBytes = kTile * kLineBytes;
constexpr int kStageBytes = 4 * kSideBytes;  // rows hi, rows lo, matrix hi, matrix lo
constexpr int kStages = 2;

/// Splits a matrix [depth, columns] and turns it, so that inputs lie next to each other: [columns, depth], both filled up
/// with zeros to whole tiles.
///
/// Launch  x: blocks of 32 padded columns, y: blocks of 32 padded inputs; 32 x 8 threads
/// Work    a tile of 32 x 32 through shared memory
/// Reads   matrix once
/// Writes  high, low once
/// Needs   nothing
__global__ void __launch_bounds__(256)
    split_matrix_kernel(const float* matrix, std::int32_t depth, std::int32_t columns, std::int64_t padded_depth,
                        __nv_bfloat16* high, __nv_bfloat16* low) {
  __shared__ float tile[32][33];
  const std::int32_t first_column = static_cast<std::int32_t>(blockIdx.x) * 32;
  const std::int32_t first_input = static_cast<std::int32_t>(blockIdx.y) * 32;
  const int x = static_cast<int>(threadIdx.x);
  for (int y = static_cast<int>(threadIdx.y); y < 32; y += 8) {
    const bool is_inside = first_input + y < depth && first_column + x < columns;
    tile[y][x] = is_inside ? matrix[static_cast<std::int64_t>(first_input + y) * columns + first_column + x] : 0.0f;
  }
  __syncthreads();
  for (int y = static_cast<int>(threadIdx.y); y < 32; y += 8) {
    const std::int64_t place = (first_column + y) * padded_depth + first_input + x;
    const float value = tile[x][y];
    const __nv_bfloat16 rounded = __float2bfloat16_rn(value);
    high[place] = rounded;
    low[place] = __float2bfloat16_rn(value - __bfloat162float(rounded));
  }
}

/// A matrix after split_matrix_kernel.
struct SplitMatrix {
  const __nv_bfloat16* high;  // [columns up to whole tiles, padded_depth]
  const __nv_bfloat16* low;
  std::int64_t padded_depth;
};

/// What a thread fetches of its row while the step before is multiplied.
template <typename T>
struct Fetched {
  float values[kOwnInputs];

  /// `source` is the row's token, null beyond the last row; `is_plain`: whole vectors of 16 bytes can be read.
  __device__ void fetch(const T* source, std::int64_t stride, std::int32_t first, std::int32_t depth, bool is_plain) {
    if (source != nullptr && is_plain && first + kOwnInputs <= depth) {
      constexpr int kElements = 16 / sizeof(T);
      for (int i = 0; i < kOwnInputs; i += kElements) {
        alignas(16) T elements[kElements];
        *reinterpret_cast<uint4*>(elements) = *reinterpret_cast<const uint4*>(source + first + i);
        for (int j = 0; j < kElements; ++j) values[i + j] = element_value(elements[j]);
      }
      return;
    }
    for (int i = 0; i < kOwnInputs; ++i) {
      const bool is_inside = source != nullptr && first + i < depth;
      values[i] = is_inside ? element_value(source[(first + i) * stride]) : 0.0f;
    }
  }
  /// Centres, splits and stores; `mean` belongs to these inputs and is 0 beyond the depth.
  __device__ void store(const float* mean, unsigned char* high, unsigned char* low) const {
    for (int i = 0; i < kOwnInputs; i += 8) {
      uint4 highs;
      uint4 lows;
      std::uint32_t* high_words = &highs.x;
      std::uint32_t* low_words = &lows.x;
      for (int j = 0; j < 4; ++j) {
        const SplitPair pair =
            split_pair(values[i + 2 * j] - mean[i + 2 * j], values[i + 2 * j + 1] - mean[i + 2 * j + 1]);
        high_words[j] = pair.high;
        low_words[j] = pair.low;
      }
      *reinterpret_cast<uint4*>(high + 2 * i) = highs;
      *reinterpret_cast<uint4*>(low + 2 * i) = lows;
    }
  }
};

/// Starts the copies of a step's 128 columns x 32 inputs, high and low.
__device__ inline void copy_columns(const SplitMatrix& matrix, std::int32_t first_column, std::int32_t first_input,
                                    std::uint32_t stage) {
  constexpr int kChunks = kDepth * 2 / 16;  // of a line
  for (int chunk = static_cast<int>(threadIdx.x); chunk < kTile * kChunks; chunk += kThreads) {
    const int line = chunk / kChunks;
    const int part = chunk % kChunks;
    const std::int64_t place = (first_column + line) * matrix.padded_depth + first_input + part * 8;
    const std::uint32_t target = stage + 2 * kSideBytes + line * kLineBytes + part * 16;
    copy_quad_async(target, matrix.high + place);
    copy_quad_async(target + kSideBytes, matrix.low + place);
  }
  commit_copies();
}

/// The sums of one lane: [16 rows][8 columns] fragments of mma.cuh.
struct Sums {
  float of[kWarpRows / 16][kWarpColumns / 8][4];
};

/// Multiplies kOwnInputs inputs of a stage into the sums of a warp. The three products of a pair of fragments stand apart,
/// so that no two instructions in a row add to the same sums.
__device__ inline void multiply_inputs(std::uint32_t stage, int warp_row, int warp_column, Sums& sums) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const std::uint32_t rows = stage + (warp_row + lane % 16) * kLineBytes + lane / 16 * 16;
  const std::uint32_t columns =
      stage + 2 * kSideBytes + (warp_column + lane / 16 * 8 + lane % 8) * kLineBytes + lane / 8 % 2 * 16;
  std::uint32_t high[kWarpRows / 16][4];
  std::uint32_t low[kWarpRows / 16][4];
#pragma unroll
  for (int r = 0; r < kWarpRows / 16; ++r) {
    load_matrices(high[r], rows + r * 16 * kLineBytes);
    load_matrices(low[r], rows + r * 16 * kLineBytes + kSideBytes);
  }
#pragma unroll
  for (int pair = 0; pair < kWarpColumns / 16; ++pair) {
    std::uint32_t high_b[4];
    std::uint32_t low_b[4];
    load_matrices(high_b, columns + pair * 16 * kLineBytes);
    load_matrices(low_b, columns + pair * 16 * kLineBytes + kSideBytes);
#pragma unroll
    for (int product = 0; product < 3; ++product) {
      const std::uint32_t (&b)[4] = product == 1 ? low_b : high_b;
#pragma unroll
      for (int r = 0; r < kWarpRows / 16; ++r) {
        const std::uint32_t (&a)[4] = product == 2 ? low[r] : high[r];
        mma_m16n8k16(sums.of[r][2 * pair], a, {b[0], b[1]}, MmaType::kBFloat16);
        mma_m16n8k16(sums.of[r][2 * pair + 1], a, {b[2], b[3]}, MmaType::kBFloat16);
      }
    }
  }
}

/// Hands a warp's sums over, of rows and columns that exist.
template <typename Store>
__device__ inline void store_sums(const Sums& sums, std::int64_t warp_row, std::int64_t rows, std::int32_t warp_column,
                                  std::int32_t columns, const Store& store) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
#pragma unroll
  for (int half = 0; half < 2 * (kWarpRows / 16); ++half) {
    const std::int64_t row = warp_row + half * 8 + lane / 4;
    if (row >= rows) return;
    const auto line = store.at(row);
#pragma unroll
    for (int c = 0; c < kWarpColumns / 8; ++c) {
      const std::int32_t column = warp_column + c * 8 + lane % 4 * 2;
      const float a = sums.of[half / 2][c][half % 2 * 2];
      const float b = sums.of[half / 2][c][half % 2 * 2 + 1];
      if (column + 1 < columns) {
        line.pair(column, a, b);
      } else if (column < columns) {
        line.one(column, a);
      }
    }
  }
}

/// Multiplies rows with a split matrix.
///
///   block   128 rows x 128 columns, 4 warps of 64 x 64        step   32 inputs in one of two stages of shared memory:
///   rows    fetched as T into registers, centred, split and stored behind the products of the step before
///   matrix  split already: cp.async
///
/// Launch  x: blocks of columns, so that neighbours in time share rows; y: blocks of rows (65535 at most, then in strides)
/// Work    a block of outputs at a time
/// Reads   rows once per block of columns, the matrix once per block of rows, from the second-level cache mostly
/// Writes  each output once, through `store`
/// Needs   kStages * kStageBytes of dynamic shared memory and 4 bytes for each input, filled up to steps
template <typename T, typename Store>
__global__ void __launch_bounds__(kThreads, 2)
    product_kernel(ProductRows<T> lhs, SplitMatrix matrix, std::int32_t depth, std::int32_t columns, bool is_plain,
                   Store store) {
  extern __shared__ __align__(16) unsigned char shared[];
  auto* mean = reinterpret_cast<float*>(shared + kStages * kStageBytes);
  const int thread = static_cast<int>(threadIdx.x);
  const auto padded_depth = static_cast<std::int32_t>(matrix.padded_depth);
  for (std::int32_t i = thread; i < padded_depth; i += kThreads) {
    mean[i] = lhs.mean != nullptr && i < depth ? lhs.mean[i] : 0.0f;
  }
  __syncthreads();
  const int warp = thread / kWarpLanes;
  const int warp_row = warp % 2 * kWarpRows;
  const int warp_column = warp / 2 * kWarpColumns;
  const std::uint32_t stages = shared_address(shared);
  const std::int32_t first_column = static_cast<std::int32_t>(blockIdx.x) * kTile;
  const std::int32_t steps = padded_depth / kDepth;
  unsigned char* own = shared + thread * kLineBytes;
  for (std::int64_t first_row = static_cast<std::int64_t>(blockIdx.y) * kTile; first_row < lhs.span.rows;
       first_row += static_cast<std::int64_t>(gridDim.y) * kTile) {
    const bool has_row = first_row + thread < lhs.span.rows;
    const T* source = has_row ? token_of<const T>(lhs.matrix, lhs.span, first_row + thread) : nullptr;
    Sums sums = {};
    Fetched<T> fetched;
    if (steps > 0) copy_columns(matrix, first_column, 0, stages);
    for (int half = 0; half < kDepth && steps > 0; half += kOwnInputs) {
      fetched.fetch(source, lhs.matrix.channel_stride, half, depth, is_plain);
      fetched.store(mean + half, own + 2 * half, own + 2 * half + kSideBytes);
    }
    wait_copies<0>();
    __syncthreads();
    for (std::int32_t step = 0; step < steps; ++step) {
      const bool has_next = step + 1 < steps;
      const std::int32_t next_input = (step + 1) * kDepth;
      unsigned char* next_own = own + (step + 1) % kStages * kStageBytes;
      if (has_next) copy_columns(matrix, first_column, next_input, stages + (step + 1) % kStages * kStageBytes);
#pragma unroll
      for (int half = 0; half < kDepth; half += kOwnInputs) {
        if (has_next) fetched.fetch(source, lhs.matrix.channel_stride, next_input + half, depth, is_plain);
        multiply_inputs(stages + step % kStages * kStageBytes + 2 * half, warp_row, warp_column, sums);
        if (has_next) fetched.store(mean + next_input + half, next_own + 2 * half, next_own + 2 * half + kSideBytes);
      }
      wait_copies<0>();
      __syncthreads();
    }
    store_sums(sums, first_row + warp_row, lhs.span.rows, first_column + warp_column, columns, store);
  }
}

/// Memory of a split matrix.
inline std::int64_t split_bytes(std::int32_t depth, std::int32_t columns) {
  return 4 * round_up(depth, kDepth) * round_up(columns, kTile);
}

/// Splits a matrix into `memory` of split_bytes(), at a multiple of 16.
inline SplitMatrix launch_split(const float* matrix, std::int32_t depth, std::int32_t columns, unsigned char* memory,
                                cudaStream_t stream) {
  const std::int64_t padded_depth = round_up(depth, kDepth);
  auto* high = reinterpret_cast<__nv_bfloat16*>(memory);
  __nv_bfloat16* low = high + round_up(columns, kTile) * padded_depth;
  if (low == high) return {high, low, padded_depth};
  const dim3 blocks(static_cast<unsigned>(round_up(columns, kTile) / 32), static_cast<unsigned>(padded_depth / 32));
  split_matrix_kernel<<<blocks, dim3(32, 8), 0, stream>>>(matrix, depth, columns, padded_depth, high, low);
  check_cuda(cudaGetLastError(), "launch the splitting of a matrix");
  return {high, low, padded_depth};
}

}  // namespace tensor

/// Launches the product; nothing for no rows or no columns.
template <typename T, typename Store>
void launch_tensor_product(const ProductRows<T>& lhs, const tensor::SplitMatrix& matrix, std::int32_t depth,
                           std::int32_t columns, const Store& store, cudaStream_t stream) {
  if (lhs.span.rows == 0 || columns == 0) return;
  constexpr std::int64_t kMostRowBlocks = 65535;
  const KltMatrix& rows = lhs.matrix;
  constexpr std::int64_t kVector = 16 / sizeof(T);
  const bool is_plain = rows.channel_stride == 1 && rows.token_stride % kVector == 0 &&
                        rows.sequence_stride % kVector == 0 && reinterpret_cast<std::uintptr_t>(rows.data) % 16 == 0;
  const int bytes = tensor::kStages * tensor::kStageBytes + static_cast<int>(4 * matrix.padded_depth);
  check_cuda(cudaFuncSetAttribute(tensor::product_kernel<T, Store>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
             "reserve shared memory for the product of transform-coded rows");
  const auto across = static_cast<unsigned>(divide_up(columns, tensor::kTile));
  const auto down = static_cast<unsigned>(std::min(divide_up(lhs.span.rows, tensor::kTile), kMostRowBlocks));
  tensor::product_kernel<T>
      <<<dim3(across, down), tensor::kThreads, bytes, stream>>>(lhs, matrix, depth, columns, is_plain, store);
  check_cuda(cudaGetLastError(), "launch the product of transform-coded rows");
}

}  // namespace kvpack::cuda
