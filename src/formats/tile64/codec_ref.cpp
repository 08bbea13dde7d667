// Reference of the tile formats: pruning, packing, unpacking, checking, tile by tile and plain. Every other
// implementation is compared with this one, bit for bit.
#include "formats/tile64/codec_ref.h"

#include <cmath>
#include <cstring>

#include "prune/implementations.h"

namespace kvpack::reference {

namespace {

/// One batch [padded tokens, head_dim]: pruned, and zero in the tokens that fill up the last block.
template <typename T>
std::vector<T> prune_batch(const CompressTile64Problem& problem, std::int64_t batch) {
  const Tile64Data& out = problem.out;
  std::vector<T> matrix(static_cast<std::size_t>(tile64::padded_tokens(out.tokens) * out.head_dim), T{});
  PruneProblem prune;
  prune.x = static_cast<T*>(problem.x.data) + problem.x.row_start(batch, 0);
  prune.out = matrix.data();
  prune.dtype = problem.x.dtype;
  prune.tokens = out.tokens;
  prune.channels = prune.head_dim = out.head_dim;
  prune.x_token_stride = problem.x.token_stride;
  prune.out_token_stride = out.head_dim;
  prune.protected_tokens = problem.prunes ? 0 : out.tokens;
  prune.rank_from_top = problem.rank_from_top;
  prune.rule = problem.rule;
  if (problem.channel_scores != nullptr) {
    prune.channel_scores = problem.channel_scores + batch * problem.channel_scores_batch_stride;
  }
  prune_magnitude(prune);
  return matrix;
}

/// A tile's survivors in ascending order, and where they were.
template <typename T>
struct Survivors {
  std::uint64_t bitmap = 0;
  std::vector<T> values;
};

template <typename T>
Survivors<T> collect(const std::vector<T>& matrix, const Tile64Data& out, std::int64_t tile) {
  Survivors<T> survivors;
  const tile64::TilePlace place = tile64::place_of(out.kind, out.head_dim, tile);
  const std::int64_t step = out.kind == CacheKind::kKey ? out.head_dim : 1;
  for (int i = 0; i < kTileElements; ++i) {
    const T value = matrix[static_cast<std::size_t>(place.token * out.head_dim + place.channel + i * step)];
    if (to_float(value) == 0.0f) continue;
    survivors.bitmap |= tile64::bitmap_bit(i);
    survivors.values.push_back(value);
  }
  return survivors;
}

/// 16 bits: the survivors' own bits, float32 rounded to a half; zeros up to a multiple of 8.
template <typename T>
void append_halves(const Survivors<T>& survivors, std::vector<std::uint16_t>& payload) {
  for (const T value : survivors.values) {
    if constexpr (std::is_same_v<T, float>) {
      Half half{};
      from_float(value, half);
      payload.push_back(half.bits);
    } else {
      payload.push_back(value.bits);
    }
  }
  while (payload.size() % tile64_f16::kTilePadHalves != 0) payload.push_back(0);
}

/// The grid of a tile's survivors. A comparison with NaN is false, so NaN is looked for by itself.
template <typename T>
tile64_q::Grid grid_of_survivors(const Survivors<T>& survivors, int bits) {
  if (survivors.values.empty()) return {};
  float low = INFINITY;
  float high = -INFINITY;
  for (const T value : survivors.values) {
    const float number = to_float(value);
    if (!std::isfinite(number)) return {NAN, 0.0f};
    low = number < low ? number : low;
    high = number > high ? number : high;
  }
  return tile64_q::grid_of(low, high, bits);
}

/// Codes, the first one in the lowest bits of its word.
template <typename T>
void append_codes(const Survivors<T>& survivors, tile64_q::Grid grid, int bits, std::vector<std::uint32_t>& payload) {
  const auto capacity = static_cast<std::size_t>(tile64_q::capacity(bits));
  for (std::size_t j = 0; j < survivors.values.size(); ++j) {
    if (j % capacity == 0) payload.push_back(0);
    payload.back() |= tile64_q::code_of(to_float(survivors.values[j]), grid, bits)
                      << (j % capacity * static_cast<std::size_t>(bits));
  }
}

/// Everything that compressing writes, held back until it is known to fit.
struct Packed {
  std::vector<std::uint64_t> bitmaps;
  std::vector<std::int32_t> offsets;
  std::vector<std::int32_t> starts;
  std::vector<std::uint16_t> halves;
  std::vector<std::uint32_t> words;
  std::vector<tile64_q::Grid> grids;
};

template <typename T>
void pack_batch(const std::vector<T>& matrix, const Tile64Data& out, Packed& packed) {
  const std::size_t first = packed.halves.size();
  const auto offset = [&] {
    return static_cast<std::int32_t>((packed.halves.size() - first) / tile64_f16::kHalvesPerOffset);
  };
  if (out.bits == kUnquantizedBits) {
    packed.starts.push_back(static_cast<std::int32_t>(first / tile64_f16::kHalvesPerStart));
  }
  for (std::int64_t t = 0; t < out.tiles; ++t) {
    const Survivors<T> survivors = collect(matrix, out, t);
    packed.bitmaps.push_back(survivors.bitmap);
    if (out.bits == kUnquantizedBits) {
      packed.offsets.push_back(offset());
      append_halves(survivors, packed.halves);
    } else {
      packed.offsets.push_back(static_cast<std::int32_t>(packed.words.size()));
      packed.grids.push_back(grid_of_survivors(survivors, out.bits));
      append_codes(survivors, packed.grids.back(), out.bits, packed.words);
    }
  }
  if (out.bits == kUnquantizedBits) packed.offsets.push_back(offset());
}

template <typename Element>
void copy_to(const std::vector<Element>& from, void* to) {
  if (!from.empty()) std::memcpy(to, from.data(), from.size() * sizeof(Element));
}

}  // namespace

void compress_tile64(const CompressTile64Problem& problem) {
  const Tile64Data& out = problem.out;
  Packed packed;
  for (std::int64_t b = 0; b < out.batches; ++b) {
    with_float_type(problem.x.dtype, [&]<typename T>() {
      // float64 is no type of a cache: the entry refuses it.
      if constexpr (!std::is_same_v<T, double>) pack_batch(prune_batch<T>(problem, b), out, packed);
    });
  }
  const auto taken = static_cast<std::int64_t>(packed.halves.size() + packed.words.size());
  if (taken > out.payload_capacity) tile64::throw_too_small(out, taken);
  if (problem.used != nullptr) *problem.used = taken;
  copy_to(packed.bitmaps, out.bitmaps);
  copy_to(packed.offsets, out.offsets);
  copy_to(packed.starts, out.starts);
  copy_to(packed.halves, out.payload);
  copy_to(packed.words, out.payload);
  for (std::size_t i = 0; i < packed.grids.size(); ++i) {
    out.scales[i] = packed.grids[i].scale;
    out.zeros[i] = packed.grids[i].zero;
  }
}

float code_value(const Tile64Data& tiles, std::int64_t place, std::int64_t first, std::int64_t j) {
  const std::int64_t capacity = tile64_q::capacity(tiles.bits);
  const std::uint32_t word = static_cast<const std::uint32_t*>(tiles.payload)[first + j / capacity];
  const std::uint32_t code = word >> (j % capacity * tiles.bits) & ((1u << tiles.bits) - 1u);
  return tile64_q::value_of(code, {tiles.scales[place], tiles.zeros[place]});
}

void unpack_tile64(const UnpackTile64Problem& problem) {
  const Tile64Data& tiles = problem.tiles;
  tile64::require_inside(tiles, "tiles");
  with_float_type(problem.out.dtype, [&]<typename T>() {
    for (std::int64_t b = 0; b < tiles.batches; ++b) {
      const std::vector<T> matrix = unpack_batch<T>(tiles, b);
      for (std::int64_t token = 0; token < tiles.tokens; ++token) {
        std::memcpy(static_cast<T*>(problem.out.data) + problem.out.row_start(b, token),
                    matrix.data() + token * tiles.head_dim, static_cast<std::size_t>(tiles.head_dim) * sizeof(T));
      }
    }
  });
}

}  // namespace kvpack::reference
