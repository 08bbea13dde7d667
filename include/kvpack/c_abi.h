/* The narrow C interface: what Python (ctypes) and other languages call. One C function per C++ operation, no logic.
 * Every function returns 0, or the number of an error kind whose text kvpack_last_error() holds for this thread. */
#ifndef KVPACK_C_ABI_H
#define KVPACK_C_ABI_H

#include <stdint.h>

#if defined(__GNUC__)
#define KVPACK_API __attribute__((visibility("default")))
#else
#define KVPACK_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/** Error kinds: kvpack::InvalidArgument, kvpack::Unsupported, kvpack::InternalError or anything unexpected. */
enum { KVPACK_OK = 0, KVPACK_INVALID_ARGUMENT = 1, KVPACK_UNSUPPORTED = 2, KVPACK_INTERNAL_ERROR = 3 };

/** kvpack::TensorView, field by field; dtype and device_kind are the numbers of tensor.h. Strides count elements. */
typedef struct kvpack_tensor {
  void* data;
  int32_t dtype;
  int32_t device_kind;
  int32_t device_index;
  int32_t rank;
  int64_t shape[4];
  int64_t strides[4];
} kvpack_tensor;

/** kvpack::PruneOptions. */
typedef struct kvpack_prune_options {
  double sparsity;
  int32_t rule;
  int32_t reserved;
  int64_t head_dim;
  int64_t protected_tokens;
  const float* channel_scores;
} kvpack_prune_options;

/** kvpack::PruneCounts. */
typedef struct kvpack_prune_counts {
  int64_t rows;
  int64_t kept;
} kvpack_prune_counts;

/** kvpack::UniformOptions. */
typedef struct kvpack_uniform_options {
  int32_t bits;
  int32_t axis;
  int64_t group;
  int32_t offset;
  int32_t causality;
  double outlier_fraction;
  int64_t protected_tokens;
  int32_t compat;
  int32_t reserved;
} kvpack_uniform_options;

/** kvpack::QuantizeOptions. Pointers are host memory. */
typedef struct kvpack_quantize_options {
  kvpack_uniform_options uniform;
  int32_t scale;
  int32_t num_centroids;
  const float* codebook;
  float norm_scale;
  float norm_offset;
  const float* lower;
  const float* upper;
  int64_t num_thresholds;
} kvpack_quantize_options;

/** kvpack::HistogramOptions. Pointers are host memory. */
typedef struct kvpack_histogram_options {
  const float* lower;
  const float* upper;
  const float* channel_weights;
  int64_t protected_tokens;
} kvpack_histogram_options;

/** kvpack::HistogramCounts. */
typedef struct kvpack_histogram_counts {
  int64_t counted;
  int64_t outside;
} kvpack_histogram_counts;

/** kvpack::UniformCounts. */
typedef struct kvpack_uniform_counts {
  int64_t quantized;
  int64_t vectors;
  int64_t outliers;
} kvpack_uniform_counts;

/** kvpack::Tile64. A view of rank 0 without memory stands for "none". */
typedef struct kvpack_tile64 {
  int32_t kind;
  int32_t bits;
  int64_t tokens;
  int64_t head_dim;
  kvpack_tensor bitmaps;
  kvpack_tensor offsets;
  kvpack_tensor payload;
  kvpack_tensor starts;
  kvpack_tensor scales;
  kvpack_tensor zeros;
} kvpack_tile64;

/** kvpack::Tile64Options. */
typedef struct kvpack_tile64_options {
  double sparsity;
  int32_t rule;
  int32_t reserved;
  const float* channel_scores;
  int64_t channel_scores_batch_stride;
} kvpack_tile64_options;

/** kvpack::AttendOptions. */
typedef struct kvpack_attend_options {
  double scale;
  double softcap;
  int32_t masking;
  int32_t reserved;
} kvpack_attend_options;

/** kvpack::Int4Rows. `zeros` of rank 0 without memory stands for "none". */
typedef struct kvpack_int4_rows {
  kvpack_tensor codes;
  kvpack_tensor scales;
  kvpack_tensor zeros;
  int32_t encoding;
  int32_t reserved;
} kvpack_int4_rows;

/** kvpack::KronTransform. A view of rank 0 without memory stands for "none". */
typedef struct kvpack_kron_transform {
  kvpack_tensor left;
  kvpack_tensor right;
  kvpack_tensor diagonal;
} kvpack_kron_transform;

