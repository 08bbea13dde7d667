// Sixteen bytes of neighbouring channels at a time: ranges, and quantising without the divider. What the fast kernels of
// rows_cuda.cuh and columns_cuda.cuh share; the rules are quantize/uniform.h and quantize/codebook.h.
#pragma once

#include "cuda/packed_pair.cuh"
#include "cuda/reduce.cuh"
#include "quantize/uniform_cuda.cuh"

namespace kvpack::cuda {

/// Elements of one load.
template <typename T>
inline constexpr int kPack = 16 / static_cast<int>(sizeof(T));

template <typename T>
struct alignas(16) Pack {
  T at[kPack<T>];
};

template <typename T>
__device__ Pack<T> load_pack(const T* source) {
  const uint4 bits = *reinterpret_cast<const uint4*>(source);
  Pack<T> pack;
  memcpy(&pack, &bits, sizeof(bits));
  return pack;
}

/// Stores past the caches' interest: they keep what is still to be read.
template <typename T>
__device__ void store_pack(T* target, const Pack<T>& pack) {
  uint4 bits;
  memcpy(&bits, &pack, sizeof(bits));
  __stcs(reinterpret_cast<uint4*>(target), bits);
}

/// What findings->first_bad says where a fast kernel has met a value that is not finite, and not looked where.
inline constexpr Counter kSomewhere = ~Counter{0} - 1;

__device__ inline void tell_bad(bool is_bad, Findings* findings) {
  if (is_bad) atomicMin(&findings->first_bad, kSomewhere);
}

/// Grid of one vector, ready for divisions by multiplications.
struct FastGrid {
  float qs;
  float offset;
  float inverse;  // 1 / qs
};

/// a / b rounded to nearest from y = RN(1/b): divide_exactly() of quantize/uniform_cpu.h.
__device__ inline float divide_exactly(float a, float b, float y) {
  float quotient = a * y;
  quotient = fmaf(fmaf(-b, quotient, a), y, quotient);
  return fmaf(fmaf(-b, quotient, a), y, quotient);
}

/// True when divide_exactly() serves every value of the vector: far from underflow and overflow in every step.
__device__ inline bool suits_reciprocal(float qs, float offset) {
  const float magnitude = fabsf(offset);
  return qs >= 0x1p-40f && qs <= 0x1p40f && (magnitude == 0.0f || magnitude >= 0x1p-60f) && magnitude <= 0x1p60f;
}

/// simulate_value() of quantize/uniform.h. Clamping before rounding gives the same codes, as the ends are whole, and
/// adding 1.5 * 2^23 rounds what lies between them, ties to even, a zero of either sign to +0.
template <bool kSuitsReciprocal>
__device__ float simulate_uniform_fast(float x, FastGrid grid, float levels) {
  constexpr float kWhole = 12582912.0f;
  const float clamped = fminf(fmaxf(x * grid.qs - grid.offset, 0.0f), levels);
  const float shifted = ((clamped + kWhole) - kWhole) + grid.offset;
  return kSuitsReciprocal ? divide_exactly(shifted, grid.qs, grid.inverse) : shifted / grid.qs;
}

/// (x - centre) / half of simulate_with_codebook().
template <bool kSuitsReciprocal>
__device__ float normalise(float x, FastGrid grid) {
  const float a = x - grid.offset;
  // A tiny difference would lose bits of its residuals, the quotient of a huge one may be infinite.
  constexpr std::uint32_t kTiny = 0x12800000u;  // 2^-90
  constexpr std::uint32_t kHuge = 0x5d800000u;  // 2^60
  const bool is_extreme = (__float_as_uint(a) & 0x7fffffffu) - kTiny > kHuge - kTiny;
  if (!kSuitsReciprocal || is_extreme) return a / grid.qs;
  return divide_exactly(a, grid.qs, grid.inverse);
}

/// What a whole launch quantises by; boundaries and values lie in shared memory.
struct FastRule {
  float levels;  // largest code; with a codebook nothing
  std::int32_t num_centroids;
  bool compat;
  const float* boundaries;
  const float* values;
};

/// Quantises a pack whose element j has the grid grids[j], or all of them grids[0].
template <bool kCodebook, bool kSuitsReciprocal, int kGrids, typename T>
__device__ void simulate_pack(Pack<T>& pack, const FastGrid (&grids)[kGrids], const FastRule& rule) {
  constexpr int kCount = kPack<T>;
  float results[kCount];
  if constexpr (kCodebook) {
    float y[kCount];
    int index[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      y[j] = normalise<kSuitsReciprocal>(element_value(pack.at[j]), grids[j % kGrids]);
      index[j] = 0;
    }
    for (int step = rule.num_centroids / 2; step > 0; step /= 2) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) index[j] += y[j] > rule.boundaries[index[j] + step - 1] ? step : 0;
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const FastGrid grid = grids[j % kGrids];
      results[j] = rule.values[index[j]] * grid.qs + grid.offset;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      results[j] = simulate_uniform_fast<kSuitsReciprocal>(element_value(pack.at[j]), grids[j % kGrids], rule.levels);
    }
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    if (!kSuitsReciprocal && grids[j % kGrids].qs == 0.0f) {
      if (rule.compat) set_element(grids[j % kGrids].offset, pack.at[j]);
    } else {
      set_element(results[j], pack.at[j]);
    }
  }
}

