// Tiles to rows of 16-bit numbers in shared memory, one tile a lane: what both products of tile attention start with.
// Nothing here knows keys from values.
//
// A byte of the bitmap (8 elements) picks a table entry: for each element the place of its code among the next eight, or
// 8, which makes PRMT repeat the sign of a byte below 128: zero. Two bits, m = 0b01100010, next codes 3 1 2 ..:
//
//   element   0 1 2 3 4 5 6 7        entry (nibbles, element 0 lowest)   8 1 0 8 8 8 4 8 with the places below
//   code      . 3 1 . . . 2 .        codes as bytes  r0 = c0 c1 c4 c5, r1 = c2 c3 c6 c7  (places 0 1 4 5 2 3 6 7)
//
// One PRMT moves four codes to their elements; another looks their values up in the tile's four halves. Codes are XORed
// with the zero point beforehand where that is one of the codes, so that the zero of a pruned element looks up 0.0.
// Other tiles (all survivors on one side of zero) take the same way and have their pruned elements masked off.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cstdint>

#include "attend/tile_source_cuda.cuh"
#include "cuda/mma.cuh"

namespace kvpack::cuda {

/// Copies of the table in shared memory: lanes of different remainders never meet in a bank.
inline constexpr int kTableCopies = 8;

/// Words of shared memory that the table takes.
template <int kBits>
inline constexpr int kTableWords = kBits == kUnquantizedBits ? 16 * 2 : 256 * kTableCopies;

/// Where the j-th of eight codes stands among the bytes of r0 (0 .. 3) and r1 (4 .. 7) after spread_codes.
template <int kBits>
__device__ inline std::uint32_t code_place(int j) {
  if (kBits == 2) return (j & 1) | (j & 4) >> 1 | (j & 2) << 1;  // 0 1 4 5 2 3 6 7
  if (kBits == 4) return j >> 1 | (j & 1) << 2;                  // 0 4 1 5 2 6 3 7
  return j;
}

/// Four bytes of {low, high} by the nibbles of `selector`. Other than __byte_perm it knows nibbles of 8 and more, which
/// repeat the sign of their byte, and needs no mask for them.
__device__ inline std::uint32_t pick_bytes(std::uint32_t low, std::uint32_t high, std::uint32_t selector) {
  std::uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
  return result;
}

/// Fills the table; all threads of the block call, and a barrier follows.
template <int kBits>
__device__ inline void fill_table(std::uint32_t* table) {
  if constexpr (kBits == kUnquantizedBits) {
    // Entry of four elements: {PRMT selectors of elements 0 1 and 2 3, bits that the halves of the first two take}.
    for (int mask = threadIdx.x; mask < 16; mask += blockDim.x) {
      std::uint32_t selectors = 0;
      for (int pair = 0; pair < 2; ++pair) {
        int rank = 0;
        for (int i = 0; i < 2; ++i) {
          const bool kept = (mask >> (3 - 2 * pair - i) & 1) != 0;
          const std::uint32_t bytes = kept ? (2 * rank + 1) << 4 | 2 * rank : 0x44u;
          selectors |= bytes << (16 * pair + 8 * i);
          rank += kept;
        }
      }
      table[2 * mask] = selectors;
      table[2 * mask + 1] = static_cast<std::uint32_t>(16 * __popc(mask >> 2));
    }
  } else {
    for (int mask = threadIdx.x; mask < 256; mask += blockDim.x) {
      std::uint32_t entry = 0;
      int rank = 0;
      for (int i = 0; i < 8; ++i) {
        const bool kept = (mask >> (7 - i) & 1) != 0;
        entry |= (kept ? code_place<kBits>(rank) : 8u) << (4 * i);
        rank += kept;
      }
      for (int copy = 0; copy < kTableCopies; ++copy) table[mask * kTableCopies + copy] = entry;
    }
  }
}

/// Two floats as two 16-bit numbers, the first one low.
__device__ inline std::uint32_t pack_floats(float low, float high, MmaType type) {
  if (type == MmaType::kHalf) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  }
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}

__device__ inline __half2 as_half2(std::uint32_t bits) { return *reinterpret_cast<const __half2*>(&bits); }
__device__ inline std::uint32_t as_bits(__half2 pair) { return *reinterpret_cast<const std::uint32_t*>(&pair); }