/** kvpack::KronOutput. */
typedef struct kvpack_kron_output {
  kvpack_int4_rows rows;
  double clip_max;
  double clip_min;
} kvpack_kron_output;
/** kvpack::KltTable. `levels` is host memory. */
typedef struct kvpack_klt_table {
  int64_t channels;
  int64_t coefficients;
  int64_t row_alignment;
  const int32_t* levels;
  kvpack_tensor mean;
  kvpack_tensor analysis;
  kvpack_tensor synthesis;
  kvpack_tensor in_scale;
  kvpack_tensor centroids;
} kvpack_klt_table;

/** kvpack::KltSamples. `weights` of rank 0 without memory stands for "none"; `levels` is host memory. */
typedef struct kvpack_klt_samples {
  int64_t num_levels;
  const int32_t* levels;
  kvpack_tensor z;
  kvpack_tensor weights;
} kvpack_klt_samples;

/** kvpack::KltAllocation. Pointers are host memory. */
typedef struct kvpack_klt_allocation {
  int64_t coefficients;
  int64_t tables;
  int64_t num_levels;
  const int32_t* levels;
  const double* errors;
  const int32_t* table_of;
  int64_t row_alignment;
  double budget_bits;
  int32_t bits;
  int32_t reserved;
} kvpack_klt_allocation;

/** kvpack::TensorError. */
typedef struct kvpack_tensor_error {
  double squared_error;
  double squared_norm;
  double largest;
} kvpack_tensor_error;

/** KVPACK_ABI_VERSION of the library that was loaded. */
KVPACK_API int32_t kvpack_abi_version(void);
/** "0.1.0". */
KVPACK_API const char* kvpack_version(void);
/** Text of this thread's last error; valid until the thread's next call. */
KVPACK_API const char* kvpack_last_error(void);

/** kvpack::prune_magnitude. `stream` is a cudaStream_t, null on the CPU; `counts` may be null. */
KVPACK_API int32_t kvpack_prune_magnitude(const kvpack_tensor* x, const kvpack_tensor* out,
                                          const kvpack_prune_options* options, kvpack_prune_counts* counts,
                                          void* stream);
/** kvpack::simulate_uniform. */
KVPACK_API int32_t kvpack_simulate_uniform(const kvpack_tensor* x, const kvpack_tensor* out,
                                           const kvpack_uniform_options* options, kvpack_uniform_counts* counts,
                                           void* stream);
/** kvpack::simulate_quantized. */
KVPACK_API int32_t kvpack_simulate_quantized(const kvpack_tensor* x, const kvpack_tensor* out,
                                             const kvpack_quantize_options* options, kvpack_uniform_counts* counts,
                                             void* stream);
/** kvpack::rotate; `direction` is the number of kvpack::Direction. */
KVPACK_API int32_t kvpack_rotate(const kvpack_tensor* x, const kvpack_tensor* rotation, const kvpack_tensor* out,
                                 int32_t direction, void* stream);
/** kvpack::make_random_rotation. */
KVPACK_API int32_t kvpack_make_random_rotation(uint64_t seed, const kvpack_tensor* rotation);
/** kvpack::make_nf_codebook; `codebook` has room for 2^bits floats. */
KVPACK_API int32_t kvpack_make_nf_codebook(int32_t bits, float* codebook);
/** kvpack::make_gaussian_codebook; `codebook` has room for `levels` floats. */
KVPACK_API int32_t kvpack_make_gaussian_codebook(int32_t levels, float* codebook);
/** kvpack::calibrate_codebook; `weights` may be null: all 1; `error` may be null. */
KVPACK_API int32_t kvpack_calibrate_codebook(const double* values, const double* weights, int64_t count, int32_t levels,
                                             float* codebook, double* error);
/** kvpack::fit_codebook_norm; `weights` may be null: all 1. */
KVPACK_API int32_t kvpack_fit_codebook_norm(const double* values, const double* weights, int64_t count, int32_t levels,
                                            const float* codebook, float* scale, float* offset);
/** kvpack::accumulate_histogram. `element_weights` may be null: none; `counts` may be null. */
KVPACK_API int32_t kvpack_accumulate_histogram(const kvpack_tensor* x, const kvpack_tensor* element_weights,
                                               const kvpack_histogram_options* options,
                                               const kvpack_tensor* bin_weights, const kvpack_tensor* bin_moments,
                                               kvpack_histogram_counts* counts);
/** kvpack::find_channel_quantiles. */
KVPACK_API int32_t kvpack_find_channel_quantiles(const kvpack_tensor* x, const double* quantiles, int64_t num_quantiles,
                                                 int64_t protected_tokens, const kvpack_tensor* out);
