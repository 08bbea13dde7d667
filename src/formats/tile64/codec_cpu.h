// Compressing and unpacking tiles in the SIMD vocabulary. Compiled once per instruction set by codec_cpu.cpp; the passes
// over blocks are blocks.cpp's, single tiles are tile64_f16/codec_cpu.h's and tile64_q/codec_cpu.h's.
//
// A block of 64 tokens stays in the cache from the dense rows to the payload:
//
//   pass 1   rows -> survivors as bits, row by row -> (keys) transposed to one mask a channel -> counted
//   pass 2   rows -> (keys) transposed to 64 tokens of one channel each -> 64 elements under a mask -> payload

#include "prune/survivors_cpu.h"

#include "formats/tile64_f16/codec_cpu.h"
#include "formats/tile64_q/codec_cpu.h"

namespace kvpack::KVPACK_ISA {
namespace {

inline constexpr int kTile = static_cast<int>(kTileElements);

inline std::uint64_t reverse_bits(std::uint64_t word) {
  word = (word >> 1 & 0x5555555555555555u) | (word & 0x5555555555555555u) << 1;
  word = (word >> 2 & 0x3333333333333333u) | (word & 0x3333333333333333u) << 2;
  word = (word >> 4 & 0x0f0f0f0f0f0f0f0fu) | (word & 0x0f0f0f0f0f0f0f0fu) << 4;
  return __builtin_bswap64(word);
}

/// Swaps rows and columns of 64 x 64 bits: halves of the matrix first, then quarters, down to single bits.
inline void transpose_bits(std::uint64_t* rows) {
  std::uint64_t mask = 0x00000000ffffffffu;
  for (int width = 32; width > 0; width /= 2, mask ^= mask << width) {
    for (int first = 0; first < kTile; first += 2 * width) {
      for (int i = first; i < first + width; ++i) {
        const std::uint64_t moved = ((rows[i] >> width) ^ rows[i + width]) & mask;
        rows[i] ^= moved << width;
        rows[i + width] ^= moved;
      }
    }
  }
}

/// Bits of the elements that are not zero.
template <typename T>
inline std::uint64_t nonzero_mask(const T* x) {
  if constexpr (sizeof(T) == 2) {
    U16 ranks[kTile / kLanes16];
    for (int i = 0; i < kTile / kLanes16; ++i) {
      ranks[i] = magnitude_rank_u16(load_u16(&x->bits + i * kLanes16), set1_u16(nan_rank_of(T{})));
    }
    return mask64_ge_u16(ranks, set1_u16(1));
  } else {
    std::uint64_t mask = 0;
    for (int i = 0; i < kTile; i += kLanes) {
      mask |= static_cast<std::uint64_t>(bits(gt_u32(magnitude_rank(load(x + i)), set1_u32(0)))) << i;
    }
    return mask;
  }
}

/// First element of a block's row `token`.
template <typename T>
inline T* row_of(const DenseMatrices& matrices, tile64::Block block, std::int64_t token) {
  return static_cast<T*>(matrices.data) + matrices.row_start(block.batch, block.index * kTile + token);
}

/// Real tokens of a block.
inline int tokens_of(const Tile64Data& tiles, tile64::Block block) {
  const std::int64_t rest = tiles.tokens - block.index * kTile;
  return rest < kTile ? static_cast<int>(rest) : kTile;
}

/// Writes the survivors of rows that pruning chooses, word `part` of row t at masks[part * 64 + t].
template <typename T>
inline void prune_rows(const CompressTile64Problem& problem, tile64::Block block, int num_rows, std::uint64_t* masks) {
  const T* x = row_of<const T>(problem.x, block, 0);
  const std::int64_t stride = problem.x.token_stride;
  const Keep keep{static_cast<int>(problem.rank_from_top), problem.rule};
  if constexpr (sizeof(T) == 2) {
    if (problem.channel_scores == nullptr) {
      if (problem.out.head_dim == 64) return mask_rows_of_words<64>(x, stride, num_rows, keep, kTile, 1, masks);
      if (problem.out.head_dim == 128) return mask_rows_of_words<128>(x, stride, num_rows, keep, kTile, 1, masks);
      return mask_rows_of_words<256>(x, stride, num_rows, keep, kTile, 1, masks);
    }
  }
  alignas(64) std::uint32_t ranks[kLargestHeadDim];
  const float* scores = problem.channel_scores;
  if (scores != nullptr) scores += block.batch * problem.channel_scores_batch_stride;
  mask_rows_of_floats(x, stride, num_rows, problem.out.head_dim, scores, keep, kTile, 1, ranks, masks);
}

template <typename T>
std::int64_t mask_block(const CompressTile64Problem& problem, tile64::Block block, std::uint64_t* masks) {
  const Tile64Data& out = problem.out;
  const int num_rows = tokens_of(out, block);
  const std::int64_t parts = out.head_dim / kTile;
  for (std::int64_t i = 0; i < out.head_dim; ++i) masks[i] = ~std::uint64_t{0};
  if (problem.prunes) prune_rows<T>(problem, block, num_rows, masks);
  std::int64_t elements = 0;
  for (std::int64_t part = 0; part < parts; ++part) {
    std::uint64_t* part_masks = masks + part * kTile;
    for (int t = 0; t < kTile; ++t) {
      // A survivor that is zero gets no bit, and neither do tokens that only fill up the block.
      part_masks[t] &= t < num_rows ? nonzero_mask(row_of<const T>(problem.x, block, t) + part * kTile) : 0;
    }
    if (out.kind == CacheKind::kKey) transpose_bits(part_masks);
    for (int t = 0; t < kTile; ++t) {
      const int count = std::popcount(part_masks[t]);
      elements += out.bits == kUnquantizedBits ? tile64_f16::tile_halves(count) : tile64_q::tile_words(count, out.bits);
    }
  }
  return elements;
}

/// Writes a block's rows as columns: channel c's 64 tokens at target + 64 * c.
template <typename T>
inline void transpose_rows(const DenseMatrices& x, tile64::Block block, int num_rows, std::int64_t head_dim,
                           T* target) {
  const T* rows = row_of<const T>(x, block, 0);
  for (int t = 0; t < num_rows / 8 * 8; t += 8) {
    transpose8(rows + t * x.token_stride, x.token_stride, static_cast<int>(head_dim), target + t, kTile);
  }
  for (std::int64_t c = 0; num_rows < kTile && c < head_dim; ++c) {
    for (int t = num_rows / 8 * 8; t < kTile; ++t) {
      target[c * kTile + t] = t < num_rows ? rows[t * x.token_stride + c] : T{};
    }
  }
}

/// A block's tiles as rows of 64 elements of T: those of the matrix itself, or transposed ones.
template <typename T>
struct TileRows {
  const T* first;
  std::int64_t part_stride;  // from tile 64*h to 64*(h+1)
  std::int64_t row_stride;   // from a tile to the next in a part
  [[nodiscard]] const T* row(std::int64_t tile) const {
    return first + tile / kTile * part_stride + tile % kTile * row_stride;
  }
};

/// Writes a block's payload to `staging`, with offsets and grids to their places.
template <int kBits, typename T>
inline void write_tiles(const Tile64Data& out, tile64::Block block, const std::uint64_t* masks, TileRows<T> rows,
                        tile64::PayloadPlace place, std::uint8_t* staging) {
  const std::int64_t first_tile = block.index * out.head_dim;
  std::int32_t* offsets = out.offsets + block.batch * out.offsets_stride() + first_tile;
  const std::int64_t first_grid = block.batch * out.tiles + first_tile;
  std::int64_t elements = 0;
  for (std::int64_t i = 0; i < out.head_dim; ++i) {
    const std::uint64_t mask = masks[i];
    if constexpr (kBits == kUnquantizedBits) {
      offsets[i] =
          static_cast<std::int32_t>((place.first - place.batch_first + elements) / tile64_f16::kHalvesPerOffset);
      if (mask != 0) elements += write_halves(rows.row(i), mask, reinterpret_cast<std::uint16_t*>(staging) + elements);
    } else {
      offsets[i] = static_cast<std::int32_t>(place.first + elements);
      tile64_q::Grid grid;
      if (mask != 0) grid = write_codes<kBits>(rows.row(i), mask, staging + elements * 4);
      elements += tile64_q::tile_words(std::popcount(mask), kBits);
      out.scales[first_grid + i] = grid.scale;
      out.zeros[first_grid + i] = grid.zero;
    }
  }
}

/// Bytes of room for a block's payload, with what the vocabulary's words write behind its end.
inline std::int64_t staging_bytes(const Tile64Data& out) {
  return out.head_dim * kTile * static_cast<std::int64_t>(sizeof(Half)) + kTileRoom * 2;
}

template <typename T>
void write_block(const CompressTile64Problem& problem, tile64::Block block, const std::uint64_t* masks,
                 tile64::PayloadPlace place) {
  const Tile64Data& out = problem.out;
  // Tiles are written with whole vectors that run over their ends, so to memory of this thread first.
  const std::int64_t transposed_floats = out.head_dim * kTile;
  float* scratch = thread_scratch(transposed_floats + staging_bytes(out) / 4);
  auto* staging = reinterpret_cast<std::uint8_t*>(scratch + transposed_floats);
  TileRows<T> rows{row_of<const T>(problem.x, block, 0), kTile, problem.x.token_stride};
  if (out.kind == CacheKind::kKey) {
    auto* transposed = reinterpret_cast<T*>(scratch);
    transpose_rows(problem.x, block, tokens_of(out, block), out.head_dim, transposed);
    rows = {transposed, kTile * kTile, kTile};
  }
  switch (out.bits) {
    case 1:
      write_tiles<1>(out, block, masks, rows, place, staging);
      break;
    case 2:
      write_tiles<2>(out, block, masks, rows, place, staging);
      break;
    case 4:
      write_tiles<4>(out, block, masks, rows, place, staging);
      break;
    case 8:
      write_tiles<8>(out, block, masks, rows, place, staging);
      break;
    default:
      write_tiles<kUnquantizedBits>(out, block, masks, rows, place, staging);
  }
  const std::int64_t element_size = out.bits == kUnquantizedBits ? 2 : 4;
  if (place.end > place.first) {
    std::memcpy(static_cast<std::uint8_t*>(out.payload) + place.first * element_size, staging,
                static_cast<std::size_t>((place.end - place.first) * element_size));
  }
  std::uint64_t* bitmaps = out.bitmaps + block.batch * out.tiles + block.index * out.head_dim;
  for (std::int64_t i = 0; i < out.head_dim; ++i) bitmaps[i] = reverse_bits(masks[i]);
}

/// Writes the 64 dense elements of one tile.
template <typename T>
inline void read_tile(const Tile64Data& tiles, std::int64_t batch, std::int64_t tile, T* target) {
  const std::uint64_t mask = reverse_bits(tiles.bitmaps[batch * tiles.tiles + tile]);
  if (mask == 0) {
    std::memset(target, 0, kTile * sizeof(T));
    return;
  }
  const std::int32_t offset = tiles.offsets[batch * tiles.offsets_stride() + tile];
  if (tiles.bits == kUnquantizedBits) {
    const std::int64_t first = tile64_f16::first_half(tiles.starts[batch], offset);
    const std::int64_t available = tiles.payload_capacity - first;
    if (tiles.payload_type == DType::kFloat16) {
      read_halves(static_cast<const Half*>(tiles.payload) + first, available, mask, target);
    } else {
      read_halves(static_cast<const BFloat16*>(tiles.payload) + first, available, mask, target);
    }
    return;
  }
  const auto* words = static_cast<const std::uint8_t*>(tiles.payload) + std::int64_t{offset} * 4;
  const std::int64_t available = (tiles.payload_capacity - offset) * 4;
  const tile64_q::Grid grid{tiles.scales[batch * tiles.tiles + tile], tiles.zeros[batch * tiles.tiles + tile]};
  if (tiles.bits == 1) read_codes<1>(words, available, mask, grid, target);
  if (tiles.bits == 2) read_codes<2>(words, available, mask, grid, target);
  if (tiles.bits == 4) read_codes<4>(words, available, mask, grid, target);
  if (tiles.bits == 8) read_codes<8>(words, available, mask, grid, target);
}

template <typename T>
void unpack_block(const UnpackTile64Problem& problem, tile64::Block block) {
  const Tile64Data& tiles = problem.tiles;
  const int num_rows = tokens_of(tiles, block);
  const std::int64_t first_tile = block.index * tiles.head_dim;
  T* out = row_of<T>(problem.out, block, 0);
  const std::int64_t stride = problem.out.token_stride;
  if (tiles.kind == CacheKind::kValue) {
    for (std::int64_t i = 0; i < tiles.head_dim; ++i) {
      const std::int64_t token = i % kTile;
      if (token < num_rows) read_tile(tiles, block.batch, first_tile + i, out + token * stride + i / kTile * kTile);
    }
    return;
  }
  auto* channels = reinterpret_cast<T*>(thread_scratch(tiles.head_dim * kTile));
  for (std::int64_t c = 0; c < tiles.head_dim; ++c) {
    read_tile(tiles, block.batch, first_tile + c, channels + c * kTile);
  }
  // Eight channels are eight rows here, and a block's tokens the columns; a block that is not full goes by elements.
  for (std::int64_t c = 0; num_rows == kTile && c < tiles.head_dim; c += 8) {
    transpose8(channels + c * kTile, kTile, kTile, out + c, stride);
  }
  for (int t = 0; num_rows < kTile && t < num_rows; ++t) {
    for (std::int64_t c = 0; c < tiles.head_dim; ++c) out[t * stride + c] = channels[c * kTile + t];
  }
}

}  // namespace

void compress_tile64(const CompressTile64Problem& problem) {
  if (problem.x.dtype == DType::kFloat16) {
    tile64::compress_blocks(problem, mask_block<Half>, write_block<Half>);
  } else if (problem.x.dtype == DType::kBFloat16) {
    tile64::compress_blocks(problem, mask_block<BFloat16>, write_block<BFloat16>);
  } else {
    tile64::compress_blocks(problem, mask_block<float>, write_block<float>);
  }
}

void unpack_tile64(const UnpackTile64Problem& problem) {
  if (problem.out.dtype == DType::kFloat16) {
    tile64::unpack_blocks(problem, unpack_block<Half>);
  } else if (problem.out.dtype == DType::kBFloat16) {
    tile64::unpack_blocks(problem, unpack_block<BFloat16>);
  } else {
    tile64::unpack_blocks(problem, unpack_block<float>);
  }
}

}  // namespace kvpack::KVPACK_ISA
