// Many tokens' coefficients to the bytes of rows on the GPU. A warp takes the same coefficients of 32 tokens, a token a lane: no
// lane waits for another number of levels, and boundaries are loaded once for 32 tokens. Few tokens, or more coefficients than
// shared memory holds of 32: pack_kernel of codec_cuda.cuh.
#pragma once

#include "cuda/async_copy.cuh"
#include "cuda/mma.cuh"
#include "cuda/shared_store.cuh"
#include "formats/klt_rows/codec_cuda.cuh"

namespace kvpack::cuda {

namespace rows {

inline constexpr int kTileTokens = kWarpLanes;  // of a tile, what a block works on at a time
inline constexpr int kTileWarps = 16;
inline constexpr int kTileThreads = kTileWarps * kWarpLanes;
inline constexpr int kOwnTokens = kTileTokens / kTileWarps;  // that a warp fetches and sends away

/// 32-bit words from a token of a tile to the next one. Four more than its numbers, so that eight lanes which read 16 bytes of
/// a token each take all banks.
KVPACK_HOST_DEVICE inline std::int64_t tile_stride(std::int64_t pitch) { return pitch + 4; }

/// What a tile keeps of its tokens behind their numbers.
struct TileTokens {
  std::uint16_t* rows[kTileTokens];  // null: no such token
  float inverses[kTileTokens];
  std::uint32_t scale_codes[kTileTokens];
};

/// Shared memory of a tile.
KVPACK_HOST_DEVICE inline std::int64_t tile_bytes(std::int64_t pitch) {
  return kTileTokens * tile_stride(pitch) * 4 + static_cast<std::int64_t>(sizeof(TileTokens));
}

/// How many boundaries lie below y, of kLevels - 1 that ascend; 0 for NaN. By halves, in registers.
template <int kLevels>
__device__ inline std::uint32_t code_among(float y, const float (&boundaries)[kLevels - 1]) {
  if constexpr (kLevels == 2) {
    return y > boundaries[0] ? 1u : 0u;
  } else if constexpr (kLevels % 2 != 0) {
    float others[kLevels - 2];
#pragma unroll
    for (int j = 0; j < kLevels - 2; ++j) others[j] = boundaries[j];
    return code_among<kLevels - 1>(y, others) + (y > boundaries[kLevels - 2] ? 1u : 0u);
  } else {
    constexpr int kHalf = kLevels / 2;
    const bool is_upper = y > boundaries[kHalf - 1];
    float rest[kHalf - 1];
#pragma unroll
    for (int j = 0; j < kHalf - 1; ++j) rest[j] = is_upper ? boundaries[kHalf + j] : boundaries[j];
    return (is_upper ? static_cast<std::uint32_t>(kHalf) : 0u) + code_among<kHalf>(y, rest);
  }
}

/// Nodes by their place: pointers to them cost more instructions.
struct Nodes {
  const char* bytes;
  __device__ float4 at(std::uint32_t number, std::int32_t constant) const {
    const auto* place = bytes + static_cast<std::uint64_t>(number) * sizeof(Node);
    return __ldg(reinterpret_cast<const float4*>(place) + constant);
  }
  /// Which of the four children of a node y belongs to.
  __device__ std::uint32_t child(float y, std::uint32_t number, std::int32_t constant) const {
    const float4 values = at(number, constant);
    const float boundaries[3] = {values.x, values.y, values.z};
    return code_among<4>(y, boundaries);
  }
};

/// Codes of a quad whose coefficients have kLevels levels each, a byte each.
template <int kLevels>
__device__ inline std::uint32_t quad_codes(const float (&y)[4], const Nodes& nodes) {
  std::uint32_t codes = 0;
  if constexpr (kLevels <= 8) {
    float boundaries[4][kLevels - 1];
#pragma unroll
    for (int j = 0; j < kLevels - 1; ++j) {
      const float4 values = nodes.at(0, j);
      boundaries[0][j] = values.x;
      boundaries[1][j] = values.y;
      boundaries[2][j] = values.z;
      boundaries[3][j] = values.w;
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) codes += code_among<kLevels>(y[c], boundaries[c]) << (8 * c);
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int tree = c * tree_nodes(kLevels);
      std::uint32_t code = nodes.child(y[c], 0, tree);
      code = 4 * code + nodes.child(y[c], code, tree + 1);
      if constexpr (kLevels > 16) code = 4 * code + nodes.child(y[c], code, tree + 5);
      codes += code << (8 * c);
    }
  }
  return codes;
}

/// A lane's token in a tile. Once read, a quad of numbers makes room for three words: the low bits of its codes, their digits,
/// and 32 bits of the row. Lanes that lie 8 apart take other places for them, so that a warp finds all banks.
struct LaneToken {
  std::uint32_t* words;
  std::uint32_t address;  // of words
  std::int32_t fields;
  std::int32_t digits;
  std::int32_t row;

