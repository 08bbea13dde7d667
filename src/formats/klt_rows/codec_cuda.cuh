// Coefficients to the bytes of rows and back on the GPU. A warp takes a token: lanes are coefficients while codes are found,
// and words of 16 bits while a row is put together, so that no two lanes write to one place.
#pragma once

#include <cuda_fp16.h>

#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "formats/klt_rows/coefficients_cuda.cuh"
#include "klt/implementations.h"

namespace kvpack::cuda {

namespace rows {

/// r of one token, the same in all lanes; lane i sums strand i.
__device__ inline __half scale_of(const float* z, const std::int32_t* in_scale, std::int32_t coefficients) {
  static_assert(kKltStrands == kWarpLanes);
  float strand = 0.0f;
  std::int32_t count = 0;
  for (auto k = static_cast<std::int32_t>(threadIdx.x) % kWarpLanes; k < coefficients; k += kWarpLanes) {
    if (in_scale[k] == 0) continue;
    const float square = z[k] * z[k];
    strand = strand + square;
    ++count;
  }
  for (int half = kWarpLanes / 2; half > 0; half /= 2) {
    strand = strand + __shfl_down_sync(kAllLanes, strand, half);
    count += __shfl_down_sync(kAllLanes, count, half);
  }
  const float sum = __shfl_sync(kAllLanes, strand, 0);
  const __half rms = __float2half_rn(klt_rms(sum, __shfl_sync(kAllLanes, count, 0)));
  return __ushort_as_half(static_cast<unsigned short>(klt_scale_bits(klt_scale_code(__half_as_ushort(rms)))));
}

/// Codes of one coefficient of several tokens: its boundaries are read once for all.
template <int kTogether>
__device__ inline void find_codes(const float (&y)[kTogether], const Coefficient& coefficient, const float* boundaries,
                                  std::uint32_t (&codes)[kTogether]) {
  const float* boundary = boundaries + coefficient.first_boundary;
  for (int u = 0; u < kTogether; ++u) codes[u] = 0;
  for (int j = 0; j + 1 < coefficient.levels; ++j) {
    const float limit = boundary[j * coefficient.boundary_stride];
#pragma unroll
    for (int u = 0; u < kTogether; ++u) codes[u] += y[u] > limit ? 1u : 0u;
  }
}

/// Bits [16 * index, 16 * index + 16) of a row, from a token's pieces.
__device__ inline std::uint32_t word_of(const RowPlan& plan, const std::uint8_t* pieces, std::int32_t index) {
  const std::int32_t first_bit = 16 * index;
  std::uint32_t word = 0;
  const auto add = [&](std::uint32_t value, std::int32_t place) {
    word |= place >= 0 ? value << place : value >> -place;
  };
  for (std::int32_t s = 0; s < klt_rows::kNumFieldSections; ++s) {
    const std::int32_t first = plan.layout.first_field_bit[s];
    const std::int32_t width = klt_rows::field_bits(s);
    for (std::int32_t i = max(0, (first_bit - first) / width); i < plan.layout.num_fields[s]; ++i) {
      const std::int32_t place = first + i * width - first_bit;
      if (place >= 16) break;
      add(pieces[plan.first_field_piece[s] + i], place);
    }
  }
  for (std::int32_t s = 0; s < klt_rows::kNumDigitSections; ++s) {
    const std::int32_t first = plan.layout.first_digit_bit[s];
    const std::int32_t full = klt_rows::group_digits(s);
    const std::int32_t bits = klt_rows::group_bits(s, full);
    for (std::int32_t g = max(0, (first_bit - first) / bits); g * full < plan.layout.num_digits[s]; ++g) {
      const std::int32_t place = first + g * bits - first_bit;
      if (place >= 16) break;
      std::uint32_t number = 0;
      for (std::int32_t i = min(full, plan.layout.num_digits[s] - g * full) - 1; i >= 0; --i) {
        number = number * klt_rows::digit_base(s) + pieces[plan.first_digit_piece[s] + g * full + i];
      }
      add(number, place);
    }
  }
  return word & 0xffffu;
}

/// What quantising and expanding read and write. Trivially copyable.
struct Parts {
  RowPlan plan;
  const Coefficient* coefficients;  // [coded]
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
};

__device__ inline std::uint16_t* row_of(const Parts& parts, std::int64_t row) {
  const std::int64_t place = parts.first_row + row;
  std::uint8_t* bytes = parts.rows.data + place / parts.tokens * parts.rows.sequence_stride +
                        place % parts.tokens * parts.plan.layout.row_bytes;
  return reinterpret_cast<std::uint16_t*>(bytes);
}

/// Scales of the tokens of a warp and their inverses; tokens beyond the last one get 0.
template <int kTogether>
struct WarpScales {
  __half scales[kTogether];
  float inverses[kTogether];

