// Entry of attention on tiles and of its two products: checks and dispatch.
#include <algorithm>
#include <cmath>
#include <limits>

#include "attend/implementations.h"
#include "attend/workspace.h"
#include "core/check.h"
#include "dispatch/registry.h"
#include "formats/tile64/data.h"

namespace kvpack {

namespace {

void require_type(const TensorView& view, const char* name, const Device& device) {
  const bool is_half = view.dtype == DType::kFloat16 || view.dtype == DType::kBFloat16;
  if (device.kind == DeviceKind::kCpu) {
    require(is_half || view.dtype == DType::kFloat32, name, " is ", name_of(view.dtype),
            "; expected float16, bfloat16 or float32");
  } else {
    require(is_half, name, " is ", name_of(view.dtype), "; expected float16 or bfloat16 on a GPU");
  }
}

void require_rows(std::int64_t rows, const char* name) {
  require(rows >= 1 && rows <= kMaxQueryRows, name, " has ", rows, " rows; it must be 1 to ", kMaxQueryRows);
}

/// No output may share memory with tiles that are read.
void require_apart(const TensorView& out, const char* out_name, const Tile64& tiles, const char* tiles_name) {
  for (const TensorView* view :
       {&tiles.bitmaps, &tiles.offsets, &tiles.payload, &tiles.starts, &tiles.scales, &tiles.zeros}) {
    require(!may_overlap(out, *view), out_name, " overlaps ", tiles_name, " in memory");
  }
}

/// Both products: x [batches*group, rows, x_columns], out [batches*group, rows, out_columns].
void multiply(const Tile64& tiles, const char* tiles_name, CacheKind kind, const TensorView& x, const char* x_name,
              const TensorView& out, const TensorView& workspace, void* stream) {
  MultiplyTile64Problem problem;
  problem.tiles = tile64::checked_tiles(tiles, tiles_name);
  const Tile64Data& data = problem.tiles;
  const Device device = tiles.bitmaps.device;
  require(tiles.kind == kind, tiles_name, ".kind is ", static_cast<int>(tiles.kind), "; expected ",
          static_cast<int>(kind));
  const std::int64_t x_columns = kind == CacheKind::kKey ? data.head_dim : data.tokens;
  const std::int64_t out_columns = kind == CacheKind::kKey ? data.tokens : data.head_dim;
  if (x.rank != 3) {
    throw InvalidArgument(
        text(x_name, " has shape ", shape_text(x), "; expected [batches*group, rows, ", x_columns, "]"));
  }
  const std::int64_t heads = x.shape[0];
  const bool divides = data.batches == 0 ? heads == 0 : heads >= data.batches && heads % data.batches == 0;
  require(divides, x_name, " has ", heads, " heads; it must be a multiple of the ", data.batches, " batches of ",
          tiles_name);
  problem.rows = x.shape[1];
  require_rows(problem.rows, x_name);
  require_type(x, x_name, device);
  require_exact(x, {x_name}, x.dtype, {heads, problem.rows, x_columns}, device);
  require_exact(out, {"out"}, x.dtype, {heads, problem.rows, out_columns}, device);
  require(!may_overlap(x, out), x_name, " and out overlap in memory");
  require_apart(out, "out", tiles, tiles_name);
  problem.group = data.batches == 0 ? 1 : heads / data.batches;
  problem.x = x.data;
  problem.out = out.data;
  problem.dtype = x.dtype;
  problem.workspace = checked_workspace(
      workspace,
      attend_workspace_bytes(data.batches, problem.group * problem.rows, data.tokens, data.head_dim, device.kind),
      device);
  require(!may_overlap(workspace, x) && !may_overlap(workspace, out), "workspace overlaps ", x_name,
          " or out in memory");
  require_apart(workspace, "workspace", tiles, tiles_name);
  problem.stream = stream;
  const auto function = select<MultiplyTile64Function>(Operation::kMultiplyTile64, device.kind);
  if (out.num_elements() > 0) function(problem);
}

/// Kernels compute with factors and their reciprocals in float32, which this range leaves room for.
void require_factor(double factor, const char* name, const char* meaning_of_zero) {
  constexpr double kSmallest = 1e-30;
  constexpr double kLargest = 1e30;
  require(factor == 0.0 || (factor >= kSmallest && factor <= kLargest), name, " is ", factor, "; it must be ",
          kSmallest, " to ", kLargest, ", or 0 for ", meaning_of_zero);
}

void require_attend_options(const AttendOptions& options, std::int64_t recent_tokens, std::int64_t rows) {
  require_factor(options.scale, "scale", "1/sqrt(head_dim)");
  require_factor(options.softcap, "softcap", "none");
  require(options.masking == Masking::kNone || options.masking == Masking::kCausal, "there is no masking number ",
          static_cast<int>(options.masking));
  require(options.masking == Masking::kNone || recent_tokens >= rows, "causal masking takes the last ", rows,
          " recent tokens as those of the query rows, but there are ", recent_tokens);
}

/// The dense window: [batch, kv_heads, recent_tokens, head_dim], both or none.
void add_recent(const TensorView& keys, const TensorView& values, std::int64_t batch, AttendTile64Problem& problem,
                const Device& device) {
  if (is_empty(keys) && is_empty(values)) return;
  const std::int64_t kv_heads = batch == 0 ? 0 : problem.keys.batches / batch;
  Tile64Data window;  // the shape that both must have
  window.batches = problem.keys.batches;
  window.head_dim = problem.keys.head_dim;
  window.tokens = keys.rank == 4 ? keys.shape[2] : 0;
  const bool fits = keys.rank == 4 && keys.shape[0] == batch && keys.shape[1] == kv_heads && window.tokens >= 0;
  if (!fits) {
    throw InvalidArgument(text("recent_keys has shape ", shape_text(keys), "; expected [", batch, ", ", kv_heads,
                               ", recent_tokens, ", window.head_dim, "]"));
  }
  problem.recent_keys = tile64::checked_matrices(keys, "recent_keys", window, device);
  problem.recent_values = tile64::checked_matrices(values, "recent_values", window, device);
  if (values.rank != 4 || values.shape != keys.shape) {
    throw InvalidArgument(
        text("recent_keys has shape ", shape_text(keys), " but recent_values has ", shape_text(values)));
  }
  for (const TensorView* view : {&keys, &values}) {
    const char* name = view == &keys ? "recent_keys" : "recent_values";
    require(view->dtype == problem.dtype, name, " is ", name_of(view->dtype), " but q is ", name_of(problem.dtype));
  }
  problem.recent_tokens = window.tokens;
}

/// Shapes of q, out and lse, and what they say about groups.
std::int64_t add_queries(const TensorView& q, const TensorView& out, const TensorView& lse,
                         AttendTile64Problem& problem, const Device& device) {
  const std::int64_t head_dim = problem.keys.head_dim;
  if (q.rank != 4) {
    throw InvalidArgument(text("q has shape ", shape_text(q), "; expected [batch, q_heads, rows, ", head_dim, "]"));
  }
  const std::int64_t batch = q.shape[0];
  const std::int64_t q_heads = q.shape[1];
  const std::int64_t batches = problem.keys.batches;
  require(batch > 0 ? batches % batch == 0 : batch == 0 && batches == 0, "q has ", batch,
          " sequences; it must divide the ", batches, " batches of keys");
  const std::int64_t kv_heads = batch == 0 ? 0 : batches / batch;
  require(kv_heads == 0 ? q_heads >= 0 && batches == batch * q_heads : q_heads >= kv_heads && q_heads % kv_heads == 0,
          "q has ", q_heads, " heads; it must be a multiple of the ", kv_heads, " of keys");
  problem.rows = q.shape[2];
  require_rows(problem.rows, "q");
  require_type(q, "q", device);
  require_exact(q, {"q"}, q.dtype, {batch, q_heads, problem.rows, head_dim}, device);
  require_exact(out, {"out"}, q.dtype, {batch, q_heads, problem.rows, head_dim}, device);
  if (!is_empty(lse)) require_exact(lse, {"lse"}, DType::kFloat32, {batch, q_heads, problem.rows}, device);
  problem.group = kv_heads == 0 ? 1 : q_heads / kv_heads;
  problem.q = q.data;
  problem.out = out.data;
  problem.lse = is_empty(lse) ? nullptr : static_cast<float*>(lse.data);
  problem.dtype = q.dtype;
  return batch;
}

void require_same_cache(const Tile64& keys, const Tile64& values, const AttendTile64Problem& problem) {
  require(keys.kind == CacheKind::kKey, "keys.kind is ", static_cast<int>(keys.kind), "; expected 0");
  require(values.kind == CacheKind::kValue, "values.kind is ", static_cast<int>(values.kind), "; expected 1");
  require(problem.keys.batches == problem.values.batches, "keys have ", problem.keys.batches,
          " batches but values have ", problem.values.batches);
  require(keys.tokens == values.tokens, "keys have ", keys.tokens, " tokens but values have ", values.tokens);
  require(keys.head_dim == values.head_dim, "keys have head_dim ", keys.head_dim, " but values have ", values.head_dim);
  if (keys.bitmaps.device != values.bitmaps.device) {
    throw InvalidArgument(text("keys are on ", device_text(keys.bitmaps.device), " but values are on ",
                               device_text(values.bitmaps.device)));
  }
}

/// What attend_tile64 writes shares memory with nothing else.
void require_apart_from_all(const TensorView& written, const char* name, const Tile64& keys, const Tile64& values,
                            std::initializer_list<const TensorView*> others) {
  for (const TensorView* view : others) {
    require(!may_overlap(written, *view), name, " overlaps an input or an output in memory");
  }
  require_apart(written, name, keys, "keys");
  require_apart(written, name, values, "values");
}

}  // namespace

std::int64_t attend_workspace_bytes(std::int64_t batches, std::int64_t columns, std::int64_t tokens,
                                    std::int64_t head_dim, DeviceKind device) {
  tile64::require_size(kUnquantizedBits, batches, tokens, head_dim);
  constexpr std::int64_t kMostColumns = std::numeric_limits<std::int32_t>::max();
  const std::int64_t most = kMostColumns / std::max<std::int64_t>(batches, 1);
  require(columns >= 1 && columns <= most, "columns is ", columns, "; with ", batches, " batches it must be 1 to ",
          most);
  return device == DeviceKind::kCpu ? 0 : attend_workspace_bytes(batches, columns, tokens, head_dim);
}

void multiply_keys(const Tile64& keys, const TensorView& q, const TensorView& out, const TensorView& workspace,
                   void* stream) {
  multiply(keys, "keys", CacheKind::kKey, q, "q", out, workspace, stream);
}

void multiply_values(const Tile64& values, const TensorView& p, const TensorView& out, const TensorView& workspace,
                     void* stream) {
  multiply(values, "values", CacheKind::kValue, p, "p", out, workspace, stream);
}

void attend_tile64(const Tile64& keys, const Tile64& values, const TensorView& q, const TensorView& recent_keys,
                   const TensorView& recent_values, const AttendOptions& options, const TensorView& out,
                   const TensorView& lse, const TensorView& workspace, void* stream) {
  AttendTile64Problem problem;
  problem.keys = tile64::checked_tiles(keys, "keys");
  problem.values = tile64::checked_tiles(values, "values");
  require_same_cache(keys, values, problem);
  const Device device = keys.bitmaps.device;
  const std::int64_t batch = add_queries(q, out, lse, problem, device);
  add_recent(recent_keys, recent_values, batch, problem, device);
  require_attend_options(options, problem.recent_tokens, problem.rows);
  require(!may_overlap(out, lse), "out overlaps lse in memory");
  require_apart_from_all(out, "out", keys, values, {&q, &recent_keys, &recent_values});
  require_apart_from_all(lse, "lse", keys, values, {&q, &recent_keys, &recent_values});
  require_apart_from_all(workspace, "workspace", keys, values, {&q, &recent_keys, &recent_values, &out, &lse});
  const double head_dim = static_cast<double>(keys.head_dim);
  problem.scale = static_cast<float>(options.scale > 0.0 ? options.scale : 1.0 / std::sqrt(head_dim));
  problem.softcap = static_cast<float>(options.softcap);
  problem.masking = options.masking;
  problem.workspace = checked_workspace(workspace,
                                        attend_workspace_bytes(problem.keys.batches, problem.group * problem.rows,
                                                               keys.tokens, keys.head_dim, device.kind),
                                        device);
  problem.stream = stream;
  const auto function = select<AttendTile64Function>(Operation::kAttendTile64, device.kind);
  if (out.num_elements() > 0) function(problem);
}

}  // namespace kvpack
