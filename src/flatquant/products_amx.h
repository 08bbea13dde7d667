// The transform of one token in bfloat16 on AMX: tiles of 16 rows, sums in float32, the value between the two products rounded
// once to bfloat16. Included by kron_quantize_amx.cpp alone, behind tiles_amx.h.
//
//   step 1   W = X * right       A: rows of X as they lie     B: right in pairs of rows, packed once a call
//   step 2   Y = left^T * W      A: left^T, packed once       B: W in pairs of rows, made from step 1's sums in registers
//
// B's element pairs [k, k+1] of one column lie next to each other, so a tile of B is 32 x 16 elements in 16 rows of 64 bytes.
// Sides are padded to 32 with zeros, so that every step is a block of 2 x 2 result tiles: four loads feed four products.

namespace kvpack::amx {
namespace {

inline constexpr std::int64_t kSide = 32;           // of a block of 2 x 2 result tiles, and the depth of a tile
inline constexpr std::int64_t kTileElements = 512;  // bfloat16 of one tile of A or B

/// Matrices of a call, packed. Sides padded to kSide.
struct PackedMatrices {
  const BFloat16* left = nullptr;   // left^T [rows, rows], row-major, or null
  const BFloat16* right = nullptr;  // tiles [columns/32][columns/16], or null
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  [[nodiscard]] std::int64_t elements() const { return rows * columns; }
};

/// One row of a tile of B: 16 columns of rows k and k + 1, each given as 16 bfloat16.
inline __m512i pair_rows(__m256i even, __m256i odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}
inline __m256i load_16(const BFloat16* source) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)); }

/// The result block at tile row 2*i, tile column 2*j, in tiles 0 to 3. A is row-major with `stride` elements, B tiles of
/// `b_columns` tiles a row.
inline void multiply_block(const BFloat16* a, std::int64_t stride, const BFloat16* b, std::int64_t b_columns,
                           std::int64_t depth) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const std::int64_t a_bytes = stride * 2;
  for (std::int64_t k = 0; k < depth; k += kSide) {
    const BFloat16* b_tile = b + k / kSide * b_columns * kTileElements;
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, b_tile, kRowBytes);
    _tile_loadd(7, b_tile + kTileElements, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + 16 * stride + k, a_bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

/// Writes tiles 0 to 3 as a block of 32 x 32 floats.
inline void store_block(float* target, std::int64_t stride) {
  const std::int64_t bytes = stride * 4;
  _tile_stored(0, target, bytes);
  _tile_stored(1, target + 16, bytes);
  _tile_stored(2, target + 16 * stride, bytes);
  _tile_stored(3, target + 16 * stride + 16, bytes);
}

/// A block of 32 x 32 sums as two tiles of B, rounded.
inline void round_block(const float* sums, BFloat16* tiles) {
  for (std::int64_t column = 0; column < kSide; column += 16) {
    for (std::int64_t pair = 0; pair < 16; ++pair) {
      const float* even = sums + 2 * pair * kSide + column;
      const auto low = _mm512_cvtneps_pbh(_mm512_loadu_ps(even));
      const auto high = _mm512_cvtneps_pbh(_mm512_loadu_ps(even + kSide));
      _mm512_storeu_si512(tiles + pair * kSide,
                          pair_rows(reinterpret_cast<__m256i>(low), reinterpret_cast<__m256i>(high)));
    }
    tiles += kTileElements;
  }
}

/// Rows [rows, columns] of bfloat16, both padded, as tiles of B.
inline void pack_tiles(const BFloat16* x, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                       BFloat16* tiles) {
  for (std::int64_t row = 0; row < rows; row += kSide) {
    for (std::int64_t column = 0; column < columns; column += 16) {
      for (std::int64_t pair = 0; pair < 16; ++pair) {
        const BFloat16* even = x + (row + 2 * pair) * stride + column;
        _mm512_storeu_si512(tiles + pair * kSide, pair_rows(load_16(even), load_16(even + stride)));
      }
      tiles += kTileElements;
    }
  }
}

/// y [rows, columns] = left^T * x * right of one token; x [rows, columns] padded; `between` holds as many elements as x.
inline void transform_token(const PackedMatrices& matrices, const BFloat16* x, BFloat16* between, float* y) {
  const std::int64_t tile_columns = matrices.columns / 16;
  const BFloat16* w = between;
  if (matrices.right == nullptr) {
    pack_tiles(x, matrices.columns, matrices.rows, matrices.columns, between);
  } else {
    alignas(64) float sums[kSide * kSide];
    for (std::int64_t row = 0; row < matrices.rows; row += kSide) {
      for (std::int64_t column = 0; column < matrices.columns; column += kSide) {
        multiply_block(x + row * matrices.columns, matrices.columns, matrices.right + column / 16 * kTileElements,
                       tile_columns, matrices.columns);
        if (matrices.left == nullptr) {
          store_block(y + row * matrices.columns + column, matrices.columns);
        } else {
          store_block(sums, kSide);
          round_block(sums, between + (row / kSide * tile_columns + column / 16) * kTileElements);
        }
      }
    }
  }
  if (matrices.left == nullptr) return;
  for (std::int64_t column = 0; column < matrices.columns; column += kSide) {
    for (std::int64_t row = 0; row < matrices.rows; row += kSide) {
      multiply_block(matrices.left + row * matrices.rows, matrices.rows, w + column / 16 * kTileElements, tile_columns,
                     matrices.rows);
      store_block(y + row * matrices.columns + column, matrices.columns);
    }
  }
}

/// Packs both matrices into memory of this call.
inline PackedMatrices pack_matrices(const KronMatrices& matrices) {
  PackedMatrices packed;
  packed.rows = round_up(matrices.rows, kSide);
  packed.columns = round_up(matrices.columns, kSide);
  const std::int64_t left_elements = matrices.left == nullptr ? 0 : packed.rows * packed.rows;
  const std::int64_t right_elements = matrices.right == nullptr ? 0 : packed.columns * packed.columns;
  const std::int64_t elements = left_elements + 2 * right_elements;
  auto* memory = reinterpret_cast<BFloat16*>(thread_scratch(elements / 2 + kLanes, Scratch::kCall));
  std::fill_n(memory, elements, BFloat16{0});
  if (matrices.left != nullptr) {
    const auto* left = static_cast<const BFloat16*>(matrices.left);
    for (std::int64_t k = 0; k < matrices.rows; ++k) {
      for (std::int64_t i = 0; i < matrices.rows; ++i) memory[i * packed.rows + k] = left[k * matrices.rows + i];
    }
    packed.left = memory;
  }
  if (matrices.right != nullptr) {
    BFloat16* tiles = memory + left_elements;
    BFloat16* padded = tiles + right_elements;
    const auto* right = static_cast<const BFloat16*>(matrices.right);
    for (std::int64_t k = 0; k < matrices.columns; ++k) {
      std::copy_n(right + k * matrices.columns, matrices.columns, padded + k * packed.columns);
    }
    pack_tiles(padded, packed.columns, packed.columns, packed.columns, tiles);
    packed.right = tiles;
  }
  return packed;
}

}  // namespace
}  // namespace kvpack::amx
