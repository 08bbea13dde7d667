// Coefficients to the bytes of rows on the GPU; back: expand_cuda.cuh, many tokens faster: pack_cuda.cuh. A warp takes some
// tokens, or a block one where there are few: threads are coefficients while codes are found, and short runs of bits while a
// row is put together.
#pragma once

#include <cuda_fp16.h>

#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "cuda/split_float.cuh"
#include "formats/klt_rows/coefficients_cuda.cuh"
#include "klt/implementations.h"

namespace kvpack::cuda {

namespace rows {

/// r from its sum of squares and how many there are.
__device__ inline __half rounded_scale(float sum, std::int32_t count) {
  const __half rms = __float2half_rn(klt_rms(sum, count));
  return __ushort_as_half(static_cast<unsigned short>(klt_scale_bits(klt_scale_code(__half_as_ushort(rms)))));
}

/// r of one token, the same in all lanes; lane i sums strand i.
__device__ inline __half scale_of(const float* z, const std::int32_t* in_scale, std::int32_t coefficients) {
  static_assert(kKltStrands == kWarpLanes);
  float strand = 0.0f;
  std::int32_t count = 0;
#pragma unroll 8
  for (auto k = static_cast<std::int32_t>(threadIdx.x) % kWarpLanes; k < coefficients; k += kWarpLanes) {
    const bool takes_part = in_scale[k] != 0;
    const float square = z[k] * z[k];
    strand = takes_part ? strand + square : strand;
    count += takes_part ? 1 : 0;
  }
  for (int half = kWarpLanes / 2; half > 0; half /= 2) {
    strand = strand + __shfl_down_sync(kAllLanes, strand, half);
    count += __shfl_down_sync(kAllLanes, count, half);
  }
  return rounded_scale(__shfl_sync(kAllLanes, strand, 0), __shfl_sync(kAllLanes, count, 0));
}

/// Threads that take the same tokens: a warp, or all of a block where there are few tokens.
template <int kSize>
struct Team {
  static_assert(kSize == kWarpLanes || kSize == kThreads);
  static constexpr int kTeams = kThreads / kSize;  // of a block
  static __device__ int member() { return static_cast<int>(threadIdx.x) % kSize; }
  static __device__ int number() { return static_cast<int>(threadIdx.x) / kSize; }
  static __device__ void sync() {
    if constexpr (kSize == kWarpLanes) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
};

/// How many boundaries lie below y: one after another where they are few, else by halves. Boundaries ascend; for NaN none does.
template <int kTogether>
__device__ inline void find_codes(const float (&y)[kTogether], const Coefficient& coefficient, const float* boundaries,
                                  std::uint32_t (&codes)[kTogether]) {
  constexpr int kFewLevels = 8;
  const float* boundary = boundaries + coefficient.first_boundary;
  const int levels = coefficient.levels;
  const int stride = coefficient.boundary_stride;
#pragma unroll
  for (int u = 0; u < kTogether; ++u) codes[u] = 0;
  if (levels <= kFewLevels) {
#pragma unroll
    for (int j = 0; j + 1 < kFewLevels; ++j) {
      if (j + 1 >= levels) break;
      const float limit = boundary[j * stride];
#pragma unroll
      for (int u = 0; u < kTogether; ++u) codes[u] += y[u] > limit ? 1u : 0u;
    }
    return;
  }
  for (int step = levels > 32 ? 32 : (levels > 16 ? 16 : 8); step > 0; step /= 2) {
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      const int next = static_cast<int>(codes[u]) + step;
      if (next < levels && y[u] > boundary[(next - 1) * stride]) codes[u] = static_cast<std::uint32_t>(next);
    }
  }
}

/// Bits of a row from a token's pieces into its words, which hold zeros there.
__device__ inline void put_unit(const Unit& unit, const std::uint8_t* pieces, std::uint32_t* words) {
  std::uint32_t number = 0;
  for (int i = unit.count - 1; i >= 0; --i) number = number * unit.multiplier + pieces[unit.first_piece + i];
  const int place = unit.bit % 32;
  atomicOr(words + unit.bit / 32, number << place);
  const std::uint32_t rest = place == 0 ? 0u : number >> (32 - place);
  if (rest != 0) atomicOr(words + unit.bit / 32 + 1, rest);
}

/// What quantising and expanding read and write. Trivially copyable.
struct Parts {
  RowPlan plan;
  const Coefficient* coefficients;  // [coded]
  const Unit* units;                // [plan.units]
  const float* boundaries;
  const float* centroids;
  const std::int32_t* in_scale;  // [num_coefficients]
  std::int32_t num_coefficients;
  float* values;  // [rows, pitch] coefficients or centroids
  std::int64_t pitch;
  float* scales;  // [rows], or null
  KltRowsData rows;
  std::int64_t tokens;     // of a sequence
  std::int64_t first_row;  // of this chunk
  std::int64_t num_rows;
  bool splits_centroids;  // into SplitFloat, in the memory of a float
  TileTables tiles;
};

/// A centroid as `values` holds it.
__device__ inline float stored_centroid(const Parts& parts, float centroid) {
  return parts.splits_centroids ? __uint_as_float(split_float(centroid).bits) : centroid;
}

__device__ inline std::uint16_t* row_of(const Parts& parts, std::int64_t row) {
  const std::int64_t place = parts.first_row + row;
  // A division of 64 bits takes five times the instructions of one of 32.
  const bool is_small = ((place | parts.tokens) >> 32) == 0;
  const std::int64_t sequence =
      is_small ? static_cast<std::uint32_t>(place) / static_cast<std::uint32_t>(parts.tokens) : place / parts.tokens;
  std::uint8_t* bytes = parts.rows.data + sequence * parts.rows.sequence_stride +
                        (place - sequence * parts.tokens) * parts.plan.layout.row_bytes;
  return reinterpret_cast<std::uint16_t*>(bytes);
}

/// Scales of several tokens and their inverses, the same in all lanes; every warp finds them for itself. Tokens beyond the last
/// one get 0.
template <int kTogether>
struct TokenScales {
  __half scales[kTogether];
  float inverses[kTogether];

