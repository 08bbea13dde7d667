// The C interface: translates structures and exceptions, nothing else.
#include "kvpack/c_abi.h"

#include <string>

#include "bindings/translate.h"
#include "core/check.h"
#include "kvpack/kvpack.h"

namespace {

using kvpack::bindings::guarded;
using kvpack::bindings::optional_view;
using kvpack::bindings::view_of;

thread_local std::string last_text;

kvpack::Tile64 tiles_of(const kvpack_tile64* tiles, const char* name) {
  kvpack::require(tiles != nullptr, name, " is a null pointer");
  kvpack::Tile64 result;
  result.kind = static_cast<kvpack::CacheKind>(tiles->kind);
  result.bits = tiles->bits;
  result.tokens = tiles->tokens;
  result.head_dim = tiles->head_dim;
  result.bitmaps = view_of(&tiles->bitmaps, "bitmaps");
  result.offsets = view_of(&tiles->offsets, "offsets");
  result.payload = view_of(&tiles->payload, "payload");
  result.starts = view_of(&tiles->starts, "starts");
  result.scales = view_of(&tiles->scales, "scales");
  result.zeros = view_of(&tiles->zeros, "zeros");
  return result;
}

kvpack::UniformOptions uniform_options_of(const kvpack_uniform_options& options) {
  kvpack::UniformOptions result;
  result.bits = options.bits;
  result.axis = static_cast<kvpack::Axis>(options.axis);
  result.group = options.group;
  result.offset = static_cast<kvpack::OffsetRule>(options.offset);
  result.causality = static_cast<kvpack::Causality>(options.causality);
  result.outlier_fraction = options.outlier_fraction;
  result.protected_tokens = options.protected_tokens;
  result.compat = options.compat != 0;
  return result;
}

std::int32_t give_text(std::string text, const char** target) {
  last_text = std::move(text);
  *target = last_text.c_str();
  return KVPACK_OK;
}

std::string json_of(const kvpack::ImplementationInfo& info) {
  // Names are ours and hold nothing that JSON would escape.
  return kvpack::text(R"({"operation":")", info.operation, R"(","name":")", info.name, R"(","device":")",
                      info.device == kvpack::DeviceKind::kCpu ? "cpu" : "cuda", R"(","needs":")", info.needs,
                      R"(","available":)", info.available ? "true" : "false", R"(,"selected":)",
                      info.selected ? "true" : "false", "}");
}

}  // namespace

std::int32_t kvpack_abi_version() { return KVPACK_ABI_VERSION; }

const char* kvpack_version() { return KVPACK_VERSION; }

const char* kvpack_last_error() { return kvpack::bindings::last_error().c_str(); }

std::int32_t kvpack_prune_magnitude(const kvpack_tensor* x, const kvpack_tensor* out,
                                    const kvpack_prune_options* options, kvpack_prune_counts* counts, void* stream) {
  return guarded([&] {
    kvpack::require(options != nullptr, "options is a null pointer");
    kvpack::PruneOptions chosen;
    chosen.sparsity = options->sparsity;
    chosen.rule = static_cast<kvpack::PruneRule>(options->rule);
    chosen.head_dim = options->head_dim;
    chosen.protected_tokens = options->protected_tokens;
    chosen.channel_scores = options->channel_scores;
    const kvpack::PruneCounts result = kvpack::prune_magnitude(view_of(x, "x"), view_of(out, "out"), chosen, stream);
    if (counts != nullptr) *counts = {result.rows, result.kept};
  });
}

std::int32_t kvpack_simulate_uniform(const kvpack_tensor* x, const kvpack_tensor* out,
                                     const kvpack_uniform_options* options, kvpack_uniform_counts* counts,
                                     void* stream) {
  return guarded([&] {
    kvpack::require(options != nullptr, "options is a null pointer");
    const kvpack::UniformOptions chosen = uniform_options_of(*options);
    const kvpack::UniformCounts result = kvpack::simulate_uniform(view_of(x, "x"), view_of(out, "out"), chosen, stream);
    if (counts != nullptr) *counts = {result.quantized, result.vectors, result.outliers};
  });
}

std::int32_t kvpack_simulate_quantized(const kvpack_tensor* x, const kvpack_tensor* out,
                                       const kvpack_quantize_options* options, kvpack_uniform_counts* counts,
                                       void* stream) {
  return guarded([&] {
    kvpack::require(options != nullptr, "options is a null pointer");
    const kvpack::QuantizeOptions chosen{uniform_options_of(options->uniform),
                                         static_cast<kvpack::ScaleRule>(options->scale),
                                         options->codebook,
                                         options->num_centroids,
                                         options->norm_scale,
                                         options->norm_offset,
                                         options->lower,
                                         options->upper,
                                         options->num_thresholds};
    const kvpack::UniformCounts result =
        kvpack::simulate_quantized(view_of(x, "x"), view_of(out, "out"), chosen, stream);
    if (counts != nullptr) *counts = {result.quantized, result.vectors, result.outliers};
  });
}