/// The grid of a lane's tile, made ready for its 64 elements.
template <int kBits>
struct PreparedGrid {
  std::uint32_t zero_codes = 0;  // the zero point in every field of a word (1, 2 bits) or byte (4, 8), or 0
  std::uint32_t low = 0;         // 1, 2 bits: values of codes 0 and 1 (after the XOR); else half2 of 1024 + zero
  std::uint32_t high = 0;        // 2 bits: values of codes 2 and 3; else half2 of scale
  float scale = 1.0f;
  float zero = 0.0f;
  bool masks = false;  // pruned elements must be cleared: the zero point is no code
  bool exact = true;   // 4, 8 bits: half arithmetic holds zero and scale
};

template <int kBits>
__device__ inline PreparedGrid<kBits> prepare_grid(const LaneTile& tile, MmaType type) {
  PreparedGrid<kBits> grid;
  constexpr float kLargest = static_cast<float>((1 << kBits) - 1);
  grid.scale = tile.scale;
  grid.zero = tile.zero;
  // A scale that is not finite makes even the zero code's value NaN.
  grid.masks = kBits == 8 || !(tile.zero >= 0.0f && tile.zero <= kLargest && fabsf(tile.scale) <= FLT_MAX);
  const std::uint32_t zero_code = grid.masks ? 0u : static_cast<std::uint32_t>(tile.zero);
  if constexpr (kBits <= 2) {
    grid.zero_codes = zero_code * (kBits == 2 ? 0x55555555u : 0xffffffffu);
    const std::uint32_t low = pack_floats((0.0f - tile.zero) * tile.scale, (1.0f - tile.zero) * tile.scale, type);
    const std::uint32_t high = pack_floats((2.0f - tile.zero) * tile.scale, (3.0f - tile.zero) * tile.scale, type);
    const std::uint32_t places = zero_code * 0x2222u;  // value i goes to place i ^ zero_code
    grid.low = pick_bytes(low, high, 0x3210u ^ places);
    grid.high = pick_bytes(low, high, 0x7654u ^ places);
  } else {
    grid.zero_codes = zero_code * 0x01010101u;
    grid.low = as_bits(__float2half2_rn(1024.0f + tile.zero));
    grid.high = as_bits(__float2half2_rn(tile.scale));
    // Whole numbers up to 2048 and normal scales: only the scale itself is rounded.
    grid.exact = type == MmaType::kHalf && fabsf(tile.zero) <= 1023.0f && tile.scale >= 6.2e-5f && tile.scale <= 6e4f;
  }
  return grid;
}

/// The next eight codes, the lowest of `low` and `high`, as bytes of r.x and r.y, in the places of code_place. Those of 1
/// and 2 bits were XORed with the zero code before.
template <int kBits>
__device__ inline uint2 spread_codes(std::uint32_t low, std::uint32_t high, std::uint32_t zero_codes) {
  if constexpr (kBits == 1) {
    return {((low & 0xfu) * 0x00204081u) & 0x01010101u, ((low >> 4 & 0xfu) * 0x00204081u) & 0x01010101u};
  } else if constexpr (kBits == 2) {
    const std::uint32_t codes = pick_bytes(low, 0, 0x4140);  // 00 c7..c4 00 c3..c0
    return {(codes | codes << 6) & 0x03030303u, (codes >> 4 | codes << 2) & 0x03030303u};
  } else if constexpr (kBits == 4) {
    return {(low & 0x0f0f0f0fu) ^ zero_codes, (low >> 4 & 0x0f0f0f0fu) ^ zero_codes};
  } else {
    return {low, high};
  }
}

/// Values of four codes in the bytes of `codes`.
template <int kBits>
__device__ inline uint2 look_up(std::uint32_t codes, const PreparedGrid<kBits>& grid, MmaType type) {
  if constexpr (kBits <= 2) {
    const std::uint32_t selectors = codes * 0x22u + 0x10101010u;  // per byte: (2c+1) << 4 | 2c
    return {pick_bytes(grid.low, grid.high, selectors), pick_bytes(grid.low, grid.high, selectors >> 16)};
  } else {
    codes ^= grid.zero_codes;
    if (grid.exact) {
      const __half2 first = as_half2(pick_bytes(codes, 0x64646464u, 0x4140));  // 0x6400 | code = 1024 + code
      const __half2 second = as_half2(pick_bytes(codes, 0x64646464u, 0x4342));
      const __half2 origin = as_half2(grid.low);
      const __half2 scale = as_half2(grid.high);
      return {as_bits(__hmul2(__hsub2(first, origin), scale)), as_bits(__hmul2(__hsub2(second, origin), scale))};
    }
    float values[4];
    for (int i = 0; i < 4; ++i) {
      values[i] = (static_cast<float>(codes >> (8 * i) & 0xffu) - grid.zero) * grid.scale;
    }
    return {pack_floats(values[0], values[1], type), pack_floats(values[2], values[3], type)};
  }
}