/// The same with thresholds: elements at or beyond them stay. Returns how many did.
template <bool kCodebook, bool kSuitsReciprocal, int kGrids, typename T>
__device__ std::uint32_t simulate_dense(Pack<T>& pack, const FastGrid (&grids)[kGrids], const float (&upper)[kGrids],
                                        const float (&lower)[kGrids], const FastRule& rule) {
  const Pack<T> exact = pack;
  simulate_pack<kCodebook, kSuitsReciprocal>(pack, grids, rule);
  std::uint32_t outliers = 0;
#pragma unroll
  for (int j = 0; j < kPack<T>; ++j) {
    const float value = element_value(exact.at[j]);
    const bool is_outlier = value >= upper[j % kGrids] || value <= lower[j % kGrids];
    if (is_outlier) pack.at[j] = exact.at[j];
    outliers += is_outlier;
  }
  return outliers;
}

/// NaN where one of the elements is not finite, else a zero.
template <typename T>
__device__ float finite_sum(const Pack<T>& pack, float sum) {
#pragma unroll
  for (int j = 0; j < kPack<T>; ++j) sum = fmaf(element_value(pack.at[j]), 0.0f, sum);
  return sum;
}

/// Copies a codebook to shared memory; a barrier must follow. Every thread calls.
__device__ inline FastRule load_rule(const CodebookTable& codebook, const QuantizeOptions& options, float* boundaries,
                                     float* values) {
  for (int k = static_cast<int>(threadIdx.x); k < codebook.levels; k += static_cast<int>(blockDim.x)) {
    boundaries[k] = codebook.boundaries[k];
    values[k] = codebook.values[k];
  }
  return {largest_code(options.bits), codebook.levels, options.compat, boundaries, values};
}

/// Smallest and largest of each of a pack's places over many packs, element by element. A NaN wins.
template <typename T>
struct PackRange {
  float low[kPack<T>];
  float high[kPack<T>];

  __device__ void clear() {
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      low[j] = HUGE_VALF;
      high[j] = -HUGE_VALF;
    }
  }
  __device__ void add(const Pack<T>& pack) {
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      low[j] = min_or_nan(low[j], element_value(pack.at[j]));
      high[j] = max_or_nan(high[j], element_value(pack.at[j]));
    }
  }
  [[nodiscard]] __device__ float low_at(int j) const { return low[j]; }
  [[nodiscard]] __device__ float high_at(int j) const { return high[j]; }
};

/// Two 16-bit numbers at a time.
template <typename T, MmaType kType>
struct PairRange {
  std::uint32_t low[4];
  std::uint32_t high[4];

  __device__ void clear() {
    constexpr std::uint32_t kInfinity = PackedPair<kType>::kInfinity;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      low[p] = kInfinity | kInfinity << 16;
      high[p] = low[p] | 0x80008000u;
    }
  }
  __device__ void add(const Pack<T>& pack) {
    std::uint32_t pairs[4];
    memcpy(pairs, &pack, sizeof(pairs));
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      low[p] = pair_min<kType>(low[p], pairs[p]);
      high[p] = pair_max<kType>(high[p], pairs[p]);
    }
  }
  [[nodiscard]] __device__ float low_at(int j) const {
    return j % 2 == 0 ? lower_value<kType>(low[j / 2]) : upper_value<kType>(low[j / 2]);
  }
  [[nodiscard]] __device__ float high_at(int j) const {
    return j % 2 == 0 ? lower_value<kType>(high[j / 2]) : upper_value<kType>(high[j / 2]);
  }
};
template <>
struct PackRange<Half> : PairRange<Half, MmaType::kHalf> {};
template <>
struct PackRange<BFloat16> : PairRange<BFloat16, MmaType::kBFloat16> {};

/// A range of something finite. The range of nothing is inverted, and finite for this purpose.
__device__ inline bool is_bad_range(float low, float high) { return !(low > -HUGE_VALF) || !(high < HUGE_VALF); }

}  // namespace kvpack::cuda