std::int32_t kvpack_rotate(const kvpack_tensor* x, const kvpack_tensor* rotation, const kvpack_tensor* out,
                           std::int32_t direction, void* stream) {
  return guarded([&] {
    kvpack::rotate(view_of(x, "x"), view_of(rotation, "rotation"), view_of(out, "out"),
                   static_cast<kvpack::Direction>(direction), stream);
  });
}

std::int32_t kvpack_make_random_rotation(std::uint64_t seed, const kvpack_tensor* rotation) {
  return guarded([&] { kvpack::make_random_rotation(seed, view_of(rotation, "rotation")); });
}

std::int32_t kvpack_make_nf_codebook(std::int32_t bits, float* codebook) {
  return guarded([&] { kvpack::make_nf_codebook(bits, codebook); });
}

std::int32_t kvpack_make_gaussian_codebook(std::int32_t levels, float* codebook) {
  return guarded([&] { kvpack::make_gaussian_codebook(levels, codebook); });
}

std::int32_t kvpack_calibrate_codebook(const double* values, const double* weights, std::int64_t count,
                                       std::int32_t levels, float* codebook, double* error) {
  return guarded([&] {
    const double result = kvpack::calibrate_codebook(values, weights, count, levels, codebook);
    if (error != nullptr) *error = result;
  });
}

std::int32_t kvpack_fit_codebook_norm(const double* values, const double* weights, std::int64_t count,
                                      std::int32_t levels, const float* codebook, float* scale, float* offset) {
  return guarded([&] {
    kvpack::require(scale != nullptr && offset != nullptr, "scale or offset is a null pointer");
    const kvpack::CodebookNorm norm = kvpack::fit_codebook_norm(values, weights, count, levels, codebook);
    *scale = norm.scale;
    *offset = norm.offset;
  });
}

std::int32_t kvpack_accumulate_histogram(const kvpack_tensor* x, const kvpack_tensor* element_weights,
                                         const kvpack_histogram_options* options, const kvpack_tensor* bin_weights,
                                         const kvpack_tensor* bin_moments, kvpack_histogram_counts* counts) {
  return guarded([&] {
    kvpack::require(options != nullptr, "options is a null pointer");
    const kvpack::HistogramOptions chosen{options->lower, options->upper, options->channel_weights,
                                          options->protected_tokens};
    const kvpack::HistogramCounts result =
        kvpack::accumulate_histogram(view_of(x, "x"), optional_view(element_weights, "element_weights"), chosen,
                                     view_of(bin_weights, "bin_weights"), view_of(bin_moments, "bin_moments"));
    if (counts != nullptr) *counts = {result.counted, result.outside};
  });
}

std::int32_t kvpack_find_channel_quantiles(const kvpack_tensor* x, const double* quantiles, std::int64_t num_quantiles,
                                           std::int64_t protected_tokens, const kvpack_tensor* out) {
  return guarded([&] {
    kvpack::find_channel_quantiles(view_of(x, "x"), quantiles, num_quantiles, protected_tokens, view_of(out, "out"));
  });
}

std::int32_t kvpack_tile64_payload_bound(std::int32_t bits, std::int64_t batches, std::int64_t tokens,
                                         std::int64_t head_dim, std::int64_t kept_per_row, std::int64_t* elements) {
  return guarded([&] {
    kvpack::require(elements != nullptr, "elements is a null pointer");
    *elements = kvpack::tile64_payload_bound(bits, batches, tokens, head_dim, kept_per_row);
  });
}

std::int32_t kvpack_tile64_workspace_bytes(std::int32_t bits, std::int64_t batches, std::int64_t tokens,
                                           std::int64_t head_dim, std::int32_t device_kind, std::int64_t* bytes) {
  return guarded([&] {
    kvpack::require(bytes != nullptr, "bytes is a null pointer");
    *bytes =
        kvpack::tile64_workspace_bytes(bits, batches, tokens, head_dim, static_cast<kvpack::DeviceKind>(device_kind));
  });
}

std::int32_t kvpack_compress_tile64(const kvpack_tensor* x, const kvpack_tile64_options* options,
                                    const kvpack_tile64* out, const kvpack_tensor* workspace, const kvpack_tensor* used,
                                    void* stream) {
  return guarded([&] {
    kvpack::require(options != nullptr, "options is a null pointer");
    kvpack::Tile64Options chosen;
    chosen.sparsity = options->sparsity;
    chosen.rule = static_cast<kvpack::PruneRule>(options->rule);
    chosen.channel_scores = options->channel_scores;
    chosen.channel_scores_batch_stride = options->channel_scores_batch_stride;
    kvpack::compress_tile64(view_of(x, "x"), chosen, tiles_of(out, "out"), optional_view(workspace, "workspace"),
                            optional_view(used, "used"), stream);
  });
}

