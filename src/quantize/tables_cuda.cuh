// Quantising by tables of what a vector's elements can become: a vector on a grid of at most 16 levels has as few results,
// so that elements need a code and a look-up, no division. The rules are quantize/uniform.h and quantize/codebook.h; what
// has more levels takes packs_cuda.cuh.
#pragma once

#include <type_traits>

#include "quantize/packs_cuda.cuh"

namespace kvpack::cuda {

inline constexpr int kTableLevels = 16;
inline constexpr int kTableResults = kTableLevels + 1;  // a uniform grid's saturated codes go to levels + 1

/// Whether a launch's vectors have tables. Boundaries near the end of float32 have no neighbour that could be halved.
inline bool suits_tables(const CodebookTable& codebook, const QuantizeOptions& options) {
  if (codebook.levels == 0) return options.bits <= 4;
  if (codebook.levels > kTableLevels) return false;
  constexpr float kLargest = 0x1p100f;
  bool are_moderate = true;
  for (int k = 0; k + 1 < codebook.levels; ++k) are_moderate &= fabsf(codebook.boundaries[k]) < kLargest;
  return are_moderate;
}

/// Bits of the element nearest to a value.
template <typename T>
__device__ std::uint32_t element_bits(float value) {
  T element{};
  set_element(value, element);
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(element);
  } else {
    return element.bits;
  }
}

/// A pack from the bits of its elements.
template <typename T>
__device__ Pack<T> pack_of_bits(const std::uint32_t (&bits)[kPack<T>]) {
  std::uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 4) {
      words[w] = bits[w];
    } else {
      words[w] = __byte_perm(bits[2 * w], bits[2 * w + 1], 0x5410u);
    }
  }
  Pack<T> pack;
  memcpy(&pack, words, sizeof(pack));
  return pack;
}

/// The largest float32 a whose quotient RN(a / qs) is not above a boundary: a > it where the quotient is above. Halfway
/// between the boundary and the next float32 a quotient goes to the even one of them. Products of 24 and 25 bits are exact
/// in float64, so whatever a and qs are, no division can tell more.
__device__ inline float largest_not_above(float boundary, float qs) {
  if (!(boundary < HUGE_VALF)) return boundary;
  const std::uint32_t bits = __float_as_uint(boundary);
  const float next = __uint_as_float(boundary == 0.0f ? 1u : boundary > 0.0f ? bits + 1 : bits - 1);
  const double halfway = 0.5 * (static_cast<double>(boundary) + static_cast<double>(next));
  const double product = static_cast<double>(qs) * halfway;
  const float below = __double2float_rd(product);
  if (bits % 2 == 0 || static_cast<double>(below) != product) return below;
  return __uint_as_float(below > 0.0f ? __float_as_uint(below) - 1 : __float_as_uint(below) + 1);
}

/// What code k of a vector becomes.
template <bool kCodebook, typename T>
__device__ std::uint32_t table_result(FastGrid grid, const FastRule& rule, int k) {
  if constexpr (kCodebook) return element_bits<T>(rule.values[min(k, rule.num_centroids - 1)] * grid.qs + grid.offset);
  const float code = fminf(static_cast<float>(k), rule.levels);
  return element_bits<T>(divide_exactly(code + grid.offset, grid.qs, grid.inverse));
}

/// The threshold of x - offset below which boundary k is; beyond the last one nothing.
__device__ inline float table_threshold(float qs, const FastRule& rule, int k) {
  return k + 1 < rule.num_centroids ? largest_not_above(rule.boundaries[k], qs) : HUGE_VALF;
}

/// True where tables serve a vector.
template <bool kCodebook>
__device__ bool suits_table(float qs, float offset) {
  return kCodebook ? qs > 0.0f && qs < HUGE_VALF : suits_reciprocal(qs, offset);
}

/// Codes of a uniform grid in the low bits of a float: everything is scaled by unit = 1 / (levels + 1), a power of two, so
/// that clamping to [0, 1] is free. What lies above the largest code comes out as levels + 1, its result is the same.
///   4 bits, x * qs - offset = 6.4: saturated 0.4, + 2^23 / 16 rounds to 6 / 16, ties to even
struct CodeScale {
  float qs;
  float offset;
  float whole;

