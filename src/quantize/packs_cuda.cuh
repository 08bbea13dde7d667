// Sixteen bytes of neighbouring channels at a time: ranges, and quantising without the divider. What the fast kernels of
// rows_cuda.cuh and columns_cuda.cuh share; the rules are quantize/uniform.h and quantize/codebook.h.
#pragma once

#include <type_traits>

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
__device__ inline float simulate_uniform_fast(float x, FastGrid grid, float levels) {
  constexpr float kWhole = 12582912.0f;
  const float clamped = fminf(fmaxf(x * grid.qs - grid.offset, 0.0f), levels);
  return divide_exactly(((clamped + kWhole) - kWhole) + grid.offset, grid.qs, grid.inverse);
}

/// (x - centre) / half of simulate_with_codebook().
template <typename T>
__device__ float normalise(T element, FastGrid grid) {
  const float a = element_value(element) - grid.offset;
  if constexpr (!std::is_same_v<T, Half>) {
    // A tiny difference would lose bits of its residuals, the quotient of a huge one may be infinite. Halves are multiples
    // of 2^-24, so that no difference from an offset that suits_reciprocal() is either.
    constexpr std::uint32_t kTiny = 0x12800000u;  // 2^-90
    constexpr std::uint32_t kHuge = 0x5d800000u;  // 2^60
    if (a != 0.0f && (__float_as_uint(a) & 0x7fffffffu) - kTiny > kHuge - kTiny) return a / grid.qs;
  }
  return divide_exactly(a, grid.qs, grid.inverse);
}

/// What a whole launch quantises by; boundaries and values lie in shared memory.
struct FastRule {
  float levels;  // largest code; with a codebook nothing
  std::int32_t num_centroids;
  bool compat;
  const float* boundaries;
  const float* values;
  float middle;  // of the boundaries, and those of its two sides; with 4 centroids or more
  float lower_quarter;
  float upper_quarter;
};

/// nearest_centroid() of quantize/codebook.h for a pack: the first two halvings from registers, as every lane asks for the
/// same three boundaries, the others from shared memory.
template <int kCount>
__device__ void nearest_centroids(const float (&y)[kCount], const FastRule& rule, int (&index)[kCount]) {
  int step = rule.num_centroids / 2;
  if (rule.num_centroids >= 4) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const bool is_above = y[j] > rule.middle;
      index[j] = (is_above ? step : 0) + (y[j] > (is_above ? rule.upper_quarter : rule.lower_quarter) ? step / 2 : 0);
    }
    step /= 4;
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j) index[j] = 0;
  }
  for (; step > 0; step /= 2) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) index[j] += y[j] > rule.boundaries[index[j] + step - 1] ? step : 0;
  }
}

/// Quantises a pack whose element j has the grid grids[j], or all of them grids[0]; each suits_reciprocal().
template <bool kCodebook, int kGrids, typename T>
__device__ void simulate_pack(Pack<T>& pack, const FastGrid (&grids)[kGrids], const FastRule& rule) {
  constexpr int kCount = kPack<T>;
  if constexpr (kCodebook) {
    float y[kCount];
    int index[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) y[j] = normalise(pack.at[j], grids[j % kGrids]);
    nearest_centroids(y, rule, index);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const FastGrid grid = grids[j % kGrids];
      set_element(rule.values[index[j]] * grid.qs + grid.offset, pack.at[j]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      set_element(simulate_uniform_fast(element_value(pack.at[j]), grids[j % kGrids], rule.levels), pack.at[j]);
    }
  }
}

/// One element on any grid, at any cost.
template <bool kCodebook, typename T>
__device__ T simulate_plainly(T element, const VectorGrid& grid, const FastRule& rule) {
  if (grid.qs == 0.0f) {
    if (rule.compat) set_element(grid.offset, element);
    return element;
  }
  const UniformGrid of_vector{grid.qs, grid.offset};
  const float x = element_value(element);
  T result{};
  set_element(kCodebook ? simulate_with_codebook(x, of_vector, rule.boundaries, rule.values, rule.num_centroids)
                        : simulate_value(x, of_vector, rule.levels),
              result);
  return result;
}

