// From Y of a warpgroup to codes, in kron_stream_kernel: as codes_cuda.cuh, for shapes that are known when it is compiled.
//
// right's columns are dealt so that a lane holds whole words: with N = 8*tiles, the first 32*(tiles / 4) columns in runs of
// 8*(tiles / 4) a lane, then, where 16 are left, four a lane. With 10 tiles (80 columns), lane i of 4:
//   tiles 0 .. 7   columns 16*i .. 16*i+15         tiles 8, 9   columns 64 + 4*i .. 64 + 4*i+3
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/element.cuh"
#include "cuda/global_store.cuh"
#include "flatquant/codes_cuda.cuh"

namespace kvpack::cuda {

/// One launch of kron_stream_kernel.
struct StreamParams {
  CUtensorMap x_map;  // [tokens, M, N]
  const void* left = nullptr;
  const void* right = nullptr;
  KronOutputData outputs[kMaxKronOutputs] = {};
  std::int32_t tokens = 0;
  std::int64_t row_bytes = 0;  // of codes of a token
  std::int32_t rows = 0;       // M
  std::int32_t num_outputs = 0;
  CodeForm form = CodeForm::kInt8;
  CodeEncoding encoding = CodeEncoding::kTwosComplement;
  bool is_affine = false;
  bool needs_both_sides = false;
  bool clamps = false;
};

/// Where two neighbouring columns of right go.
struct DealtPair {
  int tile;
  int lane;
};

template <int kTiles>
__device__ constexpr DealtPair deal_pair(int column) {
  constexpr int kRun = 8 * (kTiles / 4);
  if (column < 4 * kRun) return {column % kRun / 2, column / kRun};
  const int rest = column - 4 * kRun;
  return {kRun / 2 + rest % 4 / 2, rest / 4};
}

/// The chunks of a square matrix, with zeros around it, that a thread brings: kCount, kChunks a row, some at a time.
template <MmaType kType, int kCount, int kChunks, int kThreads>
struct MatrixPart {
  static constexpr int kMine = (kCount + kThreads - 1) / kThreads;
  static constexpr int kBatch = kMine < 9 ? kMine : 8;

  uint4 values[kBatch];

  /// Of the identity where there is no matrix.
  __device__ void load(const void* matrix, int side, int first) {
    const auto* numbers = static_cast<const std::uint16_t*>(matrix);
    const bool is_aligned = has_aligned_rows(matrix, side);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int index = static_cast<int>(threadIdx.x) + (first + i) * kThreads;
      const int row = index / kChunks;
      const int chunk = index % kChunks;
      values[i] = make_uint4(0, 0, 0, 0);
      if (index >= kCount || row >= side) continue;
      if (matrix == nullptr) {
        const std::uint32_t one = row / kChunk == chunk ? one_bits<kType>() << (16 * (row % 2)) : 0u;
        const int word = row % kChunk / 2;
        values[i] = make_uint4(word == 0 ? one : 0u, word == 1 ? one : 0u, word == 2 ? one : 0u, word == 3 ? one : 0u);
      } else if (is_aligned) {
        if (chunk * kChunk < side) values[i] = *reinterpret_cast<const uint4*>(numbers + row * side + chunk * kChunk);
      } else {
        values[i] = read_chunk(numbers + row * side, side, chunk, false);
      }
    }
  }
  template <typename Store>
  __device__ void store(int first, Store store_chunk) const {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int index = static_cast<int>(threadIdx.x) + (first + i) * kThreads;
      if (index < kCount) store_chunk(index / kChunks, index % kChunks, values[i]);
    }
  }
};

