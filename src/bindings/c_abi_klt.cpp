// The C interface of transform-coded rows: translates structures, nothing else.
#include "bindings/translate.h"
#include "core/check.h"
#include "kvpack/c_abi.h"
#include "kvpack/klt.h"

namespace {

using kvpack::bindings::guarded;
using kvpack::bindings::optional_view;
using kvpack::bindings::view_of;

kvpack::KltTable table_of(const kvpack_klt_table* table) {
  kvpack::require(table != nullptr, "table is a null pointer");
  kvpack::KltTable result;
  result.channels = table->channels;
  result.coefficients = table->coefficients;
  result.row_alignment = table->row_alignment;
  result.levels = table->levels;
  result.mean = view_of(&table->mean, "mean");
  result.analysis = view_of(&table->analysis, "analysis");
  result.synthesis = view_of(&table->synthesis, "synthesis");
  result.in_scale = view_of(&table->in_scale, "in_scale");
  result.centroids = view_of(&table->centroids, "centroids");
  return result;
}

kvpack::KltSamples samples_of(const kvpack_klt_samples* samples) {
  kvpack::require(samples != nullptr, "samples is a null pointer");
  return {view_of(&samples->z, "z"), view_of(&samples->weights, "weights"), samples->num_levels, samples->levels};
}

}  // namespace

std::int32_t kvpack_klt_row_bytes(const std::int32_t* levels, std::int64_t coefficients, std::int64_t row_alignment,
                                  std::int64_t* bytes) {
  return guarded([&] {
    kvpack::require(bytes != nullptr, "bytes is a null pointer");
    *bytes = kvpack::klt_row_bytes(levels, coefficients, row_alignment);
  });
}

std::int32_t kvpack_klt_level_bits(std::int32_t levels, double* bits) {
  return guarded([&] {
    kvpack::require(bits != nullptr, "bits is a null pointer");
    *bits = kvpack::klt_level_bits(levels);
  });
}

std::int32_t kvpack_check_klt_table(const kvpack_klt_table* table) {
  return guarded([&] { kvpack::check_klt_table(table_of(table)); });
}

std::int32_t kvpack_simulate_klt(const kvpack_tensor* x, const kvpack_klt_table* table, std::int64_t protected_tokens,
                                 const kvpack_tensor* out, void* stream) {
  return guarded([&] {
    kvpack::simulate_klt(view_of(x, "x"), table_of(table), kvpack::KltOptions{protected_tokens}, view_of(out, "out"),
                         stream);
  });
}

std::int32_t kvpack_compress_klt(const kvpack_tensor* x, const kvpack_klt_table* table, const kvpack_tensor* rows,
                                 void* stream) {
  return guarded([&] { kvpack::compress_klt(view_of(x, "x"), table_of(table), view_of(rows, "rows"), stream); });
}

std::int32_t kvpack_unpack_klt(const kvpack_tensor* rows, const kvpack_klt_table* table, std::int64_t head_dim,
                               const kvpack_tensor* cos, const kvpack_tensor* sin, const kvpack_tensor* out,
                               void* stream) {
  return guarded([&] {
    const kvpack::KltRope rope{head_dim, optional_view(cos, "cos"), optional_view(sin, "sin")};
    kvpack::unpack_klt(view_of(rows, "rows"), table_of(table), rope, view_of(out, "out"), stream);
  });
}

std::int32_t kvpack_check_klt(const kvpack_tensor* rows, const kvpack_klt_table* table) {
  return guarded([&] { kvpack::check_klt(view_of(rows, "rows"), table_of(table)); });
}

std::int32_t kvpack_calibrate_klt_codebooks(const kvpack_klt_samples* samples, const kvpack_tensor* centroids,
                                            const kvpack_tensor* errors) {
  return guarded([&] {
    kvpack::calibrate_klt_codebooks(samples_of(samples), view_of(centroids, "centroids"), view_of(errors, "errors"));
  });
}

std::int32_t kvpack_calibrate_klt_grids(const kvpack_klt_samples* samples, const kvpack_tensor* offsets,
                                        const kvpack_tensor* steps, const kvpack_tensor* errors) {
  return guarded([&] {
    kvpack::calibrate_klt_grids(samples_of(samples), view_of(offsets, "offsets"), view_of(steps, "steps"),
                                view_of(errors, "errors"));
  });
}

std::int32_t kvpack_measure_klt_errors(const kvpack_klt_samples* samples, const kvpack_tensor* centroids,
                                       const kvpack_tensor* errors) {
  return guarded([&] {
    kvpack::measure_klt_errors(samples_of(samples), view_of(centroids, "centroids"), view_of(errors, "errors"));
  });
}

std::int32_t kvpack_allocate_klt_levels(const kvpack_klt_allocation* allocation, std::int32_t* chosen, double* bits) {
  return guarded([&] {
    kvpack::require(allocation != nullptr, "allocation is a null pointer");
    const kvpack::KltAllocation wanted{
        allocation->coefficients,  allocation->tables,      allocation->num_levels,
        allocation->levels,        allocation->errors,      allocation->table_of,
        allocation->row_alignment, allocation->budget_bits, static_cast<kvpack::KltBits>(allocation->bits)};
    const double taken = kvpack::allocate_klt_levels(wanted, chosen);
    if (bits != nullptr) *bits = taken;
  });
}