/// The elements of a pack whose grids do not suit the fast ways, from memory to memory one by one: in registers that would
/// be as many divisions as elements, in code that is hardly ever run. `grid_of` knows the grid of element j. Returns the
/// number of outliers.
template <bool kCodebook, typename T, typename GridOf>
__device__ std::uint32_t simulate_pack_plainly(const T* x, T* out, const FastRule& rule, GridOf&& grid_of) {
  std::uint32_t outliers = 0;
#pragma unroll 1
  for (int j = 0; j < kPack<T>; ++j) {
    const VectorGrid grid = grid_of(j);
    const T element = x[j];
    const float value = element_value(element);
    const bool is_outlier = value >= grid.upper || value <= grid.lower;
    out[j] = is_outlier ? element : simulate_plainly<kCodebook>(element, grid, rule);
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
  FastRule rule{largest_code(options.bits), codebook.levels, options.compat, boundaries, values, 0.0f, 0.0f, 0.0f};
  if (codebook.levels >= 4) {
    rule.middle = codebook.boundaries[codebook.levels / 2 - 1];
    rule.lower_quarter = codebook.boundaries[codebook.levels / 4 - 1];
    rule.upper_quarter = codebook.boundaries[codebook.levels / 4 * 3 - 1];
  }
  return rule;
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

/// Which elements of a pack lie at or beyond their vectors' bounds, or are NaNs: a bit for each at either end.
template <typename T, int kGrids>
struct PackBounds {
  float high[kGrids];
  float low[kGrids];

  __device__ void set(int j, float above, float below) {
    high[j] = above;
    low[j] = below;
  }
  /// Upper end in bits 0 to 3, lower end in bits 4 to 7.
  [[nodiscard]] __device__ std::uint32_t beyond(const Pack<T>& pack) const {
    std::uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      const float value = element_value(pack.at[j]);
      bits |= value < high[j % kGrids] ? 0u : 1u << j;
      bits |= value > low[j % kGrids] ? 0u : 16u << j;
    }
    return bits;
  }
  __device__ static int side_of(int bit) { return bit / 4; }
  __device__ static int element_of(int bit) { return bit % 4; }
};

/// Two 16-bit numbers at a time; the bounds are numbers of the same type, so nothing is rounded.
template <typename T, int kGrids, MmaType kType>
struct PairBounds {
  static constexpr int kPairs = kGrids == 1 ? 1 : 4;
  std::uint32_t high[kPairs];
  std::uint32_t low[kPairs];

  __device__ void set(int j, float above, float below) {
    T upper{};
    T lower{};
    set_element(above, upper);
    set_element(below, lower);
    if constexpr (kGrids == 1) {
      high[0] = upper.bits * 0x10001u;
      low[0] = lower.bits * 0x10001u;
      return;
    }
    high[j / 2] = j % 2 == 0 ? upper.bits : high[j / 2] | std::uint32_t{upper.bits} << 16;
    low[j / 2] = j % 2 == 0 ? lower.bits : low[j / 2] | std::uint32_t{lower.bits} << 16;
  }
  /// Pair p has bits p and 16 + p for its two elements at the upper end, 4 + p and 20 + p at the lower.
  [[nodiscard]] __device__ std::uint32_t beyond(const Pack<T>& pack) const {
    std::uint32_t x[4];
    memcpy(x, &pack, sizeof(x));
    std::uint32_t bits = 0;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      bits |= ~__hlt2_mask(pair_of<kType>(x[p]), pair_of<kType>(high[p % kPairs])) & 0x00010001u << p;
      bits |= ~__hgt2_mask(pair_of<kType>(x[p]), pair_of<kType>(low[p % kPairs])) & 0x00100010u << p;
    }
    return bits;
  }
  __device__ static int side_of(int bit) { return bit / 4 % 4; }
  __device__ static int element_of(int bit) { return bit % 4 * 2 + bit / 16; }
};
template <int kGrids>
struct PackBounds<Half, kGrids> : PairBounds<Half, kGrids, MmaType::kHalf> {};
template <int kGrids>
struct PackBounds<BFloat16, kGrids> : PairBounds<BFloat16, kGrids, MmaType::kBFloat16> {};

/// A range of something finite. The range of nothing is inverted, and finite for this purpose.
__device__ inline bool is_bad_range(float low, float high) { return !(low > -HUGE_VALF) || !(high < HUGE_VALF); }

}  // namespace kvpack::cuda
