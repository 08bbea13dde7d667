// Last stage of the pipeline: attention, and its two products, straight from compressed bytes.
#pragma once

#include <cstdint>

#include "kvpack/tensor.h"
#include "kvpack/tile64.h"

namespace [[gnu::visibility("default")]] kvpack {

/// Most rows (query tokens) that one call takes.
inline constexpr std::int64_t kMaxQueryRows = 16;

/// Bytes of working memory of the functions below on a device; 0 on the CPU. `batches` are those of the tiles, `columns`
/// is group * rows: query heads of one KV head times query tokens.
[[nodiscard]] std::int64_t attend_workspace_bytes(std::int64_t batches, std::int64_t columns, std::int64_t tokens,
                                                  std::int64_t head_dim, DeviceKind device);

/// Key formulation: out[b, i, t] = sum over c of q[b, i, c] * K[b div group, t, c], not scaled.
///   Shapes    q [batches*group, rows, head_dim], out [batches*group, rows, tokens]; rows 1 to 16, any group
///   Types     q and out float16, bfloat16 or (CPU only) float32, the same; float32 accumulation. On a GPU tiles of 16 bits
///             must have the type of q too
///   Requires  contiguous q and out; keys.kind is kKey; one device; out overlaps nothing
///   Bytes     each tile is expanded once for up to 16 columns (group * rows)
///   Hostile   as unpack_tile64: on the CPU a tile that lies outside the payload throws before anything is written
///   Throws    InvalidArgument with both values; Unsupported with what exists
///   Source    docs/numerics.md section 3
void multiply_keys(const Tile64& keys, const TensorView& q, const TensorView& out, const TensorView& workspace,
                   void* stream = nullptr);

/// Value formulation: out[b, i, c] = sum over t of p[b, i, t] * V[b div group, t, c].
///   Shapes    p [batches*group, rows, tokens], out [batches*group, rows, head_dim]; the rest as multiply_keys
void multiply_values(const Tile64& values, const TensorView& p, const TensorView& out, const TensorView& workspace,
                     void* stream = nullptr);

/// Which recent tokens a query row sees. The numbers are part of the C ABI.
enum class Masking : std::int32_t {
  kNone = 0,    ///< all of them
  kCausal = 1,  ///< the last `rows` recent tokens are those of the query rows; row i sees none after its own
};

/// Parameters of attend_tile64.
struct AttendOptions {
  double scale = 0.0;    ///< factor of the scores, 1e-30 to 1e30; 0: 1/sqrt(head_dim)
  double softcap = 0.0;  ///< scores become softcap * tanh(score / softcap), 1e-30 to 1e30; 0: none
  Masking masking = Masking::kNone;
};

/// Attends over tiles and then a dense recent window.
///   out[b, h, i] = sum over t of softmax_t(scale * q[b, h, i] . K[b, h div group, t]) * V[b, h div group, t]
///   Shapes    q, out [batch, q_heads, rows, head_dim]; tiles of batch*kv_heads batches, keys and values of the same
///             tokens (their bits may differ); recent_keys, recent_values [batch, kv_heads, recent_tokens, head_dim] or
///             empty; lse [batch, q_heads, rows] float32 natural log-sum-exp, or empty
///   Types     q, out, recent_* of one type: float16, bfloat16 or (CPU only) float32
///   Requires  kv_heads divides q_heads; one device; contiguous q, out, lse; recent_* with adjacent channels; out, lse and
///             workspace overlap nothing; with causal masking at least `rows` recent tokens
///   Lengths   no tokens at all, or none with a score above -inf, give 0 and -inf; a score of NaN or +inf makes a row NaN
///   Hostile   as unpack_tile64: on the CPU a tile that lies outside the payload throws before anything is written
///   Repeats   the same bits in every run on one device
///   Throws    InvalidArgument with both values; Unsupported with what exists
///   Source    docs/numerics.md section 8
void attend_tile64(const Tile64& keys, const Tile64& values, const TensorView& q, const TensorView& recent_keys,
                   const TensorView& recent_values, const AttendOptions& options, const TensorView& out,
                   const TensorView& lse, const TensorView& workspace, void* stream = nullptr);

}  // namespace kvpack