  __device__ TokenScales(const Parts& parts, std::int64_t first) {
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      scales[u] = __ushort_as_half(0);
      if (first + u < parts.num_rows && parts.plan.layout.coded > 0) {
        scales[u] = scale_of(parts.values + (first + u) * parts.pitch, parts.in_scale, parts.num_coefficients);
      }
      inverses[u] = klt_inverse_scale(__half2float(scales[u]));
    }
  }
};

/// Words of 32 bits that hold a token's row.
KVPACK_HOST_DEVICE inline std::int32_t row_words(const RowPlan& plan) { return (plan.layout.row_bytes + 3) / 4; }

/// Bytes of shared memory for a token that is packed: its pieces, filled up to words, and its row.
KVPACK_HOST_DEVICE inline std::int32_t packing_bytes(const RowPlan& plan) {
  return (plan.pieces + 3) / 4 * 4 + 4 * row_words(plan);
}

/// Writes the rows of coefficients.
///
///   members   z0 z1 ... z31 | z32 ...       y = z / r against the boundaries of each, kTogether tokens at a time
///   pieces    02 01 | 1 2 0 | ...           bytes of shared memory, section after section
///   members   unit 0 | unit 1 | ...         a number of several pieces each, into words of shared memory
///
/// Launch  any number of blocks of kThreads; a team of kTeam for kTogether tokens
/// Work    codes into pieces, pieces into words, words out
/// Reads   values once or twice, boundaries from the cache
/// Writes  rows once
/// Needs   teams * kTogether * packing_bytes(plan) of dynamic shared memory
template <int kTogether, int kTeam>
__global__ void __launch_bounds__(kThreads) pack_kernel(Parts parts) {
  extern __shared__ std::uint32_t all_words[];
  const int member = Team<kTeam>::member();
  const std::int32_t num_words = row_words(parts.plan);
  const std::int32_t size = packing_bytes(parts.plan) / 4;
  std::uint32_t* words = all_words + Team<kTeam>::number() * kTogether * size;
  constexpr int kBlockTokens = Team<kTeam>::kTeams * kTogether;
  for (std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kBlockTokens + Team<kTeam>::number() * kTogether;
       first < parts.num_rows; first += static_cast<std::int64_t>(gridDim.x) * kBlockTokens) {
    const TokenScales<kTogether> scales(parts, first);
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      for (std::int32_t i = member; i < num_words; i += kTeam) {
        words[u * size + i] = i == 0 ? __half_as_ushort(scales.scales[u]) >> kKltScaleShift : 0u;
      }
    }
    for (std::int32_t k = member; k < parts.plan.layout.coded; k += kTeam) {
      const Coefficient coefficient = parts.coefficients[k];
      float y[kTogether];
      std::uint32_t codes[kTogether];
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        const bool exists = first + u < parts.num_rows;
        y[u] = exists ? parts.values[(first + u) * parts.pitch + k] * scales.inverses[u] : 0.0f;
      }
      find_codes(y, coefficient, parts.boundaries, codes);
      const std::uint32_t mask = (1u << coefficient.low_bits) - 1u;
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        auto* pieces = reinterpret_cast<std::uint8_t*>(words + u * size + num_words);
        if (coefficient.field_bit >= 0) pieces[coefficient.field_piece] = static_cast<std::uint8_t>(codes[u] & mask);
        if (coefficient.digit_bit >= 0) {
          pieces[coefficient.digit_piece] = static_cast<std::uint8_t>(codes[u] >> coefficient.low_bits);
        }
      }
    }
    Team<kTeam>::sync();
    for (std::int32_t i = member; i < parts.plan.units; i += kTeam) {
      const Unit unit = parts.units[i];
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        put_unit(unit, reinterpret_cast<const std::uint8_t*>(words + u * size + num_words), words + u * size);
      }
    }
    Team<kTeam>::sync();
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      if (first + u >= parts.num_rows) break;
      std::uint16_t* row = row_of(parts, first + u);
      const auto* halves = reinterpret_cast<const std::uint16_t*>(words + u * size);
      for (std::int32_t i = member; i < parts.plan.layout.row_bytes / 2; i += kTeam) row[i] = halves[i];
    }
    Team<kTeam>::sync();  // the next tokens write the same words
  }
}

