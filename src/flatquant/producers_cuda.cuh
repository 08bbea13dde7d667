// What stands before the transform: a thread changes the chunks of X in shared memory that it copied there itself.
#pragma once

#include <cstdint>

#include "flatquant/token_tiles_cuda.cuh"

namespace kvpack::cuda {

/// Eight numbers of a chunk as float32.
template <MmaType kType>
__device__ inline void widen(uint4 chunk, float (&values)[kChunk]) {
  const std::uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = lower_value<kType>(words[i]);
    values[2 * i + 1] = upper_value<kType>(words[i]);
  }
}

template <MmaType kType>
__device__ inline uint4 narrow(const float (&values)[kChunk]) {
  return make_uint4(pair_near<kType>(values[0], values[1]), pair_near<kType>(values[2], values[3]),
                    pair_near<kType>(values[4], values[5]), pair_near<kType>(values[6], values[7]));
}

template <MmaType kType>
__device__ inline void multiply_chunk(float (&values)[kChunk], uint4 chunk) {
  float factors[kChunk];
  widen<kType>(chunk, factors);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) values[i] *= factors[i];
}

/// x / (1 + e^-x): for -infinity NaN, as the division says.
__device__ inline float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

/// 1 / sqrt(mean x^2 + epsilon) of the token, in an order that depends on the shape alone. Every thread of the group must call.
template <MmaType kType>
__device__ float norm_factor(const KronKernelParams& params, const Group& group, std::uint32_t stage,
                             GroupExchange& exchange) {
  float squares = 0.0f;
  for_own_chunks(params, group, [&](int row, int chunk) {
    float values[kChunk];
    widen<kType>(load_shared_chunk(stage + params.x_tile.offset(row, chunk)), values);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) squares = __fmaf_rn(values[i], values[i], squares);
  });
  for (int distance = kWarpLanes / 2; distance > 0; distance /= 2) {
    squares += __shfl_xor_sync(kAllLanes, squares, distance);
  }
  if (threadIdx.x % kWarpLanes == 0) exchange.squares[group.warp] = squares;
  group.sync();
  float sum = 0.0f;
  for (int warp = 0; warp < params.group_warps; ++warp) sum += exchange.squares[warp];
  return 1.0f / sqrtf(sum / static_cast<float>(params.rows * params.columns) + params.problem.epsilon);
}

/// Weight of the norm and diagonal, as tiles behind one another, in the layout of X.
__device__ inline void load_vectors(const KronKernelParams& params, std::uint32_t tile) {
  const KronQuantizeProblem& problem = params.problem;
  const bool is_norm = problem.producer == KronProducer::kRmsNorm;
  const int chunks = params.chunks;
  for (const void* vector : {is_norm ? problem.second : nullptr, problem.matrices.diagonal}) {
    if (vector == nullptr) continue;
    const bool is_aligned = has_aligned_rows(vector, params.columns);
    for (int i = static_cast<int>(threadIdx.x); i < params.rows * chunks; i += static_cast<int>(blockDim.x)) {
      const int row = i / chunks;
      const auto* numbers = static_cast<const std::uint16_t*>(vector) + row * params.columns;
      store_shared_chunk(tile + params.x_tile.offset(row, i % chunks),
                         read_chunk(numbers, params.columns, i % chunks, is_aligned));
    }
    tile += params.x_tile.bytes();
  }
}

/// A chunk of the gate's other side.
__device__ inline uint4 chunk_of_second(const KronKernelParams& params, std::int64_t token, std::uint32_t stage,
                                        int row, int chunk) {
  if (params.copies_second) return load_shared_chunk(stage + params.x_tile.bytes() + params.x_tile.offset(row, chunk));
  const auto* numbers = static_cast<const std::uint16_t*>(params.problem.second) + token * params.problem.second_stride;
  return read_chunk(numbers + row * params.columns, params.columns, chunk, params.loads_chunks);
}

/// Turns a copied token into what the transform receives, rounded once. Every thread of the group must call; a barrier must
/// follow.
template <MmaType kType>
__device__ void produce_token(const KronKernelParams& params, const Group& group, std::int64_t token,
                              std::uint32_t stage, std::uint32_t vectors, GroupExchange& exchange) {
  const KronProducer producer = params.problem.producer;
  const bool is_norm = producer == KronProducer::kRmsNorm;
  const bool has_diagonal = params.problem.matrices.diagonal != nullptr;
  if (producer == KronProducer::kNone && !has_diagonal) return;
  const float factor = is_norm ? norm_factor<kType>(params, group, stage, exchange) : 1.0f;
  const std::uint32_t diagonal = vectors + (is_norm ? params.x_tile.bytes() : 0);
  for_own_chunks(params, group, [&](int row, int chunk) {
    const std::uint32_t offset = params.x_tile.offset(row, chunk);
    float values[kChunk];
    widen<kType>(load_shared_chunk(stage + offset), values);
    if (is_norm) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) values[i] *= factor;
      multiply_chunk<kType>(values, load_shared_chunk(vectors + offset));
    }
    if (producer == KronProducer::kSiluMul) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) values[i] = silu(values[i]);
      multiply_chunk<kType>(values, chunk_of_second(params, token, stage, row, chunk));
    }
    if (has_diagonal) multiply_chunk<kType>(values, load_shared_chunk(diagonal + offset));
    store_shared_chunk(stage + offset, narrow<kType>(values));
  });
}

}  // namespace kvpack::cuda
