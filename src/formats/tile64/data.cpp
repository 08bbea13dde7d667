// Checks of tiles and dense matrices: views in, plain pointers out.
#include "formats/tile64/data.h"

#include <limits>

#include "formats/tile64/tiles.h"
#include "formats/tile64_f16/layout.h"
#include "formats/tile64_q/layout.h"

namespace kvpack::tile64 {

namespace {

constexpr std::int64_t kLargestInt32 = std::numeric_limits<std::int32_t>::max();

/// The numbers of int32 that a full tile moves the offsets and the starts on.
struct FullTile {
  std::int64_t offsets;
  std::int64_t starts;
};

FullTile full_tile(std::int32_t bits) {
  if (bits != kUnquantizedBits) return {tile64_q::tile_words(kTileElements, bits), 0};
  return {kTileElements / tile64_f16::kHalvesPerOffset, kTileElements / tile64_f16::kHalvesPerStart};
}

void require_absent(const TensorView& view, const char* name, const char* part, std::int32_t bits) {
  if (is_empty(view)) return;
  throw InvalidArgument(text(name, ".", part, " has shape ", shape_text(view), "; tiles of ", bits,
                             " bits have none, pass an empty view"));
}

DType checked_payload_type(const Tile64& tiles, const char* name) {
  const DType type = tiles.payload.dtype;
  if (tiles.bits != kUnquantizedBits) return DType::kInt32;
  if (type == DType::kFloat16 || type == DType::kBFloat16) return type;
  throw InvalidArgument(text(name, ".payload is ", name_of(type), "; tiles of 16 bits hold float16 or bfloat16"));
}

}  // namespace

std::int64_t require_size(std::int32_t bits, std::int64_t batches, std::int64_t tokens, std::int64_t head_dim) {
  const bool known = bits == 1 || bits == 2 || bits == 4 || bits == 8 || bits == kUnquantizedBits;
  require(known, "bits is ", bits, "; it must be 1, 2, 4, 8 or 16");
  require(batches >= 0 && batches <= kLargestInt32, "there are ", batches, " batches; it must be 0 to ", kLargestInt32);
  const std::int64_t tiles = tile64_tiles(tokens, head_dim);
  const FullTile full = full_tile(bits);
  // Offsets of 16 bits restart at every batch; all other counters run through all of them.
  const std::int64_t of_all = bits == kUnquantizedBits ? full.starts : full.offsets;
  const bool fits =
      tiles <= kLargestInt32 / full.offsets && (batches == 0 || tiles <= kLargestInt32 / of_all / batches);
  require(fits, batches, " batches of ", tiles, " tiles are more than int32 offsets of ", bits,
          " bits can reach: ", kLargestInt32 / full.offsets, " tiles in a batch, ", kLargestInt32 / of_all, " in all");
  return tiles;
}

Tile64Data checked_tiles(const Tile64& tiles, const char* name) {
  require(tiles.kind == CacheKind::kKey || tiles.kind == CacheKind::kValue, name, ".kind is ",
          static_cast<int>(tiles.kind), "; it must be 0 (key) or 1 (value)");
  if (tiles.bitmaps.rank != 2) {
    throw InvalidArgument(text(name, ".bitmaps has shape ", shape_text(tiles.bitmaps), "; expected [batches, tiles]"));
  }
  const Device device = tiles.bitmaps.device;
  Tile64Data data;
  data.kind = tiles.kind;
  data.bits = tiles.bits;
  data.batches = tiles.bitmaps.shape[0];
  data.tokens = tiles.tokens;
  data.head_dim = tiles.head_dim;
  data.tiles = require_size(tiles.bits, data.batches, tiles.tokens, tiles.head_dim);
  data.payload_type = checked_payload_type(tiles, name);
  if (tiles.payload.rank != 1 || tiles.payload.shape[0] < 0) {
    throw InvalidArgument(text(name, ".payload has shape ", shape_text(tiles.payload), "; expected [capacity]"));
  }
  data.payload_capacity = tiles.payload.shape[0];
  require_exact(tiles.bitmaps, {name, "bitmaps"}, DType::kInt64, {data.batches, data.tiles}, device);
  require_exact(tiles.offsets, {name, "offsets"}, DType::kInt32, {data.batches, data.offsets_stride()}, device);
  require_exact(tiles.payload, {name, "payload"}, data.payload_type, {data.payload_capacity}, device);
  data.bitmaps = static_cast<std::uint64_t*>(tiles.bitmaps.data);
  data.offsets = static_cast<std::int32_t*>(tiles.offsets.data);
  data.payload = tiles.payload.data;
  if (tiles.bits == kUnquantizedBits) {
    require_absent(tiles.scales, name, "scales", tiles.bits);
    require_absent(tiles.zeros, name, "zeros", tiles.bits);
    require_exact(tiles.starts, {name, "starts"}, DType::kInt32, {data.batches}, device);
    data.starts = static_cast<std::int32_t*>(tiles.starts.data);
  } else {
    require_absent(tiles.starts, name, "starts", tiles.bits);
    require_exact(tiles.scales, {name, "scales"}, DType::kFloat32, {data.batches, data.tiles}, device);
    require_exact(tiles.zeros, {name, "zeros"}, DType::kFloat32, {data.batches, data.tiles}, device);
    data.scales = static_cast<float*>(tiles.scales.data);
    data.zeros = static_cast<float*>(tiles.zeros.data);
  }
  // Starts count 16 bytes so that a GPU can fetch that much at once.
  constexpr std::uintptr_t kAlignment = 16;
  const auto address = reinterpret_cast<std::uintptr_t>(tiles.payload.data);
  require(device.kind == DeviceKind::kCpu || address % kAlignment == 0, name, ".payload starts at an address of ",
          address % kAlignment, " modulo ", kAlignment, "; expected 0");
  return data;
}

std::int64_t num_matrices(const TensorView& view) {
  return view.rank == 4 ? view.shape[0] * view.shape[1] : view.shape[0];
}

DenseMatrices checked_matrices(const TensorView& view, const char* name, const Tile64Data& tiles,
                               const Device& device) {
  const bool has_rank = view.rank == 3 || view.rank == 4;
  const auto axis = static_cast<std::size_t>(has_rank ? view.rank - 2 : 0);  // tokens
  const bool has_batches = view.shape[0] >= 0 && view.shape[0] <= kLargestInt32 && view.shape[1] >= 0 &&
                           view.shape[1] <= kLargestInt32;  // so that their product cannot overflow
  const bool fits = has_rank && has_batches && num_matrices(view) == tiles.batches &&
                    view.shape[axis] == tiles.tokens && view.shape[axis + 1] == tiles.head_dim;
  if (!fits) {
    throw InvalidArgument(text(name, " has shape ", shape_text(view), "; expected [", tiles.batches, ", ", tiles.tokens,
                               ", ", tiles.head_dim, "] or [batch, kv_heads, ", tiles.tokens, ", ", tiles.head_dim,
                               "] with ", tiles.batches, " matrices"));
  }
  const bool known = view.dtype == DType::kFloat16 || view.dtype == DType::kBFloat16 || view.dtype == DType::kFloat32;
  require(known, name, " is ", name_of(view.dtype), "; expected float16, bfloat16 or float32");
  if (view.device != device) {
    throw InvalidArgument(text(name, " is on ", device_text(view.device), "; expected ", device_text(device)));
  }
  // Strides of a tensor without elements mean nothing; numpy makes them 0.
  for (int i = 0; i < view.rank && view.num_elements() > 0; ++i) {
    const std::int64_t stride = view.strides[static_cast<std::size_t>(i)];
    const bool is_channels = i == view.rank - 1;
    if (stride >= 0 && (!is_channels || stride == 1)) continue;
    throw InvalidArgument(text(name, " has the strides ", text_of(view.strides, view.rank),
                               "; none may be negative, and that of the channels must be 1"));
  }
  require(view.data != nullptr || view.num_elements() == 0, name, " has no memory");
  DenseMatrices matrices;
  matrices.data = view.data;
  matrices.dtype = view.dtype;
  matrices.heads = view.rank == 4 ? view.shape[1] : 1;
  matrices.sequence_stride = view.strides[0];
  matrices.head_stride = view.rank == 4 ? view.strides[1] : 0;
  matrices.token_stride = view.strides[axis];
  return matrices;
}

}  // namespace kvpack::tile64
