// The key side of attention on tiles: scores of all query columns of a KV head, each tile expanded once for them.
#pragma once

#include <cstdint>

#include "attend/tile_stream_cuda.cuh"

namespace kvpack::cuda {

/// What becomes of q . k.
enum class ScoreOutput : std::int32_t {
  kProduct,  // as it is, in the type of q
  kLogits,   // scaled, capped, in units of log2 and float32; tokens that only fill up a block get -inf
};

struct KeysParams {
  Tile64Data tiles;
  const std::uint16_t* q = nullptr;  // [batches, columns, head_dim]
  std::uint16_t* out = nullptr;      // kProduct: [batches, columns, tokens]
  float* logits = nullptr;           // kLogits: [batches, columns, blocks*64]
  ScoreOutput output = ScoreOutput::kProduct;
  MmaType type = MmaType::kHalf;
  std::int32_t columns = 0;
  std::int32_t blocks = 0;        // of 64 tokens
  std::int32_t block_stride = 0;  // blocks of a thread block: [x*stride, (x+1)*stride)
  float scale = 1.0f;             // kLogits: from q . k to units of log2, or with a cap to those of softcap_inverse
  float softcap = 0.0f;           // in units of log2; 0: none
  float softcap_inverse = 0.0f;   // of the cap in units of scale
};

/// Puts q as B fragments into shared memory: [head_dim/16][kTiles][lane], columns that do not exist are zeros.
template <int kTiles>
__device__ inline void load_queries(const KeysParams& params, std::int64_t batch, int first_column, uint2* fragments) {
  const int head_dim = static_cast<int>(params.tiles.head_dim);
  const int count = head_dim / 16 * kTiles * kWarpLanes;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int lane = i % kWarpLanes;
    const int column = first_column + i / kWarpLanes % kTiles * kColumnsOfMma + lane / 4;
    const int channel = i / (kWarpLanes * kTiles) * 16 + lane % 4 * 2;
    uint2 fragment = make_uint2(0, 0);
    if (column < params.columns) {
      const std::uint16_t* q = params.q + (batch * params.columns + column) * head_dim + channel;
      fragment.x = q[0] | static_cast<std::uint32_t>(q[1]) << 16;
      fragment.y = q[8] | static_cast<std::uint32_t>(q[9]) << 16;
    }
    fragments[i] = fragment;
  }
}

/// A warp's scores of one block to where they belong; `token` is that of the first row of a lane's fragment.
template <int kTiles>
__device__ inline void store_scores(const KeysParams& params, std::int64_t batch, int first_column, int token, int lane,
                                    Products<kTiles>& scores) {
  const int padded = params.blocks * static_cast<int>(kTileElements);
  const int visible = static_cast<int>(params.tiles.tokens) - token;  // rows at and above fill up the last block
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int column = first_column + n * kColumnsOfMma + lane % 4 * 2 + odd;
      if (column >= params.columns) continue;
      const std::int64_t row = batch * params.columns + column;
      if (params.output == ScoreOutput::kLogits) {
        float* logits = params.logits + row * padded + token;
#pragma unroll
        for (int i = 0; i < 8; ++i) {  // rows g and g + 8 of four fragments: every eighth token
          float score = scores.of[n][i / 2][odd + i % 2 * 2] * params.scale;
          if (params.softcap > 0.0f) score = params.softcap * tanhf(score * params.softcap_inverse);
          logits[8 * i] = 8 * i < visible ? score : -INFINITY;
        }
      } else {
        std::uint16_t* out = params.out + row * params.tiles.tokens + token;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float score = scores.of[n][i / 2][odd + i % 2 * 2];
          if (8 * i < visible) out[8 * i] = static_cast<std::uint16_t>(pack_floats(score, 0.0f, params.type));
        }
      }
    }
  }
}

/// Scores of one batch's tokens for up to 8*kTiles query columns.
///   Launch    grid (ceil(blocks/block_stride), batches, ceil(columns/(8*kTiles))), 8 warps; dynamic shared memory:
///             stream_memory_bytes + 256 bytes a (16 channels, 8 columns)
///   Work      a warp takes every 8th block of 64 tokens; head_dim/32 steps of 32 channels each
///   Reads     tiles once per 8*kTiles columns; q once a thread block
///   Writes    scores, see ScoreOutput
///   Needs     nothing of the bytes: tiles that point outside the payload are zeros
///
///   step 1 of head_dim 128, as rows in shared memory        product: S[token][column] += row^T * q
///     lane 0:  channel 32, tokens 0 .. 63                     A = 16 tokens x 16 channels (ldmatrix.trans)
///     lane 31: channel 63, tokens 0 .. 63                     B = 16 channels x 8 columns
template <int kBits, int kTiles>
__global__ void __launch_bounds__(kAttendThreads, kResident)
    multiply_keys_kernel(const __grid_constant__ KeysParams params) {
  extern __shared__ __align__(16) std::uint32_t shared[];
  std::uint32_t* table = shared;
  auto* warps = reinterpret_cast<WarpMemory<kBits>*>(table + kTableWords<kBits>);
  auto* queries = reinterpret_cast<uint2*>(warps + kAttendWarps);
  const std::int64_t batch = blockIdx.y;
  const int first_column = blockIdx.z * kTiles * kColumnsOfMma;
  fill_table<kBits>(table);
  load_queries<kTiles>(params, batch, first_column, queries);
  __syncthreads();

  const int thread = thread_index();
  const int lane = thread % kWarpLanes;
  const int warp = thread / kWarpLanes;
  const int head_dim = static_cast<int>(params.tiles.head_dim);
  const int first_block = blockIdx.x * params.block_stride + warp;
  const int end_block = min(params.blocks, static_cast<int>(blockIdx.x + 1) * params.block_stride);
  const int first_tile = first_block * head_dim;
  TileWalk walk;
  walk.blocks = first_block < end_block ? (end_block - first_block + kAttendWarps - 1) / kAttendWarps : 0;
  walk.step_bits = 31 - __clz(head_dim / kStepTiles);  // head_dim is a power of two
  walk.jump = (kAttendWarps - 1) * head_dim;
  const int last_step = (1 << walk.step_bits) - 1;

  Products<kTiles> scores;
  scores.clear();
  int token = first_block * static_cast<int>(kTileElements) + lane / 4;
  WarpMemory<kBits>& memory = warps[warp];
  const std::uint32_t matrices = first_matrix(shared_address(memory.rows), lane);
  stream_tiles<kBits>(
      source_of<kBits>(params.tiles, batch, first_tile + lane), walk, memory, table, lane, params.type, [](int) {},
      [&](int step) {
        const uint2* fragments = queries + (step & last_step) * 2 * kTiles * kWarpLanes + lane;
        multiply_rows(scores, matrices, params.type,
                      [&](int k, int n) { return fragments[(k * kTiles + n) * kWarpLanes]; });
        if ((step & last_step) != last_step) return;
        store_scores(params, batch, first_column, token, lane, scores);
        scores.clear();
        token += kAttendWarps * kTileElements;
      });
}

}  // namespace kvpack::cuda