  __device__ LaneToken(std::uint32_t* tile, std::int32_t stride, std::int32_t token)
      : words(tile + token * stride),
        address(shared_address(tile + token * stride)),
        fields(token / 8 % 4),
        digits((token / 8 + 1) % 4),
        row((token / 8 + 2) % 4) {}
};

/// Reads and normalises a quad at an address.
__device__ inline void read_quad(std::uint32_t address, float inverse, float (&y)[4]) {
  const uint4 z = load_shared_chunk(address);
  y[0] = __uint_as_float(z.x) * inverse;
  y[1] = __uint_as_float(z.y) * inverse;
  y[2] = __uint_as_float(z.z) * inverse;
  y[3] = __uint_as_float(z.w) * inverse;
}

/// Finds a quad's codes where all four coefficients have as many levels.
template <int kIndex>
__device__ inline void code_whole_quad(const LaneToken& token, float inverse, std::uint32_t address,
                                       const Nodes& nodes) {
  constexpr klt_rows::LevelParts kParts = klt_rows::parts_of(kIndex);
  constexpr std::uint32_t kLowBits = ((1u << kParts.low_bits) - 1u) * 0x01010101u;
  float y[4];
  read_quad(address, inverse, y);
  const std::uint32_t codes = quad_codes<kKltLevels[kIndex]>(y, nodes);
  constexpr bool kHasDigits = kParts.digit_section >= 0;
  if constexpr (kParts.field_section >= 0) {
    store_shared_word(address + 4 * token.fields, kHasDigits ? codes & kLowBits : codes);
  }
  if constexpr (kHasDigits) store_shared_word(address + 4 * token.digits, codes >> kParts.low_bits & 0x07070707u);
  store_shared_word(address + 4 * token.row, 0u);
}

/// The same where they differ or there are fewer than four.
__device__ inline void code_mixed_quad(const Parts& parts, const LaneToken& token, float inverse, std::int32_t quad) {
  std::uint32_t fields = 0;
  std::uint32_t digits = 0;
  const std::int32_t end = min(4 * quad + 4, parts.plan.layout.coded);
#pragma unroll 1
  for (std::int32_t k = 4 * quad; k < end; ++k) {
    const Coefficient coefficient = parts.coefficients[k];
    const float y[1] = {__uint_as_float(token.words[k]) * inverse};
    std::uint32_t codes[1];
    find_codes(y, coefficient, parts.boundaries, codes);
    fields |= (codes[0] & ((1u << coefficient.low_bits) - 1u)) << (8 * (k % 4));
    digits |= codes[0] >> coefficient.low_bits << (8 * (k % 4));
  }
  token.words[4 * quad + token.fields] = fields;
  token.words[4 * quad + token.digits] = digits;
  token.words[4 * quad + token.row] = 0;
}

/// Finds the codes of every kTileWarps-th whole quad from `quad` on, of kKltLevels[kIndex] and fewer levels.
template <int kIndex>
__device__ inline void code_whole_quads(const Parts& parts, const LaneToken& token, float inverse, std::int32_t quad) {
  if constexpr (kIndex < kNumKltLevels) {
    constexpr int kBytes = quad_nodes(kKltLevels[kIndex]) * static_cast<int>(sizeof(Node));
    const QuadRange quads = parts.plan.quads[kIndex];
    // A mixed one: at most two lie between those of one number and the next.
    if (quad < quads.begin) quad += kTileWarps;
    if (quad < quads.end) {
      const auto* first = reinterpret_cast<const char*>(parts.tiles.nodes + parts.plan.first_node[kIndex]);
      Nodes nodes{first + (quad - quads.begin) * kBytes};
      std::uint32_t address = token.address + 16 * quad;
#pragma unroll 1
      do {
        code_whole_quad<kIndex>(token, inverse, address, nodes);
        nodes.bytes += kTileWarps * kBytes;
        address += kTileWarps * 16;
        quad += kTileWarps;
      } while (quad < quads.end);
    }
    code_whole_quads<kIndex + 1>(parts, token, inverse, quad);
  }
}

/// Sections in their order: fields, then digits.
inline constexpr int kNumSections = klt_rows::kNumFieldSections + klt_rows::kNumDigitSections;

/// Pieces of a section's units and what each counts more than the one before.
template <int kSection>
struct SectionUnits {
  static constexpr bool kAreFields = kSection < klt_rows::kNumFieldSections;
  static constexpr int kPieces =
      kAreFields ? unit_fields(kSection) : klt_rows::group_digits(kSection - klt_rows::kNumFieldSections);
  static constexpr std::uint32_t kMultiplier =
      kAreFields ? 1u << klt_rows::field_bits(kSection) : klt_rows::digit_base(kSection - klt_rows::kNumFieldSections);
  static KVPACK_HOST_DEVICE constexpr std::uint32_t weight(int piece) {
    std::uint32_t result = piece < kPieces ? 1 : 0;
    for (int i = 0; i < piece; ++i) result *= kMultiplier;
    return result;
  }
  template <int kPiece>
  static constexpr std::uint32_t kWeights = weight(kPiece) | weight(kPiece + 1) << 16;  // of two pieces
  static __device__ std::int32_t end(const RowPlan& plan) {
    if constexpr (kSection + 1 < klt_rows::kNumFieldSections) return plan.first_field_unit[kSection + 1];
    constexpr int kNext = kSection + 1 - klt_rows::kNumFieldSections;
    if constexpr (kNext >= 0 && kNext < klt_rows::kNumDigitSections) return plan.first_digit_unit[kNext];
    return plan.units;
  }
};

/// Puts up to 20 bits into a row.
__device__ inline void put_number(std::uint32_t address, std::uint32_t number, std::uint32_t place) {
  set_shared_bits(address, __funnelshift_l(0u, number, place));
  set_shared_bits(address + 16, __funnelshift_l(number, 0u, place));  // mostly none: cheaper than to ask
}

/// Puts every kTileWarps-th unit from `index` on, of section kSection and those behind it, into a token's row.
template <int kSection>
__device__ inline void put_units(const Parts& parts, const LaneToken& token, std::int32_t index) {
  if constexpr (kSection < kNumSections) {
    using Units = SectionUnits<kSection>;
    const std::uint32_t bytes = token.address + 4 * (Units::kAreFields ? token.fields : token.digits);
    const std::uint32_t row = token.address + 4 * token.row;
    const std::int32_t end = Units::end(parts.plan);
#pragma unroll 2
    for (; index < end; index += kTileWarps) {
      const uint2 unit = __ldg(reinterpret_cast<const uint2*>(parts.tiles.units + index));
      const std::uint32_t quad = bytes + (unit.x >> 16);
      const std::uint32_t second = load_shared_word(quad + 16);
      const std::uint32_t four = __funnelshift_r(load_shared_word(quad), second, unit.x);
      std::uint32_t number =
          __dp2a_hi(Units::template kWeights<2>, four, __dp2a_lo(Units::template kWeights<0>, four, 0u));
      if constexpr (Units::kPieces > 4) {
        const std::uint32_t third = Units::kPieces > 5 ? load_shared_word(quad + 32) : 0u;
        const std::uint32_t rest = __funnelshift_r(second, third, unit.x);
        number = __dp2a_lo(Units::template kWeights<4>, rest, number);
        if constexpr (Units::kPieces > 6) number = __dp2a_hi(Units::template kWeights<6>, rest, number);
      }
      put_number(row + (unit.y >> 16), number, unit.y);
    }
    put_units<kSection + 1>(parts, token, index);
  }
}

/// The same for units whose coefficients are no neighbours or too few.
__device__ inline void put_split_unit(const Parts& parts, const LaneToken& token, std::int32_t index) {
  const Unit unit = parts.units[index];
  const std::int32_t bytes = index < parts.plan.first_digit_unit[0] ? token.fields : token.digits;
  std::uint32_t number = 0;
#pragma unroll 2
  for (int i = unit.count - 1; i >= 0; --i) {
    const std::int32_t k = parts.tiles.coefficients[unit.first_piece + i];
    number = number * unit.multiplier + (token.words[(k & ~3) + bytes] >> (8 * (k % 4)) & 0xffu);
  }
  put_number(token.address + unit.bit / 32 * 16 + 4 * token.row, number, unit.bit % 32);
}

/// Fetches a warp's own tokens of a tile from `first` on, and finds their scales; lane i sums strand i.
__device__ inline void fetch_tokens(const Parts& parts, std::int64_t first, std::uint32_t* tile, TileTokens& tokens) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int own = static_cast<int>(threadIdx.x) / kWarpLanes * kOwnTokens;
  const auto stride = static_cast<std::int32_t>(tile_stride(parts.pitch));
  const std::int32_t quads = (parts.num_coefficients + 3) / 4;
#pragma unroll
  for (int u = 0; u < kOwnTokens; ++u) {
    if (first + own + u >= parts.num_rows) break;
    const auto* values = reinterpret_cast<const float4*>(parts.values + (first + own + u) * parts.pitch);
    auto* target = reinterpret_cast<float4*>(tile + (own + u) * stride);
    for (std::int32_t i = lane; i < quads; i += kWarpLanes) {
#if __CUDA_ARCH__ >= 800
      copy_quad_async(shared_address(target + i), values + i);
#else
      target[i] = values[i];
#endif
    }
  }
#if __CUDA_ARCH__ >= 800
  commit_copies();
  wait_copies<0>();
#endif
  __syncwarp();
  float strands[kOwnTokens] = {};
  std::int32_t count = 0;
  const auto* numbers = reinterpret_cast<const float*>(tile) + own * stride;
#pragma unroll 4
  for (std::int32_t k = lane; k < parts.num_coefficients; k += kWarpLanes) {
    const bool takes_part = __ldg(parts.in_scale + k) != 0;
    count += takes_part ? 1 : 0;
#pragma unroll
    for (int u = 0; u < kOwnTokens; ++u) {
      const float square = numbers[u * stride + k] * numbers[u * stride + k];
      strands[u] = takes_part ? strands[u] + square : strands[u];
    }
  }
  for (int half = kWarpLanes / 2; half > 0; half /= 2) {
#pragma unroll
    for (int u = 0; u < kOwnTokens; ++u) strands[u] = strands[u] + __shfl_down_sync(kAllLanes, strands[u], half);
    count += __shfl_down_sync(kAllLanes, count, half);
  }
  float sum = 0.0f;  // of the lane's token
#pragma unroll
  for (int u = 0; u < kOwnTokens; ++u) {
    const float other = __shfl_sync(kAllLanes, strands[u], 0);
    sum = lane == u ? other : sum;
  }
  count = __shfl_sync(kAllLanes, count, 0);
  if (lane >= kOwnTokens) return;
  const __half scale = rounded_scale(sum, count);
  tokens.inverses[own + lane] = klt_inverse_scale(__half2float(scale));
  tokens.scale_codes[own + lane] = __half_as_ushort(scale) >> kKltScaleShift;
  tokens.rows[own + lane] = first + own + lane < parts.num_rows ? row_of(parts, first + own + lane) : nullptr;
}