/** kvpack::tile64_payload_bound; the elements come back through `elements`. */
KVPACK_API int32_t kvpack_tile64_payload_bound(int32_t bits, int64_t batches, int64_t tokens, int64_t head_dim,
                                               int64_t kept_per_row, int64_t* elements);
/** kvpack::tile64_workspace_bytes; the bytes come back through `bytes`. */
KVPACK_API int32_t kvpack_tile64_workspace_bytes(int32_t bits, int64_t batches, int64_t tokens, int64_t head_dim,
                                                 int32_t device_kind, int64_t* bytes);
/** kvpack::compress_tile64. `workspace` and `used` may be null: none. */
KVPACK_API int32_t kvpack_compress_tile64(const kvpack_tensor* x, const kvpack_tile64_options* options,
                                          const kvpack_tile64* out, const kvpack_tensor* workspace,
                                          const kvpack_tensor* used, void* stream);
/** kvpack::unpack_tile64. */
KVPACK_API int32_t kvpack_unpack_tile64(const kvpack_tile64* tiles, const kvpack_tensor* out, void* stream);
/** kvpack::check_tile64. */
KVPACK_API int32_t kvpack_check_tile64(const kvpack_tile64* tiles, void* stream);
/** kvpack::attend_workspace_bytes; the bytes come back through `bytes`. */
KVPACK_API int32_t kvpack_attend_workspace_bytes(int64_t batches, int64_t columns, int64_t tokens, int64_t head_dim,
                                                 int32_t device_kind, int64_t* bytes);
/** kvpack::multiply_keys. `workspace` may be null: none. */
KVPACK_API int32_t kvpack_multiply_keys(const kvpack_tile64* keys, const kvpack_tensor* q, const kvpack_tensor* out,
                                        const kvpack_tensor* workspace, void* stream);
/** kvpack::multiply_values. `workspace` may be null: none. */
KVPACK_API int32_t kvpack_multiply_values(const kvpack_tile64* values, const kvpack_tensor* p, const kvpack_tensor* out,
                                          const kvpack_tensor* workspace, void* stream);
/** kvpack::attend_tile64. `recent_keys`, `recent_values`, `lse` and `workspace` may be null: none. */
KVPACK_API int32_t kvpack_attend_tile64(const kvpack_tile64* keys, const kvpack_tile64* values, const kvpack_tensor* q,
                                        const kvpack_tensor* recent_keys, const kvpack_tensor* recent_values,
                                        const kvpack_attend_options* options, const kvpack_tensor* out,
                                        const kvpack_tensor* lse, const kvpack_tensor* workspace, void* stream);
/** kvpack::kron_workspace_bytes; the bytes come back through `bytes`. */
KVPACK_API int32_t kvpack_kron_workspace_bytes(int64_t tokens, int64_t rows, int64_t columns, int32_t dtype,
                                               int32_t device_kind, int64_t* bytes);
/** kvpack::kron_quantize; `outputs` has num_outputs entries. `workspace` may be null: none. */
KVPACK_API int32_t kvpack_kron_quantize(const kvpack_tensor* x, const kvpack_kron_transform* transform,
                                        const kvpack_kron_output* outputs, int64_t num_outputs,
                                        const kvpack_tensor* workspace, void* stream);
/** kvpack::rmsnorm_kron_quantize. */
KVPACK_API int32_t kvpack_rmsnorm_kron_quantize(const kvpack_tensor* x, const kvpack_tensor* weight, double epsilon,
                                                const kvpack_kron_transform* transform,
                                                const kvpack_kron_output* outputs, int64_t num_outputs,
                                                const kvpack_tensor* workspace, void* stream);
/** kvpack::silu_mul_kron_quantize. */
KVPACK_API int32_t kvpack_silu_mul_kron_quantize(const kvpack_tensor* gate, const kvpack_tensor* up,
                                                 const kvpack_kron_transform* transform,
                                                 const kvpack_kron_output* outputs, int64_t num_outputs,
                                                 const kvpack_tensor* workspace, void* stream);
/** kvpack::dequantize_int4. */
KVPACK_API int32_t kvpack_dequantize_int4(const kvpack_int4_rows* rows, const kvpack_tensor* out, void* stream);
/** kvpack::undo_transform. */
KVPACK_API int32_t kvpack_undo_transform(const kvpack_tensor* y, const kvpack_kron_transform* inverse,
                                         const kvpack_tensor* out, void* stream);
/** kvpack::get_decompose_dim; the sides come back through `rows` and `columns`. */
KVPACK_API int32_t kvpack_get_decompose_dim(int64_t n, int64_t* rows, int64_t* columns);
/** kvpack::linear_w4a4_workspace_bytes; the bytes come back through `bytes`. */
KVPACK_API int32_t kvpack_linear_w4a4_workspace_bytes(int64_t tokens, int64_t columns, int64_t out_features,
                                                      int32_t device_kind, int64_t* bytes);
