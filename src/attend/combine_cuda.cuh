// The end of attention on tiles: splits are added up in their order, the dense recent window joins, sums are divided.
#pragma once

#include <cstdint>

#include "attend/implementations.h"
#include "attend/values_cuda.cuh"
#include "cuda/element.cuh"

namespace kvpack::cuda {

struct CombineParams {
  const float* sums = nullptr;     // [batches, splits, columns, head_dim]
  const float2* maxima = nullptr;  // [batches, splits, columns]; null: plain sums, nothing to divide by
  void* out = nullptr;             // [batches, columns, head_dim]
  float* lse = nullptr;            // [batches, columns] or null
  const void* q = nullptr;         // [batches, columns, head_dim]; for the recent window
  DenseMatrices recent_keys;
  DenseMatrices recent_values;
  std::int32_t columns = 0;
  std::int32_t splits = 0;
  std::int32_t head_dim = 0;
  std::int32_t rows = 1;  // query tokens: row = column mod rows
  std::int64_t recent_tokens = 0;
  Masking masking = Masking::kNone;
  float scale = 1.0f;
  float softcap = 0.0f;
};

inline constexpr int kCombineThreads = 128;
inline constexpr int kCombineWarps = kCombineThreads / kWarpLanes;
inline constexpr int kRecentChunk = 256;                             // recent tokens whose scores are held at a time
inline constexpr int kMostChannelsOfThread = 256 / kCombineThreads;  // head_dim is at most 256

/// One query's softmax over everything so far; every thread holds its own channels.
struct QuerySums {
  float largest = -INFINITY;
  float weight = 0.0f;
  float channels[kMostChannelsOfThread] = {};

  /// Makes room for logits up to `candidate`; returns the origin that weights are relative to.
  __device__ float raise(float candidate) {
    const float before = largest;
    largest = fmaxf(largest, candidate);
    const float origin = largest == -INFINITY ? 0.0f : largest;
    const float factor = exp2f(before - origin);
    weight *= factor;
    for (float& channel : channels) channel *= factor;
    return origin;
  }
};

template <typename T>
__device__ inline const T* recent_row(const DenseMatrices& matrices, std::int64_t batch, std::int64_t token) {
  return static_cast<const T*>(matrices.data) + matrices.row_start(batch, token);
}

/// Logits of up to kRecentChunk recent tokens in units of log2, a warp a token.
template <typename T>
__device__ inline void score_recent(const CombineParams& params, std::int64_t batch, const T* q, std::int64_t first,
                                    int count, float* logits) {
  const int lane = threadIdx.x % kWarpLanes;
  for (int i = threadIdx.x / kWarpLanes; i < count; i += kCombineWarps) {
    const T* key = recent_row<T>(params.recent_keys, batch, first + i);
    float score = 0.0f;
    for (int channel = lane; channel < params.head_dim; channel += kWarpLanes) {
      score += element_value(q[channel]) * element_value(key[channel]);
    }
    for (int distance = kWarpLanes / 2; distance > 0; distance /= 2) {
      score += __shfl_xor_sync(kAllLanes, score, distance);
    }
    score *= params.scale;
    if (params.softcap > 0.0f) score = params.softcap * tanhf(score / params.softcap);
    if (lane == 0) logits[i] = score * kLog2E;
  }
}

template <typename T>
__device__ inline void attend_recent(const CombineParams& params, std::int64_t batch, int column, QuerySums& query,
                                     float* logits) {
  const T* q = static_cast<const T*>(params.q) + (batch * params.columns + column) * params.head_dim;
  std::int64_t visible = params.recent_tokens;
  if (params.masking == Masking::kCausal) visible -= params.rows - 1 - column % params.rows;
  for (std::int64_t first = 0; first < visible; first += kRecentChunk) {
    const int count = static_cast<int>(min(visible - first, static_cast<std::int64_t>(kRecentChunk)));
    score_recent(params, batch, q, first, count, logits);
    __syncthreads();
    float largest = -INFINITY;
    for (int i = 0; i < count; ++i) largest = fmaxf(largest, logits[i]);
    const float origin = query.raise(largest);
    for (int i = 0; i < count; ++i) {
      const float weight = exp2f(logits[i] - origin + kWeightShift);
      const T* value = recent_row<T>(params.recent_values, batch, first + i);
      query.weight += weight;
      for (int j = 0; j < kMostChannelsOfThread; ++j) {
        const int channel = threadIdx.x + j * kCombineThreads;
        if (channel < params.head_dim) query.channels[j] += weight * element_value(value[channel]);
      }
    }
    __syncthreads();
  }
}

/// One query column of one batch: out = sums of all splits and the recent window, divided by their weight.
///
///   logits are in units of log2     largest   weight   channel 0      with origin 5
///   split 0 of two                        3        2           8      factor 1/4:  0.5    2
///   split 1                               5        1           6      factor 1:    1      6     out = 8 / 1.5
///
///   Launch    grid (columns, batches), 128 threads
///   Work      a thread holds channels t and t + 128
///   Reads     partial sums; recent keys and values once per query column
///   Writes    out, and lse where asked for; 0 and -inf where there are no tokens
///   Needs     T is the type of q, out and recent tokens
template <typename T>
__global__ void __launch_bounds__(kCombineThreads) combine_splits_kernel(const __grid_constant__ CombineParams params) {
  __shared__ float logits[kRecentChunk];
  const int column = blockIdx.x;
  const std::int64_t batch = blockIdx.y;
  const bool softens = params.maxima != nullptr;
  QuerySums query;
  for (int split = 0; split < params.splits; ++split) {
    const std::int64_t row = (batch * params.splits + split) * params.columns + column;
    float factor = 1.0f;
    if (softens) {
      const float2 maximum = params.maxima[row];
      const float origin = query.raise(maximum.x);
      factor = exp2f(maximum.x - origin);
      query.weight += factor * maximum.y;
    }
    for (int j = 0; j < kMostChannelsOfThread; ++j) {
      const int channel = threadIdx.x + j * kCombineThreads;
      if (channel < params.head_dim) query.channels[j] += factor * params.sums[row * params.head_dim + channel];
    }
  }
  if (params.recent_tokens > 0) attend_recent<T>(params, batch, column, query, logits);
  const std::int64_t row = batch * params.columns + column;
  for (int j = 0; j < kMostChannelsOfThread; ++j) {
    const int channel = threadIdx.x + j * kCombineThreads;
    if (channel >= params.head_dim) continue;
    float value = query.channels[j];
    if (softens) value = query.weight == 0.0f ? 0.0f : value / query.weight;
    set_element(value, static_cast<T*>(params.out)[row * params.head_dim + channel]);
  }
  if (params.lse != nullptr && threadIdx.x == 0) {
    params.lse[row] = query.weight == 0.0f ? -INFINITY : (query.largest - kWeightShift + log2f(query.weight)) / kLog2E;
  }
}

}  // namespace kvpack::cuda
