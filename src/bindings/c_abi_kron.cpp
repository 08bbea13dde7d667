// The C interface of FlatQuant's operations: translates structures and exceptions, nothing else.
#include <vector>

#include "bindings/translate.h"
#include "core/check.h"
#include "kvpack/kron.h"

namespace {

using kvpack::bindings::guarded;
using kvpack::bindings::optional_view;
using kvpack::bindings::view_of;

kvpack::Int4Rows rows_of(const kvpack_int4_rows* rows, const char* name) {
  kvpack::require(rows != nullptr, name, " is a null pointer");
  return {view_of(&rows->codes, "codes"), view_of(&rows->scales, "scales"), view_of(&rows->zeros, "zeros"),
          static_cast<kvpack::CodeEncoding>(rows->encoding)};
}

kvpack::KronTransform transform_of(const kvpack_kron_transform* transform) {
  kvpack::require(transform != nullptr, "transform is a null pointer");
  return {view_of(&transform->left, "left"), view_of(&transform->right, "right"),
          view_of(&transform->diagonal, "diagonal")};
}

std::vector<kvpack::KronOutput> outputs_of(const kvpack_kron_output* outputs, std::int64_t num_outputs) {
  kvpack::require(num_outputs >= 1 && num_outputs <= kvpack::kMaxKronOutputs, "there are ", num_outputs,
                  " outputs; there must be 1 to ", kvpack::kMaxKronOutputs);
  kvpack::require(outputs != nullptr, "outputs is a null pointer");
  std::vector<kvpack::KronOutput> result;
  for (std::int64_t i = 0; i < num_outputs; ++i) {
    result.push_back({rows_of(&outputs[i].rows, "outputs"), outputs[i].clip_max, outputs[i].clip_min});
  }
  return result;
}

}  // namespace

std::int32_t kvpack_kron_workspace_bytes(std::int64_t tokens, std::int64_t rows, std::int64_t columns,
                                         std::int32_t dtype, std::int32_t device_kind, std::int64_t* bytes) {
  return guarded([&] {
    kvpack::require(bytes != nullptr, "bytes is a null pointer");
    *bytes = kvpack::kron_workspace_bytes(tokens, rows, columns, static_cast<kvpack::DType>(dtype),
                                          static_cast<kvpack::DeviceKind>(device_kind));
  });
}

std::int32_t kvpack_kron_quantize(const kvpack_tensor* x, const kvpack_kron_transform* transform,
                                  const kvpack_kron_output* outputs, std::int64_t num_outputs,
                                  const kvpack_tensor* workspace, void* stream) {
  return guarded([&] {
    kvpack::kron_quantize(view_of(x, "x"), transform_of(transform), outputs_of(outputs, num_outputs),
                          optional_view(workspace, "workspace"), stream);
  });
}

std::int32_t kvpack_rmsnorm_kron_quantize(const kvpack_tensor* x, const kvpack_tensor* weight, double epsilon,
                                          const kvpack_kron_transform* transform, const kvpack_kron_output* outputs,
                                          std::int64_t num_outputs, const kvpack_tensor* workspace, void* stream) {
  return guarded([&] {
    kvpack::rmsnorm_kron_quantize(view_of(x, "x"), view_of(weight, "weight"), epsilon, transform_of(transform),
                                  outputs_of(outputs, num_outputs), optional_view(workspace, "workspace"), stream);
  });
}

std::int32_t kvpack_silu_mul_kron_quantize(const kvpack_tensor* gate, const kvpack_tensor* up,
                                           const kvpack_kron_transform* transform, const kvpack_kron_output* outputs,
                                           std::int64_t num_outputs, const kvpack_tensor* workspace, void* stream) {
  return guarded([&] {
    kvpack::silu_mul_kron_quantize(view_of(gate, "gate"), view_of(up, "up"), transform_of(transform),
                                   outputs_of(outputs, num_outputs), optional_view(workspace, "workspace"), stream);
  });
}

std::int32_t kvpack_dequantize_int4(const kvpack_int4_rows* rows, const kvpack_tensor* out, void* stream) {
  return guarded([&] { kvpack::dequantize_int4(rows_of(rows, "rows"), view_of(out, "out"), stream); });
}

std::int32_t kvpack_undo_transform(const kvpack_tensor* y, const kvpack_kron_transform* inverse,
                                   const kvpack_tensor* out, void* stream) {
  return guarded([&] { kvpack::undo_transform(view_of(y, "y"), transform_of(inverse), view_of(out, "out"), stream); });
}

std::int32_t kvpack_get_decompose_dim(std::int64_t n, std::int64_t* rows, std::int64_t* columns) {
  return guarded([&] {
    kvpack::require(rows != nullptr && columns != nullptr, "rows or columns is a null pointer");
    const auto [first, second] = kvpack::get_decompose_dim(n);
    *rows = first;
    *columns = second;
  });
}

std::int32_t kvpack_linear_w4a4_workspace_bytes(std::int64_t tokens, std::int64_t columns, std::int64_t out_features,
                                                std::int32_t device_kind, std::int64_t* bytes) {
  return guarded([&] {
    kvpack::require(bytes != nullptr, "bytes is a null pointer");
    *bytes = kvpack::linear_w4a4_workspace_bytes(tokens, columns, out_features,
                                                 static_cast<kvpack::DeviceKind>(device_kind));
  });
}

std::int32_t kvpack_linear_w4a4(const kvpack_int4_rows* x, const kvpack_int4_rows* weight, const kvpack_tensor* bias,
                                const kvpack_tensor* out, const kvpack_tensor* workspace, void* stream) {
  return guarded([&] {
    kvpack::linear_w4a4(rows_of(x, "x"), rows_of(weight, "weight"), optional_view(bias, "bias"), view_of(out, "out"),
                        optional_view(workspace, "workspace"), stream);
  });
}