/// Sends a warp's own rows away.
__device__ inline void send_rows(const Parts& parts, std::uint32_t* tile, const TileTokens& tokens) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int own = static_cast<int>(threadIdx.x) / kWarpLanes * kOwnTokens;
  const std::int32_t num_halves = parts.plan.layout.row_bytes / 2;
#pragma unroll
  for (int u = 0; u < kOwnTokens; ++u) {
    std::uint16_t* row = tokens.rows[own + u];
    if (row == nullptr) return;
    const LaneToken token(tile, static_cast<std::int32_t>(tile_stride(parts.pitch)), own + u);
    for (std::int32_t i = lane; i < num_halves; i += kWarpLanes) {
      row[i] = static_cast<std::uint16_t>(token.words[i / 2 * 4 + token.row] >> (16 * (i % 2)));
    }
  }
}

/// Writes the rows of coefficients, 32 tokens at a time. What a quad of a token is in shared memory, token 0:
///
///   z0 z1 z2 z3        numbers of four neighbouring coefficients, here of 12 12 3 2 levels
///   fields digits row  low bits of the codes 7 4 2 1, a byte each: 3 0 0 1; their digits: 1 1 2 0; a word of the row
///
/// Launch  any number of blocks of kTileThreads
/// Work    warps fetch tokens and find their scales; then take quads and find their codes, lanes being tokens; then units, which
///         join bytes of codes to bits of rows; then send rows away
/// Reads   values once, boundaries and units from the cache
/// Writes  rows once
/// Needs   tile_bytes(pitch) of dynamic shared memory; parts.tiles; a coded coefficient
__global__ void __launch_bounds__(kTileThreads) pack_tiles_kernel(Parts parts) {
  extern __shared__ uint4 all_memory[];
  auto* tile = reinterpret_cast<std::uint32_t*>(all_memory);
  const auto stride = static_cast<std::int32_t>(tile_stride(parts.pitch));
  auto& tokens = *reinterpret_cast<TileTokens*>(tile + kTileTokens * stride);
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  const LaneToken token(tile, stride, lane);
  const std::int64_t num_tiles = (parts.num_rows + kTileTokens - 1) / kTileTokens;
  for (std::int64_t i = blockIdx.x; i < num_tiles; i += gridDim.x) {
    // The last values were written last and may still be in the cache.
    fetch_tokens(parts, (num_tiles - 1 - i) * kTileTokens, tile, tokens);
    __syncthreads();
    const float inverse = tokens.inverses[lane];
    code_whole_quads<0>(parts, token, inverse, warp);
#pragma unroll 1
    for (std::int32_t m = kTileWarps - 1 - warp; m < parts.plan.num_mixed; m += kTileWarps) {
      code_mixed_quad(parts, token, inverse, parts.plan.mixed[m]);
    }
    // Words of a row that has more of them than quads, since rows are filled up to 16 bytes.
#pragma unroll 1
    for (std::int32_t word = (parts.plan.layout.coded + 3) / 4 + warp; word < row_words(parts.plan);
         word += kTileWarps) {
      token.words[4 * word + token.row] = 0;
    }
    __syncthreads();
    if (warp == 0) set_shared_bits(token.address + 4 * token.row, tokens.scale_codes[lane]);
    put_units<0>(parts, token, warp);
#pragma unroll 1
    for (std::int32_t m = kTileWarps - 1 - warp; m < parts.plan.num_split; m += kTileWarps) {
      put_split_unit(parts, token, parts.plan.split[m]);
    }
    __syncthreads();
    send_rows(parts, tile, tokens);
    __syncwarp();  // the next tokens take the place of these rows
  }
}

}  // namespace rows

}  // namespace kvpack::cuda
