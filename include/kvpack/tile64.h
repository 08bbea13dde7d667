// The tile formats of Mustafar: 64 elements under a bitmap, survivors packed behind one another. tile64_f16 keeps the
// survivors as 16-bit floats, tile64_q as codes of 1, 2, 4 or 8 bits. Bytes: docs/formats/tile64_f16.md, tile64_q.md.
#pragma once

#include <cstdint>

#include "kvpack/prune.h"
#include "kvpack/tensor.h"

namespace [[gnu::visibility("default")]] kvpack {

/// Which side of attention a cache holds. The numbers are part of the C ABI.
enum class CacheKind : std::int32_t {
  kKey = 0,    ///< a tile is one channel of 64 tokens
  kValue = 1,  ///< a tile is one token's 64 channels
};

/// Elements of a tile, and tokens of a block.
inline constexpr std::int64_t kTileElements = 64;

/// Bits of a survivor in tile64_f16; 1, 2, 4 and 8 are tile64_q.
inline constexpr std::int32_t kUnquantizedBits = 16;

/// Views of one compressed K or V of `batches` (= batch*kv_heads) matrices [tokens, head_dim]. Owns nothing.
///   T = ceil(tokens/64) * head_dim tiles a batch; tokens that fill up the last block hold zeros.
struct Tile64 {
  CacheKind kind = CacheKind::kKey;
  std::int32_t bits = kUnquantizedBits;  ///< 1, 2, 4, 8 or 16
  std::int64_t tokens = 0;               ///< real ones, without those that fill up the last block
  std::int64_t head_dim = 0;             ///< 64, 128 or 256
  TensorView bitmaps;                    ///< [batches, T] int64, element i is bit 63 - i
  TensorView offsets;                    ///< 16 bits: [batches, T+1] int32, else [batches, T] int32
  TensorView payload;                    ///< [capacity] float16 or bfloat16 (16 bits), else int32 words
  TensorView starts;                     ///< 16 bits: [batches] int32, where a batch starts, in 8 halves; else empty
  TensorView scales;                     ///< [batches, T] float32, or empty for 16 bits
  TensorView zeros;                      ///< [batches, T] float32, or empty for 16 bits
};

/// Tiles of one batch: ceil(tokens/64) * head_dim. Throws InvalidArgument for head_dim other than 64, 128, 256.
[[nodiscard]] std::int64_t tile64_tiles(std::int64_t tokens, std::int64_t head_dim);

/// Payload elements (halves, or words of 32 bits) that `batches` matrices can never exceed when every row of one
/// (token, head) keeps at most `kept_per_row` entries. With rule kExact this is a capacity that needs no counting.
[[nodiscard]] std::int64_t tile64_payload_bound(std::int32_t bits, std::int64_t batches, std::int64_t tokens,
                                                std::int64_t head_dim, std::int64_t kept_per_row);

/// Parameters of compress_tile64.
struct Tile64Options {
  double sparsity = 0.0;  ///< share of a row to drop before packing, 0 <= s < 1; 0 packs what is not zero
  PruneRule rule = PruneRule::kExact;
  const float* channel_scores = nullptr;         ///< f32, multiplies |x| before ranking, on x's device; may be null
  std::int64_t channel_scores_batch_stride = 0;  ///< elements between batches; 0: [head_dim] for all of them
};

/// Bytes of working memory that compress_tile64 needs on a device; 0 on the CPU.
[[nodiscard]] std::int64_t tile64_workspace_bytes(std::int32_t bits, std::int64_t batches, std::int64_t tokens,
                                                  std::int64_t head_dim, DeviceKind device);

/// Prunes by magnitude and packs the survivors into tiles, in one go.
///   Shapes    x [batches, tokens, head_dim] or [batch, kv_heads, tokens, head_dim], head_dim 64, 128 or 256; `out` as
///             Tile64 says, all of it written, the payload as far as `used`; workspace [bytes/8] int64 (empty on the
///             CPU); used [1] int64, on the device of x, receives the payload elements that the tiles take; may be empty
///   Types     x float16, bfloat16 or float32; a 16-bit payload has x's type, or float16 where x is float32 (RNE)
///   Requires  channels of x are adjacent; one device; outputs and workspace overlap nothing
///   Capacity  on the CPU a payload that is too small throws before anything is written. On a GPU nothing is written past
///             its end and `used` says what would have been needed: a payload of tile64_payload_bound is always enough
///   NaN, inf  16 bits keep them as they are; a quantised tile that holds one gets scale NaN and zero 0, so that all of
///             its survivors decode to NaN
///   Throws    InvalidArgument with both values; Unsupported with what exists
///   Source    docs/numerics.md sections 1 to 3; Joo et al. 2025, "Mustafar"
void compress_tile64(const TensorView& x, const Tile64Options& options, const Tile64& out, const TensorView& workspace,
                     const TensorView& used, void* stream = nullptr);

/// Writes the matrices that tiles stand for: value = (code - zero) * scale in float32, then RNE to the type of out.
/// Survivors of 16 bits keep every bit where out has their type.
///   Shapes    out [batches, tokens, head_dim] or [batch, kv_heads, tokens, head_dim], float16, bfloat16 or float32
///   Hostile   never reads outside the views, whatever the bytes say: on the CPU a tile that points outside throws, on a
///             GPU it decodes to something; check_tile64 says what is wrong
///   Throws    InvalidArgument with both values; Unsupported with what exists
void unpack_tile64(const Tile64& tiles, const TensorView& out, void* stream = nullptr);

/// Checks tiles that came from outside: offsets that run backwards or past the end, bitmaps whose counts disagree with
/// offsets, scales and zeros that are not finite. Synchronises the stream on a GPU.
///   Throws    InvalidArgument that names batch, tile and both values
void check_tile64(const Tile64& tiles, void* stream = nullptr);

}  // namespace kvpack