  __device__ WarpScales(const Parts& parts, std::int64_t first) {
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

/// Writes the rows of coefficients.
///
///   lanes     z0 z1 ... z31 | z32 ...       y = z / r against the boundaries of each, kTogether tokens at a time
///   pieces    02 01 | 1 2 0 | ...           bytes of shared memory, section after section
///   lanes     word 0 (r and 8 bits) | word 1 | ...     16 bits of the row each
///
/// Launch  any number of blocks of kThreads; a warp for kTogether tokens
/// Work    codes into pieces, then words out of pieces
/// Reads   values once or twice, boundaries from the cache
/// Writes  rows once
/// Needs   kWarps * kTogether * plan.pieces bytes of dynamic shared memory
template <int kTogether>
__global__ void __launch_bounds__(kThreads) pack_kernel(Parts parts) {
  extern __shared__ std::uint8_t all_pieces[];
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  const std::int32_t size = parts.plan.pieces;
  std::uint8_t* pieces = all_pieces + warp * kTogether * size;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kWarps * kTogether;
  for (std::int64_t first = (static_cast<std::int64_t>(blockIdx.x) * kWarps + warp) * kTogether; first < parts.num_rows;
       first += step) {
    const WarpScales<kTogether> warp_scales(parts, first);
    for (std::int32_t k = lane; k < parts.plan.layout.coded; k += kWarpLanes) {
      const Coefficient coefficient = parts.coefficients[k];
      float y[kTogether];
      std::uint32_t codes[kTogether];
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        const bool exists = first + u < parts.num_rows;
        y[u] = exists ? parts.values[(first + u) * parts.pitch + k] * warp_scales.inverses[u] : 0.0f;
      }
      find_codes(y, coefficient, parts.boundaries, codes);
      const std::uint32_t mask = (1u << coefficient.low_bits) - 1u;
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        std::uint8_t* own = pieces + u * size;
        if (coefficient.field_bit >= 0) own[coefficient.field_piece] = static_cast<std::uint8_t>(codes[u] & mask);
        if (coefficient.digit_bit >= 0) {
          own[coefficient.digit_piece] = static_cast<std::uint8_t>(codes[u] >> coefficient.low_bits);
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      if (first + u >= parts.num_rows) break;
      std::uint16_t* words = row_of(parts, first + u);
      const std::uint8_t* own = pieces + u * size;
      for (std::int32_t i = lane; i < parts.plan.layout.row_bytes / 2; i += kWarpLanes) {
        const std::uint32_t scale = i == 0 ? __half_as_ushort(warp_scales.scales[u]) >> kKltScaleShift : 0u;
        const std::uint32_t word = word_of(parts.plan, own, i) | scale;
        words[i] = static_cast<std::uint16_t>(word);
      }
    }
    __syncwarp();  // the next tokens write the same pieces
  }
}

/// Replaces coefficients by the centroids of their codes, without the bytes in between.
///
/// Launch  any number of blocks of kThreads; a warp for kTogether tokens
/// Work    lanes are coefficients
/// Reads   values once or twice, boundaries and centroids from the cache
/// Writes  values once, zeros behind them; scales once
/// Needs   nothing
template <int kTogether>
__global__ void __launch_bounds__(kThreads) quantize_kernel(Parts parts) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kWarps * kTogether;
  for (std::int64_t first = (static_cast<std::int64_t>(blockIdx.x) * kWarps + warp) * kTogether; first < parts.num_rows;
       first += step) {
    const WarpScales<kTogether> warp_scales(parts, first);
    __syncwarp();  // all coefficients were read for the scales
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      if (lane == 0 && first + u < parts.num_rows) parts.scales[first + u] = __half2float(warp_scales.scales[u]);
    }
    for (std::int32_t k = lane; k < parts.pitch; k += kWarpLanes) {
      const bool is_coded = k < parts.plan.layout.coded;
      const Coefficient coefficient = is_coded ? parts.coefficients[k] : Coefficient{};
      float y[kTogether];
      std::uint32_t codes[kTogether];
      float* values = parts.values + first * parts.pitch + k;
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        y[u] = first + u < parts.num_rows ? values[u * parts.pitch] * warp_scales.inverses[u] : 0.0f;
      }
      find_codes(y, coefficient, parts.boundaries, codes);  // none for 0 levels
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        if (first + u >= parts.num_rows) break;
        values[u * parts.pitch] = is_coded ? parts.centroids[coefficient.first_centroid + codes[u]] : 0.0f;
      }
    }
  }
}