/// Replaces coefficients by the centroids of their codes, without the bytes in between.
///
/// Launch  any number of blocks of kThreads; a team of kTeam for kTogether tokens
/// Work    members are coefficients
/// Reads   values once or twice, boundaries and centroids from the cache
/// Writes  values once, zeros behind them; scales once
/// Needs   nothing
template <int kTogether, int kTeam>
__global__ void __launch_bounds__(kThreads) quantize_kernel(Parts parts) {
  const int member = Team<kTeam>::member();
  constexpr int kBlockTokens = Team<kTeam>::kTeams * kTogether;
  for (std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kBlockTokens + Team<kTeam>::number() * kTogether;
       first < parts.num_rows; first += static_cast<std::int64_t>(gridDim.x) * kBlockTokens) {
    const TokenScales<kTogether> scales(parts, first);
    Team<kTeam>::sync();  // all coefficients were read for the scales
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      if (member == 0 && first + u < parts.num_rows) parts.scales[first + u] = __half2float(scales.scales[u]);
    }
    for (std::int32_t k = member; k < parts.pitch; k += kTeam) {
      const bool is_coded = k < parts.plan.layout.coded;
      const Coefficient coefficient = is_coded ? parts.coefficients[k] : Coefficient{};
      float y[kTogether];
      std::uint32_t codes[kTogether];
      float* values = parts.values + first * parts.pitch + k;
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        y[u] = first + u < parts.num_rows ? values[u * parts.pitch] * scales.inverses[u] : 0.0f;
      }
      find_codes(y, coefficient, parts.boundaries, codes);  // none for 0 levels
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        if (first + u >= parts.num_rows) break;
        values[u * parts.pitch] =
            is_coded ? stored_centroid(parts, parts.centroids[coefficient.first_centroid + codes[u]]) : 0.0f;
      }
    }
  }
}

}  // namespace rows

}  // namespace kvpack::cuda
