// The value side of attention on tiles: weighted sums of 64 channels, each tile expanded once for all query columns of a
// KV head. Weights come as they are, or as logits that are softmaxed on the way.
#pragma once

#include <cstdint>

#include "attend/tile_stream_cuda.cuh"

namespace kvpack::cuda {

/// What the weights are.
enum class WeightInput : std::int32_t {
  kWeights,  // p in 16 bits
  kLogits,   // log2 p + anything, float32, as keys_cuda.cuh writes them
};

struct ValuesParams {
  Tile64Data tiles;
  const std::uint16_t* weights = nullptr;  // kWeights: [batches, columns, tokens]
  const float* logits = nullptr;           // kLogits: [batches, columns, blocks*64]
  float* sums = nullptr;                   // [batches, splits, columns, head_dim]
  float2* maxima = nullptr;                // kLogits: [batches, splits, columns] largest logit, sum of weights
  WeightInput input = WeightInput::kWeights;
  MmaType type = MmaType::kHalf;
  std::int32_t columns = 0;
  std::int32_t blocks = 0;
  std::int32_t block_stride = 0;  // blocks of a split
};

/// Weights are 2^14 times too large inside, so that those down to 2^-28 of the largest are normal halves.
inline constexpr float kWeightShift = 14.0f;

/// 2^x, at least to 22 bits; what is below the normal numbers becomes 0.
__device__ inline float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

/// One warp's softmax so far, for the column lane/4 of each 8: the four lanes of a column know the same maximum, and each
/// its own part of the sum.
template <int kTiles>
struct WarpSoftmax {
  float largest[kTiles];
  float sum[kTiles];
};

/// Weights of a block's 64 tokens as B fragments: of[n][k] holds tokens 16*k + {2i, 2i+1, 2i+8, 2i+9}, column lane/4.
/// A weight of bfloat16 is wrong by 2^-9, more than the output may be, so what rounding took away is multiplied as well.
template <int kTiles>
struct BlockWeights {
  uint2 of[kTiles][4];
  uint2 residual[kTiles][4];  // softmax in bfloat16 only
};

/// Starts the loads of a block's weights or logits: 16 tokens a lane and column.
template <int kTiles>
__device__ inline void load_weights(const ValuesParams& params, std::int64_t batch, int first_column, int block,
                                    int lane, std::uint32_t (&raw)[kTiles][16]) {
  const int token = block * static_cast<int>(kTileElements) + lane % 4 * 2;
  const int tokens = static_cast<int>(params.tiles.tokens);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int column = first_column + n * kColumnsOfMma + lane / 4;
    // Columns that do not exist read the last one; nobody looks at their sums.
    const std::int64_t row = batch * params.columns + min(column, params.columns - 1);
    if (params.input == WeightInput::kLogits) {
      const float* logits = params.logits + row * params.blocks * kTileElements + token;
#pragma unroll
      for (int pair = 0; pair < 8; ++pair) {  // pair 2*k: tokens 16*k + 2i ..; 2*k+1: eight further
        const float2 both = __ldcs(reinterpret_cast<const float2*>(logits + pair * 8));
        raw[n][2 * pair] = __float_as_uint(both.x);
        raw[n][2 * pair + 1] = __float_as_uint(both.y);
      }
    } else {
      const std::uint16_t* weights = params.weights + row * tokens + token;
#pragma unroll
      for (int pair = 0; pair < 8; ++pair) {
        const int left = tokens - token - pair * 8;
        raw[n][2 * pair] = left > 0 ? weights[pair * 8] : 0u;
        raw[n][2 * pair + 1] = left > 1 ? weights[pair * 8 + 1] : 0u;
      }
    }
  }
}

/// Multiplies the sums of column 2i and 2i+1 by the factors that the lanes of those columns hold.
template <int kTiles>
__device__ inline void rescale(Products<kTiles>& sums, const float (&factor)[kTiles], int lane) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const float even = __shfl_sync(kAllLanes, factor[n], lane % 4 * 8);
    const float odd = __shfl_sync(kAllLanes, factor[n], lane % 4 * 8 + 4);
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      sums.of[n][m][0] *= even;
      sums.of[n][m][1] *= odd;
      sums.of[n][m][2] *= even;
      sums.of[n][m][3] *= odd;
    }
  }
}

/// What two floats lost when they were rounded to the two bfloat16 of `rounded`.
__device__ inline std::uint32_t pack_residuals(float low, float high, std::uint32_t rounded) {
  return pack_floats(low - __uint_as_float(rounded << 16), high - __uint_as_float(rounded & 0xffff0000u),
                     MmaType::kBFloat16);
}