/// Clears the pruned ones of four elements; bit 3 of `nibble` is the first.
__device__ inline uint2 clear_pruned(uint2 values, std::uint32_t nibble) {
  const std::uint32_t signs = nibble * 0x10204080u;  // bit 3 -> 31, 2 -> 23, 1 -> 15, 0 -> 7
  return {values.x & pick_bytes(signs, 0, 0xaabb), values.y & pick_bytes(signs, 0, 0x8899)};
}

/// Chunks of 8 elements (4 for halves) whose loads from shared memory stand before all of their stores, so that latencies
/// overlap. The stores are assembly that claims no memory, so the compiler may move loads further ahead still.
inline constexpr int kChunksInFlight = 4;

/// What a lane needs to expand its tiles, worked out once.
struct ExpandLane {
  const std::uint32_t* table;  // 1 to 8 bits: this lane's copy, an entry every kTableCopies words
  std::uint32_t row;           // shared address of the lane's row of 64 numbers, XORed with 16 * (lane mod 8)
};

/// Stores chunk `chunk` (8 numbers) of a lane's row. It lies at place chunk ^ (lane mod 8), so that neither these stores
/// nor ldmatrix meet in a bank. Rows start at multiples of 128 bytes.
__device__ inline void store_chunk(const ExpandLane& lane, int chunk, uint4 numbers) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(lane.row ^ (chunk * 16)), "r"(numbers.x), "r"(numbers.y),
               "r"(numbers.z), "r"(numbers.w));
}

/// Bits of a table index: bytes of a bitmap are kept shifted to byte offsets into the table.
inline constexpr int kIndexShift = 5;
static_assert(1 << kIndexShift == kTableCopies * 4);

/// Byte `chunk` of a bitmap, shifted by kIndexShift.
__device__ inline std::uint32_t chunk_index(const LaneTile& tile, int chunk) {
  const std::uint32_t word = chunk < 4 ? tile.first : tile.second;
  const int shift = 24 - 8 * (chunk % 4) - kIndexShift;
  return (shift >= 0 ? word >> shift : word << -shift) & 0xffu << kIndexShift;
}

__device__ inline std::uint32_t table_entry(const ExpandLane& lane, std::uint32_t index) {
  return *reinterpret_cast<const std::uint32_t*>(reinterpret_cast<const char*>(lane.table) + index);
}

/// Eight numbers from their codes and table entry.
template <int kBits, bool kMasks>
__device__ inline void expand_chunk(const ExpandLane& lane, int chunk, std::uint32_t low, std::uint32_t high,
                                    std::uint32_t entry, std::uint32_t index, const PreparedGrid<kBits>& grid,
                                    MmaType type) {
  const uint2 codes = spread_codes<kBits>(low, high, grid.zero_codes);
  uint2 left = look_up<kBits>(pick_bytes(codes.x, codes.y, entry), grid, type);
  uint2 right = look_up<kBits>(pick_bytes(codes.x, codes.y, entry >> 16), grid, type);
  if constexpr (kMasks) {
    left = clear_pruned(left, index >> (kIndexShift + 4));
    right = clear_pruned(right, index >> kIndexShift & 0xfu);
  }
  store_chunk(lane, chunk, make_uint4(left.x, left.y, right.x, right.y));
}

/// Expands a tile of 1 or 2 bits whose codes fit 64 bits: they are shifted through two registers.
template <int kBits, bool kMasks>
__device__ inline void expand_short(const ExpandLane& lane, const LaneTile& tile, const PreparedGrid<kBits>& grid,
                                    const std::uint32_t* column, MmaType type) {
  std::uint32_t low = column[0] ^ grid.zero_codes;
  std::uint32_t high = column[kWarpLanes] ^ grid.zero_codes;
  std::uint32_t entry[8];
#pragma unroll
  for (int chunk = 0; chunk < 8; ++chunk) entry[chunk] = table_entry(lane, chunk_index(tile, chunk));
#pragma unroll
  for (int chunk = 0; chunk < 8; ++chunk) {
    const std::uint32_t index = chunk_index(tile, chunk);
    expand_chunk<kBits, kMasks>(lane, chunk, low, 0, entry[chunk], index, grid, type);
    const std::uint32_t used = kBits * __popc(index);  // at most 16
    low = __funnelshift_r(low, high, used);
    high >>= used;
  }
}

