// Tokens of the dense side as products on the GPU read and write them: a span of all sequences' tokens, row after row.
#pragma once

#include "cuda/element.cuh"
#include "klt/implementations.h"

namespace kvpack::cuda {

/// Rows [first_row, first_row + rows) of a call: row n is token first_token + n mod tokens of sequence n div tokens.
struct TokenSpan {
  std::int64_t first_token = 0;
  std::int64_t tokens = 1;
  std::int64_t first_row = 0;
  std::int64_t rows = 0;
};

/// Where a row's token lies in a matrix of elements T.
template <typename T>
__device__ inline T* token_of(const KltMatrix& matrix, const TokenSpan& span, std::int64_t row) {
  const std::int64_t place = span.first_row + row;
  const std::int64_t sequence = place / span.tokens;
  const std::int64_t token = span.first_token + place % span.tokens;
  return static_cast<T*>(matrix.data) + sequence * matrix.sequence_stride + token * matrix.token_stride;
}

/// The left side of a product: rows of T, less the mean.
template <typename T>
struct ProductRows {
  KltMatrix matrix;
  TokenSpan span;
  const float* mean = nullptr;  // [depth], or null: 0
};

// Where sums go: at(row) prepares a row, and what it returns takes single sums and pairs of neighbouring columns. kAddsMean: its
// mean may be replaced by a nearer copy. kHasChunks: where takes_chunks() holds, 8 columns can be written at once, as
// the words of 4 pairs.

/// Keeps sums as they are.
struct StoreSums {
  static constexpr bool kAddsMean = false;
  static constexpr bool kHasChunks = false;
  float* sums;  // [rows, pitch], pitch even
  std::int64_t pitch;
  struct Line {
    float* line;
    __device__ void one(std::int32_t column, float sum) const { line[column] = sum; }
    __device__ void pair(std::int32_t column, float a, float b) const {
      *reinterpret_cast<float2*>(line + column) = make_float2(a, b);
    }
  };
  __device__ Line at(std::int64_t row) const { return {sums + row * pitch}; }
};

/// mean + r * sum, as float32 for what comes after.
struct StoreScaled {
  static constexpr bool kAddsMean = true;
  static constexpr bool kHasChunks = false;
  float* out;  // [rows, pitch]
  std::int64_t pitch;
  const float* scales;  // [rows]
  const float* mean;
  struct Line {
    float* line;
    const float* mean;
    float scale;
    __device__ void one(std::int32_t column, float sum) const { line[column] = __fmaf_rn(scale, sum, mean[column]); }
    __device__ void pair(std::int32_t column, float a, float b) const {
      one(column, a);
      one(column + 1, b);
    }
  };
  __device__ Line at(std::int64_t row) const { return {out + row * pitch, mean, scales[row]}; }
};

/// The same, rounded to the type of the tokens that are wanted.
template <typename T>
struct StoreTokens {
  static constexpr bool kAddsMean = true;
  static constexpr bool kHasChunks = sizeof(T) == 2;
  KltMatrix out;
  TokenSpan span;
  const float* scales;  // [rows]
  const float* mean;
  struct alignas(2 * sizeof(T)) Pair {
    T elements[2];
  };
  struct Line {
    T* token;
    const float* mean;
    float scale;
    std::int64_t stride;
    bool takes_pairs;
    __device__ void one(std::int32_t column, float sum) const {
      set_element(__fmaf_rn(scale, sum, mean[column]), token[column * stride]);
    }
    __device__ void pair(std::int32_t column, float a, float b) const {
      if (!takes_pairs) {
        one(column, a);
        one(column + 1, b);
        return;
      }
      *reinterpret_cast<Pair*>(token + column) = elements({mean[column], mean[column + 1]}, a, b);
    }
    [[nodiscard]] __device__ Pair elements(float2 means, float a, float b) const {
      Pair both;
      set_element(__fmaf_rn(scale, a, means.x), both.elements[0]);
      set_element(__fmaf_rn(scale, b, means.y), both.elements[1]);
      return both;
    }
    [[nodiscard]] __device__ std::uint32_t word(float2 means, float a, float b) const {
      const Pair both = elements(means, a, b);
      return both.elements[0].bits | static_cast<std::uint32_t>(both.elements[1].bits) << 16;
    }
  };
  /// The same for all rows.
  [[nodiscard]] __device__ bool takes_chunks(std::int32_t columns) const {
    return out.channel_stride == 1 && columns % 8 == 0 && out.token_stride % 8 == 0 && out.sequence_stride % 8 == 0 &&
           reinterpret_cast<std::uintptr_t>(out.data) % 16 == 0;
  }
  __device__ Line at(std::int64_t row) const {
    T* token = token_of<T>(out, span, row);
    const bool takes_pairs = out.channel_stride == 1 && reinterpret_cast<std::uintptr_t>(token) % sizeof(Pair) == 0;
    return {token, mean, scales[row], out.channel_stride, takes_pairs};
  }
};

}  // namespace kvpack::cuda