/// Online softmax over one block: new maxima, sums rescaled where they grew, weights 2^(logit - maximum + shift).
template <int kTiles>
__device__ inline BlockWeights<kTiles> soften(const std::uint32_t (&raw)[kTiles][16], WarpSoftmax<kTiles>& softmax,
                                              Products<kTiles>& sums, int lane, MmaType type) {
  BlockWeights<kTiles> weights;
  float factor[kTiles];
  bool grew = false;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    float largest = softmax.largest[n];
#pragma unroll
    for (int i = 0; i < 16; ++i) largest = fmaxf(largest, __uint_as_float(raw[n][i]));
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
    // -inf - -inf is no number: while nothing was seen, the origin is 0.
    const float origin = largest == -INFINITY ? 0.0f : largest;
    const float shifted = origin - kWeightShift;
    factor[n] = exp2_fast(softmax.largest[n] - origin);
    grew |= largest > softmax.largest[n];
    softmax.largest[n] = largest;
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float weight[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weight[i] = exp2_fast(__uint_as_float(raw[n][4 * k + i]) - shifted);
        sum += weight[i];
      }
      weights.of[n][k] = make_uint2(pack_floats(weight[0], weight[1], type), pack_floats(weight[2], weight[3], type));
      if (type == MmaType::kBFloat16) {
        weights.residual[n][k] = make_uint2(pack_residuals(weight[0], weight[1], weights.of[n][k].x),
                                            pack_residuals(weight[2], weight[3], weights.of[n][k].y));
      }
    }
    softmax.sum[n] = softmax.sum[n] * factor[n] + sum;
  }
  if (__any_sync(kAllLanes, grew)) rescale(sums, factor, lane);
  return weights;
}

/// Weights that are given, as B fragments.
template <int kTiles>
__device__ inline BlockWeights<kTiles> pack_weights(const std::uint32_t (&raw)[kTiles][16]) {
  BlockWeights<kTiles> weights;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      weights.of[n][k] =
          make_uint2(raw[n][4 * k] | raw[n][4 * k + 1] << 16, raw[n][4 * k + 2] | raw[n][4 * k + 3] << 16);
    }
  }
  return weights;
}

/// Adds up the warps' sums in their order and writes the split's. `memory` has room for kAttendWarps pieces.
template <int kTiles>
__device__ inline void combine_warps(const ValuesParams& params, std::int64_t batch, int part, int first_column,
                                     const Products<kTiles>& sums, const WarpSoftmax<kTiles>& softmax, float* memory) {
  constexpr int kColumns = kTiles * kColumnsOfMma;
  constexpr int kPiece = kColumns * (kTileElements + 2);  // sums [column][channel], maxima, weights
  const int lane = threadIdx.x % kWarpLanes;
  float* piece = memory + threadIdx.x / kWarpLanes * kPiece;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = n * kColumnsOfMma + lane % 4 * 2 + i % 2;
        piece[column * kTileElements + 16 * m + lane / 4 + i / 2 * 8] = sums.of[n][m][i];
      }
    }
    float sum = softmax.sum[n];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    if (lane % 4 == 0) {
      piece[kColumns * kTileElements + n * kColumnsOfMma + lane / 4] = softmax.largest[n];
      piece[kColumns * (kTileElements + 1) + n * kColumnsOfMma + lane / 4] = sum;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kColumns * kTileElements; i += kAttendThreads) {
    const int column = i / kTileElements;
    if (first_column + column >= params.columns) continue;
    const float* maxima = memory + kColumns * kTileElements + column;
    float largest = -INFINITY;
    for (int warp = 0; warp < kAttendWarps; ++warp) largest = fmaxf(largest, maxima[warp * kPiece]);
    const float origin = largest == -INFINITY ? 0.0f : largest;
    float sum = 0.0f, weight = 0.0f;
    for (int warp = 0; warp < kAttendWarps; ++warp) {
      const float factor = exp2f(maxima[warp * kPiece] - origin);
      sum += factor * memory[warp * kPiece + i];
      weight += factor * maxima[warp * kPiece + kColumns];
    }
    const std::int64_t row = (batch * gridDim.x + blockIdx.x) * params.columns + first_column + column;
    const int channel = i % kTileElements;
    params.sums[row * params.tiles.head_dim + part * kTileElements + channel] = sum;
    if (params.input == WeightInput::kLogits && part == 0 && channel == 0) {
      params.maxima[row] = make_float2(largest, weight);
    }
  }
}