std::int32_t kvpack_unpack_tile64(const kvpack_tile64* tiles, const kvpack_tensor* out, void* stream) {
  return guarded([&] { kvpack::unpack_tile64(tiles_of(tiles, "tiles"), view_of(out, "out"), stream); });
}

std::int32_t kvpack_check_tile64(const kvpack_tile64* tiles, void* stream) {
  return guarded([&] { kvpack::check_tile64(tiles_of(tiles, "tiles"), stream); });
}

std::int32_t kvpack_attend_workspace_bytes(std::int64_t batches, std::int64_t columns, std::int64_t tokens,
                                           std::int64_t head_dim, std::int32_t device_kind, std::int64_t* bytes) {
  return guarded([&] {
    kvpack::require(bytes != nullptr, "bytes is a null pointer");
    *bytes = kvpack::attend_workspace_bytes(batches, columns, tokens, head_dim,
                                            static_cast<kvpack::DeviceKind>(device_kind));
  });
}

std::int32_t kvpack_multiply_keys(const kvpack_tile64* keys, const kvpack_tensor* q, const kvpack_tensor* out,
                                  const kvpack_tensor* workspace, void* stream) {
  return guarded([&] {
    kvpack::multiply_keys(tiles_of(keys, "keys"), view_of(q, "q"), view_of(out, "out"),
                          optional_view(workspace, "workspace"), stream);
  });
}

std::int32_t kvpack_multiply_values(const kvpack_tile64* values, const kvpack_tensor* p, const kvpack_tensor* out,
                                    const kvpack_tensor* workspace, void* stream) {
  return guarded([&] {
    kvpack::multiply_values(tiles_of(values, "values"), view_of(p, "p"), view_of(out, "out"),
                            optional_view(workspace, "workspace"), stream);
  });
}

std::int32_t kvpack_attend_tile64(const kvpack_tile64* keys, const kvpack_tile64* values, const kvpack_tensor* q,
                                  const kvpack_tensor* recent_keys, const kvpack_tensor* recent_values,
                                  const kvpack_attend_options* options, const kvpack_tensor* out,
                                  const kvpack_tensor* lse, const kvpack_tensor* workspace, void* stream) {
  return guarded([&] {
    kvpack::require(options != nullptr, "options is a null pointer");
    const kvpack::AttendOptions chosen{options->scale, options->softcap,
                                       static_cast<kvpack::Masking>(options->masking)};
    kvpack::attend_tile64(tiles_of(keys, "keys"), tiles_of(values, "values"), view_of(q, "q"),
                          optional_view(recent_keys, "recent_keys"), optional_view(recent_values, "recent_values"),
                          chosen, view_of(out, "out"), optional_view(lse, "lse"), optional_view(workspace, "workspace"),
                          stream);
  });
}

std::int32_t kvpack_compare_tensors(const kvpack_tensor* x, const kvpack_tensor* y, kvpack_tensor_error* error,
                                    void* stream) {
  return guarded([&] {
    kvpack::require(error != nullptr, "error is a null pointer");
    const kvpack::TensorError result = kvpack::compare_tensors(view_of(x, "x"), view_of(y, "y"), stream);
    *error = {result.squared_error, result.squared_norm, result.largest};
  });
}

std::int32_t kvpack_compare_logits(const kvpack_tensor* reference, const kvpack_tensor* logits,
                                   const kvpack_tensor* targets, const kvpack_tensor* nll, const kvpack_tensor* kl,
                                   const kvpack_tensor* top1, void* stream) {
  return guarded([&] {
    kvpack::compare_logits(view_of(reference, "reference"), view_of(logits, "logits"), view_of(targets, "targets"),
                           view_of(nll, "nll"), view_of(kl, "kl"), view_of(top1, "top1"), stream);
  });
}

std::int32_t kvpack_list_implementations(const char** json) {
  return guarded([&] {
    std::string rows;
    for (const kvpack::ImplementationInfo& info : kvpack::list_implementations()) {
      if (!rows.empty()) rows += ',';
      rows += json_of(info);
    }
    give_text("[" + rows + "]", json);
  });
}

std::int32_t kvpack_explain(const char* operation, std::int32_t device_kind, const char** text) {
  return guarded([&] { give_text(kvpack::explain(operation, static_cast<kvpack::DeviceKind>(device_kind)), text); });
}

std::int32_t kvpack_force_implementation(const char* name) {
  return guarded([&] { kvpack::force_implementation(name == nullptr ? "" : name); });
}

const char* kvpack_last_implementation() {
  last_text = kvpack::last_implementation();
  return last_text.c_str();
}

std::int32_t kvpack_cpu_features(const char** text) {
  return guarded([&] { give_text(kvpack::cpu_features(), text); });
}

std::int32_t kvpack_cuda_status(const char** text) {
  return guarded([&] { give_text(kvpack::cuda_status(), text); });
}

std::int32_t kvpack_set_num_threads(std::int32_t num_threads) {
  return guarded([&] { kvpack::set_num_threads(num_threads); });
}

std::int32_t kvpack_num_threads() { return kvpack::num_threads(); }
