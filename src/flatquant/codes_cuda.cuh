// From the products of a token to its codes: the range over all warps, the grid, rounding, packing, stores.
//
// A lane of a warp holds 2*kTiles neighbours of two rows of Y (load_right says why), rows 16*strip + lane/4 and 8 further:
//   y[t][0], y[t][1]   columns 2*kTiles*(lane%4) + 2t and + 2t+1 of the first row
//   y[t][2], y[t][3]   the same of the second row
#pragma once

#include <cstdint>

#include "flatquant/codes.h"
#include "flatquant/rules.h"
#include "flatquant/token_tiles_cuda.cuh"

namespace kvpack::cuda {

/// Writes the largest magnitudes of this warp's part of Y, on both sides of zero, where the group reads them. Numbers that are
/// not negative are ordered as their bits, infinity and NaN last.
template <int kTiles>
__device__ inline void publish_range(const KronKernelParams& params, const Group& group, const float (&y)[kTiles][4],
                                     GroupExchange& exchange) {
  float highest = 0.0f;
  float lowest = 0.0f;
  if (params.needs_both_sides) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        highest = max_or_nan(highest, y[t][i]);
        lowest = max_or_nan(lowest, -y[t][i]);
      }
    }
  } else {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) highest = max_or_nan(highest, fabsf(y[t][i]));
    }
  }
  constexpr std::uint32_t kMagnitude = 0x7fffffffu;  // a zero of -0 would be the largest of all
  const std::uint32_t high_bits = warp_most(__float_as_uint(highest) & kMagnitude);
  const std::uint32_t low_bits = params.needs_both_sides ? warp_most(__float_as_uint(lowest) & kMagnitude) : high_bits;
  if (threadIdx.x % kWarpLanes != 0) return;
  exchange.highest[group.warp] = high_bits;
  exchange.lowest[group.warp] = low_bits;
}

/// The range of the whole token, after a barrier behind publish_range.
__device__ inline RowRange read_range(const KronKernelParams& params, const GroupExchange& exchange) {
  constexpr std::uint32_t kInfinity = 0x7f800000u;
  std::uint32_t highest = 0;
  std::uint32_t lowest = 0;
  for (int warp = 0; warp < params.group_warps; ++warp) {
    highest = max(highest, exchange.highest[warp]);
    lowest = max(lowest, exchange.lowest[warp]);
  }
  RowRange range;
  range.highest = __uint_as_float(highest);
  range.lowest = -__uint_as_float(lowest);
  range.is_finite = max(highest, lowest) < kInfinity;
  return range;
}

/// Whether codes can leave -8 .. 7 before they are clamped: not where a row's largest magnitude alone made its scale.
enum class Clamping : std::int32_t { kClamp, kNone };

/// What turns values into codes: RNE by adding 1.5 * 2^23, whose last bits then are the code before its zero is added.
struct CodeMaker {
  float inverse;
  float least;  // bounds of the sum: codes -8 and 7
  float most;
  std::int32_t zero;
  std::uint32_t flip;  // what becomes of the sign bits of a word

  static constexpr float kRounder = 12582912.0f;
  static constexpr std::uint32_t kRounderBits = 0x4b400000u;

  __device__ static CodeMaker of(const RowGrid& grid, CodeEncoding encoding) {
    return {grid.inverse, kRounder + (kLowestCode - grid.zero), kRounder + (kHighestCode - grid.zero),
            static_cast<std::int32_t>(grid.zero), encoding == CodeEncoding::kOffset ? 0u : 0x88888888u};
  }
  /// Bits of the rounder plus a code without its zero.
  template <Clamping kClamping>
  __device__ std::uint32_t code_bits(float value) const {
    float sum = __fmaf_rn(value, inverse, kRounder);
    if (kClamping == Clamping::kClamp) sum = fminf(fmaxf(sum, least), most);
    return __float_as_uint(sum);
  }
  __device__ int code(float value) const {
    return static_cast<int>(code_bits<Clamping::kClamp>(value) - kRounderBits) + zero;
  }
  /// Eight codes as a word. Codes plus 8 are digits to the base of 16, so that the word is a sum, and what rounders and zeros add
  /// to it is one constant.
  template <Clamping kClamping, int kTiles>
  __device__ std::uint32_t word(const float (&y)[kTiles][4], int first_tile, int half) const {
    std::uint32_t digits[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) digits[i] = code_bits<kClamping>(y[first_tile + i / 2][2 * half + i % 2]);
    return finish_word(digits);
  }
  /// Sums by halves: a chain of eight would be what warps wait for.
  __device__ std::uint32_t finish_word(const std::uint32_t (&d)[8]) const {
    const std::uint32_t low = (d[3] * 16 + d[2]) * 256 + (d[1] * 16 + d[0]);
    const std::uint32_t high = (d[7] * 16 + d[6]) * 256 + (d[5] * 16 + d[4]);
    constexpr std::uint32_t kOnes = 0x11111111u;
    const std::uint32_t added = (static_cast<std::uint32_t>(zero) + 8u - kRounderBits) * kOnes;
    return (high * 65536 + (low + added)) ^ flip;
  }
  /// Four codes of each of two rows, the first row's below.
  template <Clamping kClamping, int kTiles>
  __device__ std::uint32_t two_rows(const float (&y)[kTiles][4], int first_tile) const {
    std::uint32_t digits[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) digits[i] = code_bits<kClamping>(y[first_tile + i % 4 / 2][i / 4 * 2 + i % 2]);
    return finish_word(digits);
  }
  /// Four codes as bytes.
  template <Clamping kClamping, int kTiles>
  __device__ std::uint32_t bytes(const float (&y)[kTiles][4], int first_tile, int half) const {
    std::uint32_t sums[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] = code_bits<kClamping>(y[first_tile + i / 2][2 * half + i % 2]);
    const std::uint32_t low = __byte_perm(sums[0], sums[1], 0x0040);
    const std::uint32_t high = __byte_perm(sums[2], sums[3], 0x0040);
    const std::uint32_t packed = __byte_perm(low, high, 0x5410);
    return zero == 0 ? packed : __vadd4(packed, static_cast<std::uint32_t>(zero & 0xff) * 0x01010101u);
  }
};

