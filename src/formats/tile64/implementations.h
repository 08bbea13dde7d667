// What every implementation of the tile formats receives, and the list of them.
#pragma once

#include <cstdint>

#include "core/portable.h"
#include "kvpack/tile64.h"

namespace kvpack {

/// One compressed K or V after all checks: Tile64 as plain pointers. Trivially copyable; also handed to the CUDA library.
struct Tile64Data {
  CacheKind kind = CacheKind::kKey;
  std::int32_t bits = kUnquantizedBits;
  DType payload_type = DType::kFloat16;  // kFloat16 or kBFloat16 for 16 bits; kInt32 for codes
  std::int64_t batches = 0;
  std::int64_t tokens = 0;            // real ones
  std::int64_t head_dim = 0;          // 64, 128 or 256
  std::int64_t tiles = 0;             // of one batch
  std::uint64_t* bitmaps = nullptr;   // [batches, tiles]
  std::int32_t* offsets = nullptr;    // [batches, tiles + 1] for 16 bits, else [batches, tiles]
  void* payload = nullptr;            // [payload_capacity] halves or words
  std::int64_t payload_capacity = 0;  // elements
  std::int32_t* starts = nullptr;     // [batches] for 16 bits, else null
  float* scales = nullptr;            // [batches, tiles] for codes, else null
  float* zeros = nullptr;             // [batches, tiles] for codes, else null

  /// int32 numbers between the offsets of two batches.
  [[nodiscard]] KVPACK_HOST_DEVICE std::int64_t offsets_stride() const {
    return bits == kUnquantizedBits ? tiles + 1 : tiles;
  }
};

/// The dense side: batches of [tokens, head_dim] with adjacent channels. Batch b is sequence b div heads, head b mod heads.
struct DenseMatrices {
  void* data = nullptr;
  DType dtype = DType::kFloat16;  // kFloat16, kBFloat16 or kFloat32
  std::int64_t heads = 1;
  std::int64_t sequence_stride = 0;  // elements
  std::int64_t head_stride = 0;
  std::int64_t token_stride = 0;

  /// Element of `data` at which a row of one batch starts.
  [[nodiscard]] KVPACK_HOST_DEVICE std::int64_t row_start(std::int64_t batch, std::int64_t token) const {
    return batch / heads * sequence_stride + batch % heads * head_stride + token * token_stride;
  }
};

struct CompressTile64Problem {
  DenseMatrices x;
  Tile64Data out;
  bool prunes = false;             // false: pack what is not zero
  std::int64_t rank_from_top = 0;  // the threshold is the rank_from_top-th largest magnitude of a row, 1 .. head_dim
  PruneRule rule = PruneRule::kExact;
  const float* channel_scores = nullptr;  // or null
  std::int64_t channel_scores_batch_stride = 0;
  void* workspace = nullptr;     // CUDA: tile64_workspace_bytes
  std::int64_t* used = nullptr;  // on the device of x, or null
  void* stream = nullptr;
};

struct UnpackTile64Problem {
  Tile64Data tiles;
  DenseMatrices out;
  void* stream = nullptr;
};

/// What is wrong with tiles, if anything. Of one tile the first that applies in this order; offsets_stride() places of a
/// batch are looked at, so that for 16 bits the last offset counts as tile T, of which only the first two are asked.
enum class Tile64Fault : std::int32_t {
  kNone = 0,
  kOffsetBackwards,  // actual: this offset; expected: at least the one before (codes: also that of the batch before)
  kPastTheEnd,       // actual: element of the payload where the tile ends; expected: at most the payload's capacity
  kCountDisagrees,  // actual: elements between this offset and the next, if not backwards; expected: what the bitmap takes
  kGridNotFinite,  // actual: the float32's bits; expected: 0 if it is the scale, 1 if it is the zero
  kZeroNotWhole,   // actual: the float32's bits
  kStartNegative,  // comes first. actual: starts[b] (of tile 0) or else the offset; expected: 0
};

/// The first fault in order of batch and tile.
struct Tile64Finding {
  Tile64Fault fault = Tile64Fault::kNone;
  std::int32_t reserved = 0;
  std::int64_t batch = 0;
  std::int64_t tile = 0;
  std::int64_t actual = 0;
  std::int64_t expected = 0;
};

struct CheckTile64Problem {
  Tile64Data tiles;
  void* stream = nullptr;
};

/// Compresses; an element survives in the bitmap when it is not zero as x holds it, even if float16 rounds it to 0.
/// Batches and tokens may be 0: starts, the last offsets and `used` are written all the same. What lies in the payload
/// behind `used` is open. The CPU throws InvalidArgument when the payload is too small, before it writes.
using CompressTile64Function = void (*)(const CompressTile64Problem&);
using UnpackTile64Function = void (*)(const UnpackTile64Problem&);
using CheckTile64Function = Tile64Finding (*)(const CheckTile64Problem&);

#define KVPACK_DECLARE_TILE64                         \
  void compress_tile64(const CompressTile64Problem&); \
  void unpack_tile64(const UnpackTile64Problem&);
namespace reference {
KVPACK_DECLARE_TILE64
Tile64Finding check_tile64(const CheckTile64Problem&);
}  // namespace reference
namespace scalar {
KVPACK_DECLARE_TILE64
}
namespace avx2 {
KVPACK_DECLARE_TILE64
}
namespace avx512 {
KVPACK_DECLARE_TILE64
}
namespace cuda {  // in libkvpack_cuda
KVPACK_DECLARE_TILE64
Tile64Finding check_tile64(const CheckTile64Problem&);
}  // namespace cuda
#undef KVPACK_DECLARE_TILE64

}  // namespace kvpack
