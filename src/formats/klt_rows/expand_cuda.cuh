// The bytes of rows back to centroids on the GPU: threads are coefficients, and each reads its code in several rows at once.
#pragma once

#include "formats/klt_rows/codec_cuda.cuh"

namespace kvpack::cuda {

namespace rows {

/// A word of each of the rows that a team reads, so that one load brings all of them.
template <int kTogether>
struct alignas(4 * kTogether) RowWords {
  std::uint32_t of[kTogether];
};

/// Where a coefficient's code lies in rows, worked out once for several of them.
class CodeReader {
 public:
  __device__ explicit CodeReader(const Coefficient& coefficient)
      : field_bit_(coefficient.field_bit),
        field_mask_((1u << coefficient.low_bits) - 1u),
        digit_bit_(coefficient.digit_bit),
        digit_mask_((1u << coefficient.group_bits) - 1u),
        place_inverse_(coefficient.place_inverse),
        base_(static_cast<std::uint32_t>(klt_rows::digit_base(coefficient.digit_section))),
        base_inverse_(base_inverse(coefficient.digit_section)),
        low_bits_(coefficient.low_bits) {}

  /// Codes, below the levels whatever the bytes are. The words go on for one behind the rows.
  template <int kTogether>
  __device__ void read(const RowWords<kTogether>* words, std::uint32_t (&codes)[kTogether]) const {
#pragma unroll
    for (int u = 0; u < kTogether; ++u) codes[u] = 0;
    if (field_bit_ >= 0) read_bits(words, field_bit_, field_mask_, codes);
    if (digit_bit_ >= 0) {
      std::uint32_t numbers[kTogether];
      read_bits(words, digit_bit_, digit_mask_, numbers);
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        // Of the place 0 the inverse is that of 1: 2^31.
        const std::uint32_t digits = __umulhi(2u * numbers[u], place_inverse_);
        codes[u] |= (digits - base_ * __umulhi(2u * digits, base_inverse_)) << low_bits_;
      }
    }
  }

 private:
  template <int kTogether>
  static __device__ void read_bits(const RowWords<kTogether>* words, int signed_bit, std::uint32_t mask,
                                   std::uint32_t (&result)[kTogether]) {
    const auto bit = static_cast<std::uint32_t>(signed_bit);
    const RowWords<kTogether> low = words[bit / 32];
    const RowWords<kTogether> high = words[bit / 32 + 1];
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      result[u] = __funnelshift_r(low.of[u], high.of[u], bit % 32) & mask;
    }
  }

  int field_bit_;
  std::uint32_t field_mask_;
  int digit_bit_;
  std::uint32_t digit_mask_;
  std::uint32_t place_inverse_;
  std::uint32_t base_;
  std::uint32_t base_inverse_;
  std::uint32_t low_bits_;
};

/// Brings rows [first, first + count) into a team's words, zeros behind them, and writes their scales.
template <int kTogether, int kTeam>
__device__ inline void bring_rows(const Parts& parts, std::int64_t first, int count, RowWords<kTogether>* words) {
  const int member = Team<kTeam>::member();
  const std::int32_t num_halves = parts.plan.layout.row_bytes / 2;
  const std::uint16_t* rows[kTogether];
#pragma unroll
  for (int u = 0; u < kTogether; ++u) rows[u] = row_of(parts, u < count ? first + u : first);
  auto* halves = reinterpret_cast<std::uint16_t*>(words);
#pragma unroll 2
  for (std::int32_t i = member; i < 2 * (row_words(parts.plan) + 1); i += kTeam) {
    std::uint16_t found[kTogether];
#pragma unroll
    for (int u = 0; u < kTogether; ++u) found[u] = i < num_halves ? rows[u][i] : std::uint16_t{0};
#pragma unroll
    for (int u = 0; u < kTogether; ++u) halves[(i / 2 * kTogether + u) * 2 + i % 2] = found[u];
  }
  Team<kTeam>::sync();
#pragma unroll
  for (int u = 0; u < kTogether; ++u) {
    if (member != u || u >= count) continue;
    const std::uint32_t code = words->of[u] & 0xffu;
    parts.scales[first + u] =
        num_halves > 0 ? __half2float(__ushort_as_half(static_cast<unsigned short>(klt_scale_bits(code)))) : 0.0f;
  }
}

/// Writes the centroids and scales that rows stand for.
///
///   words    row 0 row 1 row 2 row 3 | row 0 ...     word after word of a team's rows
///   members  code of k in each row -> centroid -> values[row, k]
///
/// Launch  any number of blocks of kThreads; a team of kTeam for kTogether tokens
/// Work    rows into words of shared memory, then members are coefficients; centroids wait in shared memory where they fit
/// Reads   rows once
/// Writes  values once, zeros behind them; scales once
/// Needs   dynamic shared memory: with kShared all centroids, filled up to a multiple of 4, as floats; row_words(plan) + 1 words
///         for each token
template <int kTogether, int kTeam, bool kShared>
__global__ void __launch_bounds__(kThreads) expand_kernel(Parts parts) {
  extern __shared__ __align__(16) float shared_centroids[];
  float* behind = shared_centroids;
  if constexpr (kShared) {
    for (auto i = static_cast<std::int32_t>(threadIdx.x); i < parts.plan.centroids; i += kThreads) {
      shared_centroids[i] = stored_centroid(parts, parts.centroids[i]);
    }
    behind += round_up(parts.plan.centroids, 4);
    __syncthreads();
  }
  auto* words = reinterpret_cast<RowWords<kTogether>*>(behind) + Team<kTeam>::number() * (row_words(parts.plan) + 1);
  const auto pitch = static_cast<std::int32_t>(parts.pitch);
  constexpr int kBlockTokens = Team<kTeam>::kTeams * kTogether;
  for (std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kBlockTokens + Team<kTeam>::number() * kTogether;
       first < parts.num_rows; first += static_cast<std::int64_t>(gridDim.x) * kBlockTokens) {
    const auto count = static_cast<int>(min(parts.num_rows - first, std::int64_t{kTogether}));
    bring_rows<kTogether, kTeam>(parts, first, count, words);
    float* values[kTogether];
#pragma unroll
    for (int u = 0; u < kTogether; ++u) values[u] = parts.values + (first + u) * parts.pitch;
    for (std::int32_t k = Team<kTeam>::member(); k < pitch; k += kTeam) {
      float found[kTogether] = {};
      if (k < parts.plan.layout.coded) {
        const Coefficient coefficient = parts.coefficients[k];
        std::uint32_t codes[kTogether];
        CodeReader(coefficient).read(words, codes);
#pragma unroll
        for (int u = 0; u < kTogether; ++u) {
          const std::uint32_t place = static_cast<std::uint32_t>(coefficient.first_centroid) + codes[u];
          if constexpr (kShared) {
            found[u] = shared_centroids[place];
          } else {
            found[u] = stored_centroid(parts, parts.centroids[place]);
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        if (u < count) values[u][k] = found[u];
      }
    }
    Team<kTeam>::sync();  // the next rows take the same words
  }
}

}  // namespace rows

}  // namespace kvpack::cuda