  __device__ CodeScale(float grid_qs, float grid_offset, float levels) {
    const float unit = 1.0f / (levels + 1.0f);
    qs = grid_qs * unit;
    offset = grid_offset * unit;
    whole = 8388608.0f * unit;
  }
  __device__ std::uint32_t code(float x) const { return __float_as_uint(__saturatef(x * qs - offset) + whole); }
};

/// The table of one vector in a warp's registers: what belongs to code or boundary k is in lane k.
template <bool kCodebook, typename T>
struct LaneTable {
  CodeScale scale;
  float offset;
  std::uint32_t result;
  float threshold;
  float next_threshold;
  float middle;
  float lower_quarter;
  float upper_quarter;

  /// Every lane must call.
  __device__ LaneTable(FastGrid grid, const FastRule& rule, int lane)
      : scale(grid.qs, grid.offset, rule.levels),
        offset(grid.offset),
        result(table_result<kCodebook, T>(grid, rule, lane)) {
    if constexpr (kCodebook) {
      threshold = table_threshold(grid.qs, rule, lane);
      next_threshold = __shfl_sync(kAllLanes, threshold, (lane + 1) % kWarpLanes);
      middle = __shfl_sync(kAllLanes, threshold, 7);
      lower_quarter = __shfl_sync(kAllLanes, threshold, 3);
      upper_quarter = __shfl_sync(kAllLanes, threshold, 11);
    }
  }

  /// Quantises a pack. Every lane must call.
  __device__ void simulate(Pack<T>& pack) const {
    std::uint32_t bits[kPack<T>];
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      const float x = element_value(pack.at[j]);
      std::uint32_t code;
      if constexpr (kCodebook) {
        // nearest_centroid() of 16 levels.
        const float a = x - offset;
        const bool is_above = a > middle;
        code = is_above ? 8u : 0u;
        if (a > (is_above ? upper_quarter : lower_quarter)) code += 4;
        if (a > __shfl_sync(kAllLanes, next_threshold, static_cast<int>(code))) code += 2;
        if (a > __shfl_sync(kAllLanes, threshold, static_cast<int>(code))) code += 1;
      } else {
        code = scale.code(x);  // a shuffle sees the low five bits
      }
      bits[j] = __shfl_sync(kAllLanes, result, static_cast<int>(code));
    }
    pack = pack_of_bits<T>(bits);
  }
};

/// Tables of a tile's channels in shared memory. Element j of lane l is at [...][j][l]: lanes never share a bank.
template <bool kCodebook, typename T>
struct ColumnTables {
  static constexpr int kChannels = kPack<T> * kWarpLanes;

  std::uint32_t results[kTableResults][kPack<T>][kWarpLanes];
  float thresholds[kCodebook ? kTableLevels : 1][kPack<T>][kWarpLanes];

  /// Entries of one channel, `first`, `first + step` ...
  __device__ void fill(FastGrid grid, const FastRule& rule, int j, int lane, int first, int step) {
    for (int k = first; k < kTableResults; k += step) {
      results[k][j][lane] = table_result<kCodebook, T>(grid, rule, k);
      if (kCodebook && k < kTableLevels) thresholds[k][j][lane] = table_threshold(grid.qs, rule, k);
    }
  }
};

/// One lane's share of ColumnTables.
template <bool kCodebook, typename T>
struct OwnTables {
  const ColumnTables<kCodebook, T>& tables;
  std::uint32_t own;                   // bytes from the start of a row of entries to this lane's
  float qs[kCodebook ? 1 : kPack<T>];  // scaled
  float offset[kPack<T>];              // scaled, with a codebook as it is
  float whole;
  float middle[kPack<T>];
  float lower_quarter[kPack<T>];
  float upper_quarter[kPack<T>];

  __device__ OwnTables(const ColumnTables<kCodebook, T>& of_tile, int lane)
      : tables(of_tile), own(static_cast<std::uint32_t>(lane) * 4) {}