/// Expands any tile of codes: windows of the column at the codes' position.
template <int kBits, bool kMasks>
__device__ inline void expand_long(const ExpandLane& lane, const LaneTile& tile, const PreparedGrid<kBits>& grid,
                                   const std::uint32_t* column, MmaType type) {
  std::uint32_t position = 0;  // bits of the tile's codes behind us
#pragma unroll
  for (int first = 0; first < 8; first += kChunksInFlight) {
    std::uint32_t entry[kChunksInFlight], low[kChunksInFlight], high[kChunksInFlight];
#pragma unroll
    for (int i = 0; i < kChunksInFlight; ++i) {
      const std::uint32_t index = chunk_index(tile, first + i);
      entry[i] = table_entry(lane, index);
      const std::uint32_t* window = column + position / 32 * kWarpLanes;
      const std::uint32_t middle = window[kWarpLanes];
      low[i] = __funnelshift_r(window[0], middle, position);
      high[i] = kBits == 8 ? __funnelshift_r(middle, window[2 * kWarpLanes], position) : 0u;
      if constexpr (kBits <= 2) low[i] ^= grid.zero_codes;
      position += kBits * __popc(index);
    }
#pragma unroll
    for (int i = 0; i < kChunksInFlight; ++i) {
      const int chunk = first + i;
      expand_chunk<kBits, kMasks>(lane, chunk, low[i], high[i], entry[i], chunk_index(tile, chunk), grid, type);
    }
  }
}

/// Expands a tile of 16-bit survivors, four elements at a time: the window of the next four halves is shifted into place
/// and each pair of elements picks its halves, or zero bytes, with one PRMT.
__device__ inline void expand_halves(const ExpandLane& lane, const LaneTile& tile, const std::uint32_t* column) {
  const char* entries = reinterpret_cast<const char*>(lane.table);
  std::uint32_t place = 0;  // 64 times the halves behind us: half a row of the column each
#pragma unroll
  for (int first = 0; first < 16; first += kChunksInFlight) {
    uint2 entry[kChunksInFlight];
    std::uint32_t low[kChunksInFlight], high[kChunksInFlight];
#pragma unroll
    for (int i = 0; i < kChunksInFlight; ++i) {
      const int quad = first + i;  // of elements; its bits times 8 are the entry's offset
      const std::uint32_t word = quad < 8 ? tile.first : tile.second;
      const int shift = 28 - 4 * (quad % 8) - 3;
      const std::uint32_t offset = (shift >= 0 ? word >> shift : word << -shift) & 0x78u;
      entry[i] = *reinterpret_cast<const uint2*>(entries + offset);
      const auto* window =
          reinterpret_cast<const std::uint32_t*>(reinterpret_cast<const char*>(column) + (place & ~127u));
      const std::uint32_t middle = window[kWarpLanes];
      low[i] = __funnelshift_r(window[0], middle, place / 4);  // by 16 where the count is odd: modulo 32
      high[i] = __funnelshift_r(middle, window[2 * kWarpLanes], place / 4);
      place += 64 * __popc(offset);
    }
    std::uint32_t out[2 * kChunksInFlight];
#pragma unroll
    for (int i = 0; i < kChunksInFlight; ++i) {
      out[2 * i] = pick_bytes(low[i], 0, entry[i].x);
      out[2 * i + 1] = pick_bytes(__funnelshift_rc(low[i], high[i], entry[i].y), 0, entry[i].x >> 16);
    }
#pragma unroll
    for (int i = 0; i < kChunksInFlight / 2; ++i) {
      store_chunk(lane, first / 2 + i, make_uint4(out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]));
    }
  }
}

/// Expands this lane's tile, whose words lie in `column`, to its row. All lanes of a warp call.
template <int kBits>
__device__ inline void expand_tile(const ExpandLane& lane, const LaneTile& tile, const std::uint32_t* column,
                                   MmaType type) {
  if constexpr (kBits == kUnquantizedBits) {
    expand_halves(lane, tile, column);
    return;
  } else {
    const PreparedGrid<kBits> grid = prepare_grid<kBits>(tile, type);
    // The branches are the warp's, so that the usual tiles pay nothing for the unusual ones.
    const bool masks = __any_sync(kAllLanes, grid.masks);
    if constexpr (kBits <= 2) {
      const bool is_long = kBits == 2 && __any_sync(kAllLanes, tile.count > 32);
      if (!is_long) {
        if (masks) {
          expand_short<kBits, true>(lane, tile, grid, column, type);
        } else {
          expand_short<kBits, false>(lane, tile, grid, column, type);
        }
        return;
      }
      expand_long<kBits, true>(lane, tile, grid, column, type);
    } else if (masks) {
      expand_long<kBits, true>(lane, tile, grid, column, type);
    } else {
      expand_long<kBits, false>(lane, tile, grid, column, type);
    }
  }
}

}  // namespace kvpack::cuda