/// 32 bits of a row from a word of 16 on; beyond the row zeros.
__device__ inline std::uint32_t two_words(const std::uint16_t* words, std::int32_t index, std::int32_t num_words) {
  const std::uint32_t high = index + 1 < num_words ? words[index + 1] : 0u;
  return words[index] | high << 16;
}

/// `bits` of a row at any bit; at most 17, so that 32 bits from a word on hold them.
__device__ inline std::uint32_t bits_at(const std::uint16_t* words, std::int32_t num_words, std::int32_t bit,
                                        std::int32_t bits) {
  return two_words(words, bit / 16, num_words) >> (bit % 16) & ((1u << bits) - 1u);
}

/// The code of a coefficient, below its levels whatever the bytes are.
__device__ inline std::uint32_t read_code(const std::uint16_t* words, std::int32_t num_words,
                                          const Coefficient& coefficient) {
  std::uint32_t code = 0;
  if (coefficient.field_bit >= 0) code = bits_at(words, num_words, coefficient.field_bit, coefficient.low_bits);
  if (coefficient.digit_bit >= 0) {
    std::uint32_t number = bits_at(words, num_words, coefficient.digit_bit, coefficient.group_bits);
    const int place = coefficient.digit_place;
    if (coefficient.digit_section == 0) {
      for (int i = 0; i < place; ++i) number /= 3;
      number %= 3;
    } else if (coefficient.digit_section == 1) {
      for (int i = 0; i < place; ++i) number /= 5;
      number %= 5;
    } else {
      for (int i = 0; i < place; ++i) number /= 7;
      number %= 7;
    }
    code |= number << coefficient.low_bits;
  }
  return code;
}

/// Writes the centroids and scales that rows stand for.
///
/// Launch  any number of blocks of kThreads; a warp for kTogether tokens
/// Work    lanes are coefficients; the centroids wait in shared memory where they fit
/// Reads   rows once
/// Writes  values once, zeros behind them; scales once
/// Needs   shared_centroids * 4 bytes of dynamic shared memory: all of them or none
template <int kTogether>
__global__ void __launch_bounds__(kThreads) expand_kernel(Parts parts, std::int32_t shared_centroids) {
  extern __shared__ float own_centroids[];
  for (auto i = static_cast<std::int32_t>(threadIdx.x); i < shared_centroids; i += kThreads) {
    own_centroids[i] = parts.centroids[i];
  }
  __syncthreads();
  const float* centroids = shared_centroids > 0 ? own_centroids : parts.centroids;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  const std::int32_t num_words = parts.plan.layout.row_bytes / 2;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kWarps * kTogether;
  for (std::int64_t first = (static_cast<std::int64_t>(blockIdx.x) * kWarps + warp) * kTogether; first < parts.num_rows;
       first += step) {
    const std::uint16_t* words[kTogether];
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      const bool exists = first + u < parts.num_rows;
      words[u] = row_of(parts, exists ? first + u : first);
      if (lane == 0 && exists) {
        parts.scales[first + u] =
            num_words > 0 ? __half2float(__ushort_as_half(klt_scale_bits(words[u][0] & 0xffu))) : 0.0f;
      }
    }
    for (std::int32_t k = lane; k < parts.pitch; k += kWarpLanes) {
      const bool is_coded = k < parts.plan.layout.coded;
      const Coefficient coefficient = is_coded ? parts.coefficients[k] : Coefficient{};
      float* values = parts.values + first * parts.pitch + k;
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        if (first + u >= parts.num_rows) break;
        float value = 0.0f;
        if (is_coded) value = centroids[coefficient.first_centroid + read_code(words[u], num_words, coefficient)];
        values[u * parts.pitch] = value;
      }
    }
  }
}

}  // namespace rows

}  // namespace kvpack::cuda