  __device__ void set(int j, float grid_qs, float grid_offset, float levels) {
    if constexpr (kCodebook) {
      const auto lane = own / 4;
      offset[j] = grid_offset;
      middle[j] = tables.thresholds[7][j][lane];
      lower_quarter[j] = tables.thresholds[3][j][lane];
      upper_quarter[j] = tables.thresholds[11][j][lane];
    } else {
      const CodeScale scale(grid_qs, grid_offset, levels);
      qs[j] = scale.qs;
      offset[j] = scale.offset;
      whole = scale.whole;
    }
  }

  __device__ void simulate(Pack<T>& pack) const {
    constexpr std::uint32_t kRow = sizeof(tables.results[0]);  // bytes of an entry of all channels
    std::uint32_t bits[kPack<T>];
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      const float x = element_value(pack.at[j]);
      std::uint32_t place;  // in bytes
      if constexpr (kCodebook) {
        const float a = x - offset[j];
        const bool is_above = a > middle[j];
        place = own + (is_above ? 8 * kRow : 0u);
        if (a > (is_above ? upper_quarter[j] : lower_quarter[j])) place += 4 * kRow;
        if (a > entry(tables.thresholds[1][j], place)) place += 2 * kRow;
        if (a > entry(tables.thresholds[0][j], place)) place += kRow;
      } else {
        // The exponent's bits leave at the top, as kRow is a power of two of nine bits or more.
        place = own + __float_as_uint(__saturatef(x * qs[j] - offset[j]) + whole) * kRow;
      }
      bits[j] = entry(tables.results[0][j], place);
    }
    pack = pack_of_bits<T>(bits);
  }

 private:
  template <typename Value>
  __device__ static Value entry(const Value* first, std::uint32_t place) {
    return *reinterpret_cast<const Value*>(reinterpret_cast<const char*>(first) + place);
  }
};

/// Which elements of a pack lie at or beyond their vector's thresholds, and putting them back.
template <typename T, int kGrids>
struct Thresholds {
  float upper[kGrids];
  float lower[kGrids];

  __device__ void set(int j, float above, float below) {
    upper[j] = above;
    lower[j] = below;
  }
  /// Puts exact elements back into a pack; returns how many.
  __device__ std::uint32_t restore(const Pack<T>& exact, Pack<T>& pack) const {
    std::uint32_t count = 0;
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      const float value = element_value(exact.at[j]);
      const bool is_outlier = value >= upper[j % kGrids] || value <= lower[j % kGrids];
      if (is_outlier) pack.at[j] = exact.at[j];
      count += is_outlier;
    }
    return count;
  }
};

/// Two 16-bit numbers at a time: x >= upper where x is at or above the first number of its type that is.
template <typename T, int kGrids, MmaType kType>
struct PairThresholds {
  static constexpr int kPairs = kGrids == 1 ? 1 : 4;
  std::uint32_t upper[kPairs];
  std::uint32_t lower[kPairs];

  __device__ void set(int j, float above, float below) {
    const std::uint32_t high = bits_at_least<kType>(above);
    const std::uint32_t low = bits_at_most<kType>(below);
    if constexpr (kGrids == 1) {
      upper[0] = high | high << 16;
      lower[0] = low | low << 16;
    } else {
      upper[j / 2] = j % 2 == 0 ? high : upper[j / 2] | high << 16;
      lower[j / 2] = j % 2 == 0 ? low : lower[j / 2] | low << 16;
    }
  }
  __device__ std::uint32_t restore(const Pack<T>& exact, Pack<T>& pack) const {
    std::uint32_t x[4];
    std::uint32_t y[4];
    memcpy(x, &exact, sizeof(x));
    memcpy(y, &pack, sizeof(y));
    std::uint32_t found = 0;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const std::uint32_t mask =
          mask_at_least<kType>(x[p], upper[p % kPairs]) | mask_at_least<kType>(lower[p % kPairs], x[p]);
      y[p] = (x[p] & mask) | (y[p] & ~mask);
      found |= mask & 0x00010001u << p;
    }
    memcpy(&pack, y, sizeof(y));
    return static_cast<std::uint32_t>(__popc(found));
  }
};
template <int kGrids>
struct Thresholds<Half, kGrids> : PairThresholds<Half, kGrids, MmaType::kHalf> {};
template <int kGrids>
struct Thresholds<BFloat16, kGrids> : PairThresholds<BFloat16, kGrids, MmaType::kBFloat16> {};

}  // namespace kvpack::cuda