/// Weighted sums of one batch's values over a split of the tokens, for 64 channels and up to 8*kTiles query columns.
///   Launch    grid (splits, batches*head_dim/64, ceil(columns/(8*kTiles))), 8 warps; dynamic shared memory:
///             stream_memory_bytes, at least what combine_warps takes
///   Work      a warp takes every 8th block of the split: two steps of 32 tokens
///   Reads     tiles once per 8*kTiles columns; weights or logits once per 64 channels
///   Writes    sums of the split, and for logits its largest one and the sum of weights
///   Needs     nothing of the bytes: tiles that point outside the payload are zeros
///
///   step 1, as rows in shared memory                        product: O[channel][column] += row^T * p
///     lane 0:  token 32, channels 0 .. 63                     A = 16 channels x 16 tokens (ldmatrix.trans)
///     lane 31: token 63, channels 0 .. 63                     B = 16 tokens x 8 columns
template <int kBits, int kTiles>
__global__ void __launch_bounds__(kAttendThreads, kResident)
    multiply_values_kernel(const __grid_constant__ ValuesParams params) {
  extern __shared__ __align__(16) std::uint32_t shared[];
  std::uint32_t* table = shared;
  auto* warps = reinterpret_cast<WarpMemory<kBits>*>(table + kTableWords<kBits>);
  fill_table<kBits>(table);
  __syncthreads();

  const int thread = thread_index();
  const int lane = thread % kWarpLanes;
  const int warp = thread / kWarpLanes;
  const int head_dim = static_cast<int>(params.tiles.head_dim);
  const int parts = head_dim / static_cast<int>(kTileElements);
  const std::int64_t batch = blockIdx.y / parts;
  const int part = blockIdx.y % parts;
  const int first_column = blockIdx.z * kTiles * kColumnsOfMma;
  const int first_block = blockIdx.x * params.block_stride + warp;
  const int end_block = min(params.blocks, static_cast<int>(blockIdx.x + 1) * params.block_stride);
  const int first_tile = first_block * head_dim + part * static_cast<int>(kTileElements);
  TileWalk walk;
  walk.blocks = first_block < end_block ? (end_block - first_block + kAttendWarps - 1) / kAttendWarps : 0;
  walk.step_bits = 1;
  walk.jump = kAttendWarps * head_dim - static_cast<int>(kTileElements);

  Products<kTiles> sums;
  sums.clear();
  const bool softens = params.input == WeightInput::kLogits;
  const bool has_residual = softens && params.type == MmaType::kBFloat16;
  WarpSoftmax<kTiles> softmax;
  for (int n = 0; n < kTiles; ++n) {
    softmax.largest[n] = softens ? -INFINITY : 0.0f;
    softmax.sum[n] = 0.0f;
  }
  std::uint32_t raw[kTiles][16];
  BlockWeights<kTiles> weights;
  int block = first_block;
  WarpMemory<kBits>& memory = warps[warp];
  const std::uint32_t matrices = first_matrix(shared_address(memory.rows), lane);
  // With 16 columns there are no registers to hold logits while tiles expand; the other warps hide the wait.
  constexpr bool kLoadsEarly = kTiles == 1;
  stream_tiles<kBits>(
      source_of<kBits>(params.tiles, batch, first_tile + lane), walk, memory, table, lane, params.type,
      [&](int step) {
        if (kLoadsEarly && step % 2 == 0) load_weights(params, batch, first_column, block, lane, raw);
      },
      [&](int step) {
        if (step % 2 == 0) {
          if (!kLoadsEarly) load_weights(params, batch, first_column, block, lane, raw);
          weights = softens ? soften(raw, softmax, sums, lane, params.type) : pack_weights(raw);
          block += kAttendWarps;
          multiply_rows(sums, matrices, params.type, [&](int k, int n) { return weights.of[n][k]; });
          if (has_residual) {
            multiply_rows(sums, matrices, params.type, [&](int k, int n) { return weights.residual[n][k]; });
          }
        } else {
          multiply_rows(sums, matrices, params.type, [&](int k, int n) { return weights.of[n][2 + k]; });
          if (has_residual) {
            multiply_rows(sums, matrices, params.type, [&](int k, int n) { return weights.residual[n][2 + k]; });
          }
        }
      });
  __syncthreads();
  combine_warps(params, batch, part, first_column, sums, softmax, reinterpret_cast<float*>(shared));
}

}  // namespace kvpack::cuda