/** kvpack::linear_w4a4. `bias` and `workspace` may be null: none. */
KVPACK_API int32_t kvpack_linear_w4a4(const kvpack_int4_rows* x, const kvpack_int4_rows* weight,
                                      const kvpack_tensor* bias, const kvpack_tensor* out,
                                      const kvpack_tensor* workspace, void* stream);
/** kvpack::klt_row_bytes; the bytes come back through `bytes`. */
KVPACK_API int32_t kvpack_klt_row_bytes(const int32_t* levels, int64_t coefficients, int64_t row_alignment,
                                        int64_t* bytes);
/** kvpack::klt_level_bits; the bits come back through `bits`. */
KVPACK_API int32_t kvpack_klt_level_bits(int32_t levels, double* bits);
/** kvpack::check_klt_table. */
KVPACK_API int32_t kvpack_check_klt_table(const kvpack_klt_table* table);
/** kvpack::simulate_klt. */
KVPACK_API int32_t kvpack_simulate_klt(const kvpack_tensor* x, const kvpack_klt_table* table, int64_t protected_tokens,
                                       const kvpack_tensor* out, void* stream);
/** kvpack::compress_klt. */
KVPACK_API int32_t kvpack_compress_klt(const kvpack_tensor* x, const kvpack_klt_table* table, const kvpack_tensor* rows,
                                       void* stream);
/** kvpack::unpack_klt. `head_dim` 0: no rotation, and `cos` and `sin` may be null. */
KVPACK_API int32_t kvpack_unpack_klt(const kvpack_tensor* rows, const kvpack_klt_table* table, int64_t head_dim,
                                     const kvpack_tensor* cos, const kvpack_tensor* sin, const kvpack_tensor* out,
                                     void* stream);
/** kvpack::check_klt. */
KVPACK_API int32_t kvpack_check_klt(const kvpack_tensor* rows, const kvpack_klt_table* table);
/** kvpack::calibrate_klt_codebooks. */
KVPACK_API int32_t kvpack_calibrate_klt_codebooks(const kvpack_klt_samples* samples, const kvpack_tensor* centroids,
                                                  const kvpack_tensor* errors);
/** kvpack::calibrate_klt_grids. */
KVPACK_API int32_t kvpack_calibrate_klt_grids(const kvpack_klt_samples* samples, const kvpack_tensor* offsets,
                                              const kvpack_tensor* steps, const kvpack_tensor* errors);
/** kvpack::measure_klt_errors. */
KVPACK_API int32_t kvpack_measure_klt_errors(const kvpack_klt_samples* samples, const kvpack_tensor* centroids,
                                             const kvpack_tensor* errors);
/** kvpack::allocate_klt_levels; the bits that the result takes come back through `bits`. */
KVPACK_API int32_t kvpack_allocate_klt_levels(const kvpack_klt_allocation* allocation, int32_t* chosen, double* bits);
/** kvpack::compare_tensors. */
KVPACK_API int32_t kvpack_compare_tensors(const kvpack_tensor* x, const kvpack_tensor* y, kvpack_tensor_error* error,
                                          void* stream);
/** kvpack::compare_logits. */
KVPACK_API int32_t kvpack_compare_logits(const kvpack_tensor* reference, const kvpack_tensor* logits,
                                         const kvpack_tensor* targets, const kvpack_tensor* nll,
                                         const kvpack_tensor* kl, const kvpack_tensor* top1, void* stream);

/** The registry as a JSON array of kvpack::ImplementationInfo; valid until the thread's next call. */
KVPACK_API int32_t kvpack_list_implementations(const char** json);
/** kvpack::explain. */
KVPACK_API int32_t kvpack_explain(const char* operation, int32_t device_kind, const char** text);
/** kvpack::force_implementation. */
KVPACK_API int32_t kvpack_force_implementation(const char* name);
/** kvpack::last_implementation. */
KVPACK_API const char* kvpack_last_implementation(void);
/** kvpack::cpu_features. */
KVPACK_API int32_t kvpack_cpu_features(const char** text);
/** kvpack::cuda_status. */
KVPACK_API int32_t kvpack_cuda_status(const char** text);
/** kvpack::set_num_threads. */
KVPACK_API int32_t kvpack_set_num_threads(int32_t num_threads);
/** kvpack::num_threads. */
KVPACK_API int32_t kvpack_num_threads(void);

#ifdef __cplusplus
}
#endif

#endif
