// The product that keys and values share, in the SIMD vocabulary: sums[n][0..63] += x[n][k] * tile_k[0..63], over expanded
// tiles k. Keys: k is a channel and the sums are scores of 64 tokens; values: k is a token and the sums are channels.

namespace kvpack::KVPACK_ISA {
namespace {

/// a * b + c; one rounding where the instruction set has FMA (std::fma without it is a slow call).
inline F32 multiply_add(F32 a, F32 b, F32 c) {
#if KVPACK_ISA_LANES == 1
  return a * b + c;
#else
  return fma(a, b, c);
#endif
}

/// Columns of x and of sums, one behind another.
struct Columns {
  const float* x = nullptr;  // [columns][count]
  std::int64_t x_stride = 0;
  float* sums = nullptr;  // [columns][64]
  std::int64_t sums_stride = 0;
};

/// kColumns columns times kVectors vectors of the tiles in registers. kChains sums of each are kept apart, so that few
/// columns do not wait for one another's additions.
template <int kColumns, int kVectors, int kChains>
inline void multiply_part(const float* tiles, std::int64_t count, const Columns& columns, std::int64_t first) {
  F32 sums[kChains][kColumns][kVectors];
#pragma GCC unroll 8
  for (int n = 0; n < kColumns; ++n) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[0][n][v] = load(columns.sums + n * columns.sums_stride + first + v * kLanes);
      if constexpr (kChains == 2) sums[1][n][v] = set1(0.0f);
    }
  }
  for (std::int64_t k = 0; k < count; k += kChains) {
#pragma GCC unroll 2
    for (int chain = 0; chain < kChains; ++chain) {
      const float* tile = tiles + (k + chain) * kTileElements + first;
      F32 elements[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) elements[v] = load(tile + v * kLanes);
#pragma GCC unroll 8
      for (int n = 0; n < kColumns; ++n) {
        const F32 x = set1(columns.x[n * columns.x_stride + k + chain]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[chain][n][v] = multiply_add(x, elements[v], sums[chain][n][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < kColumns; ++n) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      F32 sum = sums[0][n][v];
      if constexpr (kChains == 2) sum = add(sum, sums[1][n][v]);
      store(columns.sums + n * columns.sums_stride + first + v * kLanes, sum);
    }
  }
}

/// kColumns columns times whole tiles.
template <int kColumns>
inline void multiply_columns(const float* tiles, std::int64_t count, const Columns& columns) {
  // Sums in registers: 16 of AVX-512's 32, 8 of the 16 of AVX2. Scalar code leaves the vectors to the compiler.
#if KVPACK_ISA_LANES == 16
  constexpr int kVectors = 4;
#elif KVPACK_ISA_LANES == 8
  constexpr int kVectors = kColumns == 1 ? 8 : kColumns == 2 ? 4 : 2;
#else
  constexpr int kVectors = 8;
#endif
  constexpr int kChains = kColumns * kVectors < 8 ? 2 : 1;
  for (std::int64_t first = 0; first < kTileElements; first += kVectors * kLanes) {
    multiply_part<kColumns, kVectors, kChains>(tiles, count, columns, first);
  }
}

/// All columns times `count` expanded tiles; `count` is even.
inline void multiply_tiles(const float* tiles, std::int64_t count, Columns columns, std::int64_t num_columns) {
  while (num_columns > 0) {
    const std::int64_t step = num_columns < 4 ? num_columns : 4;
    if (step == 4) multiply_columns<4>(tiles, count, columns);
    if (step == 3) multiply_columns<3>(tiles, count, columns);
    if (step == 2) multiply_columns<2>(tiles, count, columns);
    if (step == 1) multiply_columns<1>(tiles, count, columns);
    num_columns -= step;
    columns.x += step * columns.x_stride;
    columns.sums += step * columns.sums_stride;
  }
}

}  // namespace
}  // namespace kvpack::KVPACK_ISA

#if KVPACK_ISA_LANES == 16
#include "attend/multiply_avx512.h"
#endif