/// Writes kWords words that lie together: 16, 8 or 4 bytes at a time where all of them are inside the row, else those that are.
template <int kWords>
__device__ inline void store_words(std::uint32_t* target, const std::uint32_t (&words)[kWords], int valid,
                                   bool is_vector) {
  if (is_vector) {
    if constexpr (kWords % 4 == 0) {
#pragma unroll
      for (int w = 0; w < kWords; w += 4) {
        *reinterpret_cast<uint4*>(target + w) = make_uint4(words[w], words[w + 1], words[w + 2], words[w + 3]);
      }
    } else if constexpr (kWords % 2 == 0) {
#pragma unroll
      for (int w = 0; w < kWords; w += 2) {
        *reinterpret_cast<uint2*>(target + w) = make_uint2(words[w], words[w + 1]);
      }
    } else {
      *target = words[0];
    }
    return;
  }
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    if (w < valid) target[w] = words[w];
  }
}

/// Stores a lane's part of one row of Y: words of packed codes or of bytes.
template <Clamping kClamping, int kTiles>
__device__ inline void store_row(const KronKernelParams& params, const CodeMaker& maker, const float (&y)[kTiles][4],
                                 int half, bool is_finite, std::byte* row, int first_column) {
  const int columns = params.columns - first_column;
  if (columns <= 0) return;
  if (params.problem.form == CodeForm::kInt8) {
    constexpr int kWords = kTiles / 2;
    std::uint32_t words[kWords];
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = is_finite ? maker.bytes<kClamping>(y, 2 * w, half) : 0u;
    store_words(reinterpret_cast<std::uint32_t*>(row + first_column), words, columns / 4, params.stores_vectors);
  } else {
    constexpr int kWords = kTiles / 4;
    std::uint32_t words[kWords];
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      words[w] = is_finite ? maker.word<kClamping>(y, 4 * w, half) : ~maker.flip & 0x88888888u;
    }
    store_words(reinterpret_cast<std::uint32_t*>(row + first_column / 2), words, columns / 8, params.stores_vectors);
  }
}

/// The way for rows of X that no word fits: codes as bytes into shared memory, then packed from there. Every thread of the group
/// must call.
template <int kTiles>
__device__ void store_by_pairs(const KronKernelParams& params, const Group& group, const RowGrid& grid,
                               const float (&y)[kTiles][4], std::byte* row, std::int8_t* codes) {
  const KronQuantizeProblem& problem = params.problem;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const bool is_finite = grid.inverse != 0.0f;
  const CodeMaker maker = CodeMaker::of(grid, problem.encoding);
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int x_row = 16 * group.warp + lane / 4 + i / 2 * 8;
      const int column = 2 * kTiles * (lane % 4) + 2 * t + i % 2;
      if (x_row >= params.rows || column >= params.columns) continue;
      codes[x_row * params.columns + column] = static_cast<std::int8_t>(is_finite ? maker.code(y[t][i]) : 0);
    }
  }
  group.sync();
  const int n = params.rows * params.columns;
  if (problem.form == CodeForm::kInt8) {
    for (int i = group.thread; i < n; i += group.threads) reinterpret_cast<std::int8_t*>(row)[i] = codes[i];
  } else {
    for (int i = group.thread; i < n / 2; i += group.threads) {
      write_pair(row, i, codes[2 * i], codes[2 * i + 1], problem.encoding);
    }
  }
  group.sync();  // the next output writes the same memory
}

/// Quantises one token for every output.
template <int kTiles>
__device__ inline void store_token(const KronKernelParams& params, const Group& group, std::int64_t token,
                                   const RowRange& range, const float (&y)[kTiles][4], std::int8_t* codes) {
  const KronQuantizeProblem& problem = params.problem;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const std::int64_t row_bytes = row_bytes_of_codes(problem.form, params.rows * params.columns);
  for (int i = 0; i < problem.num_outputs; ++i) {
    const KronOutputData& output = params.outputs[i];
    const RowGrid grid = make_row_grid(range, output.clip_max, output.clip_min, problem.is_affine);
    auto* row = static_cast<std::byte*>(output.codes) + token * row_bytes;
    if (group.thread == 0) {
      output.scales[token] = grid.scale;
      if (output.zeros != nullptr) output.zeros[token] = grid.zero;
    }
    if (!params.stores_words) {
      store_by_pairs(params, group, grid, y, row, codes);
      continue;
    }
    const CodeMaker maker = CodeMaker::of(grid, problem.encoding);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int x_row = 16 * group.warp + lane / 4 + 8 * half;
      if (x_row >= params.rows) continue;
      std::byte* const first = row + row_bytes_of_codes(problem.form, x_row * params.columns);
      const int column = 2 * kTiles * (lane % 4);
      if (params.clamps) {
        store_row<Clamping::kClamp>(params, maker, y, half, grid.inverse != 0.0f, first, column);
      } else {
        store_row<Clamping::kNone>(params, maker, y, half, grid.inverse != 0.0f, first, column);
      }
    }
  }
}

}  // namespace kvpack::cuda