/// Writes the largest magnitudes of this warp's part of Y where its group reads them: codes_cuda.cuh.
template <typename Shape>
__device__ inline void publish_stream_range(const StreamParams& params,
                                            const float (&y)[Shape::kHalves][Shape::kTiles][4], std::uint32_t* highest,
                                            std::uint32_t* lowest, int warp) {
  constexpr std::uint32_t kMagnitude = 0x7fffffffu;
  float high[4] = {};
  float low[4] = {};
  if (params.needs_both_sides) {
#pragma unroll
    for (int h = 0; h < Shape::kHalves; ++h) {
#pragma unroll
      for (int t = 0; t < Shape::kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          high[i] = max_or_nan(high[i], y[h][t][i]);
          low[i] = max_or_nan(low[i], -y[h][t][i]);
        }
      }
    }
    const float most = max_or_nan(max_or_nan(low[0], low[1]), max_or_nan(low[2], low[3]));
    const std::uint32_t bits = warp_most(__float_as_uint(most) & kMagnitude);
    if (threadIdx.x % kWarpLanes == 0) lowest[warp] = bits;
  } else {
#pragma unroll
    for (int h = 0; h < Shape::kHalves; ++h) {
#pragma unroll
      for (int t = 0; t < Shape::kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) high[i] = max_or_nan(high[i], fabsf(y[h][t][i]));
      }
    }
  }
  const float most = max_or_nan(max_or_nan(high[0], high[1]), max_or_nan(high[2], high[3]));
  const std::uint32_t bits = warp_most(__float_as_uint(most) & kMagnitude);
  if (threadIdx.x % kWarpLanes == 0) {
    highest[warp] = bits;
    if (!params.needs_both_sides) lowest[warp] = bits;
  }
}

/// The range of the token, after a barrier behind publish_stream_range.
template <int kWarps>
__device__ inline RowRange read_stream_range(const std::uint32_t* highest, const std::uint32_t* lowest) {
  constexpr std::uint32_t kInfinity = 0x7f800000u;
  std::uint32_t high = highest[0];
  std::uint32_t low = lowest[0];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) {
    high = max(high, highest[i]);
    low = max(low, lowest[i]);
  }
  RowRange range;
  range.highest = __uint_as_float(high);
  range.lowest = -__uint_as_float(low);
  range.is_finite = max(high, low) < kInfinity;
  return range;
}

/// make_row_grid of rules.h for the symmetric grid, without the branches that IEEE's division has for numbers which do not occur:
/// the quotients of normal numbers are the same bits.
__device__ inline RowGrid make_symmetric_grid(const RowRange& range, float clip_max, float clip_min) {
  constexpr float kSmallestNormal = 0x1p-126f;
  constexpr float kLargest = 0x1.fffffep127f;
  constexpr float kSeventh = 1.0f / 7.0f;
  const float span = fmaxf(clip_max * range.highest, -clip_min * range.lowest);
  const float near = span * kSeventh;
  float scale = __fmaf_rn(__fmaf_rn(-7.0f, near, span), kSeventh, near);
  if (scale < kSmallestNormal) scale = 1.0f;
  float inverse = fast_reciprocal(scale);
  inverse = __fmaf_rn(__fmaf_rn(-scale, inverse, 1.0f), inverse, inverse);
  if (!range.is_finite || !(span <= kLargest)) return {kNaN, 0.0f, 0.0f};
  return {scale, inverse, 0.0f};
}

/// Writes words that lie together, or nothing.
template <int kWords>
__device__ inline void store_run(std::byte* target, const std::uint32_t (&words)[kWords], bool is_inside) {
  if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int w = 0; w < kWords; w += 4) {
      store_quad_if(is_inside, target + 4 * w, make_uint4(words[w], words[w + 1], words[w + 2], words[w + 3]));
    }
  } else if constexpr (kWords % 2 == 0) {
#pragma unroll
    for (int w = 0; w < kWords; w += 2) {
      store_pair_if(is_inside, target + 4 * w, make_uint2(words[w], words[w + 1]));
    }
  } else {
#pragma unroll
    for (int w = 0; w < kWords; ++w) store_word_if(is_inside, target + 4 * w, words[w]);
  }
}

/// Codes of two rows of Y, 8 apart, as packed words: `row` is the first one's.
template <Clamping kClamping, int kTiles>
__device__ inline void store_packed_rows(const CodeMaker& maker, const float (&y)[kTiles][4], bool is_finite,
                                         std::byte* row, int lane_of_4, bool has_first, bool has_second) {
  constexpr int kRuns = kTiles / 4;
  constexpr int kPitch = 4 * kTiles;  // bytes of a row
  const std::uint32_t nothing = ~maker.flip & 0x88888888u;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    std::uint32_t words[kRuns];
#pragma unroll
    for (int w = 0; w < kRuns; ++w) {
      words[w] = maker.template word<kClamping>(y, 4 * w, half);
      if (!is_finite) words[w] = nothing;
    }
    store_run(row + 8 * half * kPitch + 4 * kRuns * lane_of_4, words, half == 0 ? has_first : has_second);
  }
  if constexpr (kTiles % 4 == 2) {
    // Four codes of each row: an even lane completes the word of the first row, an odd one that of the second.
    const std::uint32_t mine = maker.template two_rows<kClamping>(y, kTiles - 2);
    const std::uint32_t other = __shfl_xor_sync(kAllLanes, mine, 1);
    const bool is_odd = lane_of_4 % 2 != 0;
    std::uint32_t word = is_odd ? __byte_perm(other, mine, 0x7632) : __byte_perm(mine, other, 0x5410);
    if (!is_finite) word = nothing;
    store_word_if(is_odd ? has_second : has_first, row + (is_odd ? 8 * kPitch : 0) + 16 * kRuns + lane_of_4 / 2 * 4,
                  word);
  }
}

/// The same as bytes.
template <Clamping kClamping, int kTiles>
__device__ inline void store_byte_rows(const CodeMaker& maker, const float (&y)[kTiles][4], bool is_finite,
                                       std::byte* row, int lane_of_4, bool has_first, bool has_second) {
  constexpr int kRuns = kTiles / 4;
  constexpr int kPitch = 8 * kTiles;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool is_inside = half == 0 ? has_first : has_second;
    std::uint32_t words[2 * kRuns];
#pragma unroll
    for (int w = 0; w < 2 * kRuns; ++w) {
      words[w] = maker.template bytes<kClamping>(y, 2 * w, half);
      if (!is_finite) words[w] = 0;
    }
    store_run(row + 8 * half * kPitch + 8 * kRuns * lane_of_4, words, is_inside);
    if constexpr (kTiles % 4 == 2) {
      const std::uint32_t word = maker.template bytes<kClamping>(y, kTiles - 2, half);
      store_word_if(is_inside, row + 8 * half * kPitch + 32 * kRuns + 4 * lane_of_4, is_finite ? word : 0u);
    }
  }
}

/// Quantises 16 rows of a token, and those 64 further where a warp has them, for every output. `strip`: warp within the token.
template <typename Shape>
__device__ inline void store_stream(const StreamParams& params, int token, int strip, int lane, const RowRange& range,
                                    const float (&y)[Shape::kHalves][Shape::kTiles][4]) {
  constexpr int kTiles = Shape::kTiles;
  if (Shape::kStacked > 1 && token >= params.tokens) return;  // the last token of an odd number stands alone
  const int first_row = 16 * strip + lane / 4;
  for (int i = 0; i < params.num_outputs; ++i) {
    const KronOutputData& output = params.outputs[i];
    const RowGrid grid = params.is_affine ? make_row_grid(range, output.clip_max, output.clip_min, true)
                                          : make_symmetric_grid(range, output.clip_max, output.clip_min);
    if (strip == 0 && lane == 0) {
      output.scales[token] = grid.scale;
      if (output.zeros != nullptr) output.zeros[token] = grid.zero;
    }
    const CodeMaker maker = CodeMaker::of(grid, params.encoding);
    const bool is_finite = grid.inverse != 0.0f;
    std::byte* const codes = static_cast<std::byte*>(output.codes) + token * params.row_bytes;
#pragma unroll
    for (int half = 0; half < Shape::kHalves; ++half) {
      const int row = first_row + 64 * half;
      const bool has_first = row < params.rows;
      const bool has_second = row + 8 < params.rows;
      if (params.form == CodeForm::kInt8) {
        std::byte* const first = codes + row * (8 * kTiles);
        if (params.clamps) {
          store_byte_rows<Clamping::kClamp>(maker, y[half], is_finite, first, lane % 4, has_first, has_second);
        } else {
          store_byte_rows<Clamping::kNone>(maker, y[half], is_finite, first, lane % 4, has_first, has_second);
        }
      } else {
        std::byte* const first = codes + row * (4 * kTiles);
        if (params.clamps) {
          store_packed_rows<Clamping::kClamp>(maker, y[half], is_finite, first, lane % 4, has_first, has_second);
        } else {
          store_packed_rows<Clamping::kNone>(maker, y[half], is_finite, first, lane % 4, has_first, has_second);
        }
      }
    }
  }
}

}  // namespace kvpack::cuda
