// Transform-coded rows ("klt"): a linear map decorrelates the channels of a block of heads, a codebook for each coefficient
// quantises them, and every token becomes a row of constant size. Bytes: docs/formats/klt_rows.md; rules: docs/numerics.md.
#pragma once

#include <cstdint>

#include "kvpack/tensor.h"

namespace [[gnu::visibility("default")]] kvpack {

/// Numbers of levels that a stored coefficient may have, as rows hold them: descending. 1 means dropped.
inline constexpr std::int32_t kKltLevels[] = {64, 32, 20, 16, 12, 10, 8, 7, 6, 5, 4, 3, 2};
inline constexpr std::int32_t kNumKltLevels = 13;

/// Most channels of a block, and most coefficients.
inline constexpr std::int64_t kMaxKltChannels = 4096;

/// How one block of channels of one layer's K (before RoPE) or V becomes coefficients and comes back. Owns nothing.
///   z = (x - mean) * analysis      coefficients with a deviation of about 1
///   r = the rms of z over the coefficients with in_scale, in 8 bits; a code is the centroid nearest to z / r
///   x' = mean + r * (centroids of the codes * synthesis)
/// The deviations of the transform are folded in: analysis holds A / sqrt(lambda), synthesis sqrt(lambda) * A^-1. Analysis may
/// hold coefficients of 1 level behind the coded ones: they cost nothing and only take part in r.
struct KltTable {
  std::int64_t channels = 0;             ///< C, 1 to kMaxKltChannels
  std::int64_t coefficients = 0;         ///< K columns of analysis, 0 to kMaxKltChannels
  std::int64_t row_alignment = 2;        ///< a row takes a multiple of these bytes: 2, 4, 8 or 16
  const std::int32_t* levels = nullptr;  ///< [K], HOST memory: each of kKltLevels or 1, never ascending
  TensorView mean;                       ///< [C] float32, on the device of x as all that follow
  TensorView analysis;                   ///< [C, K] float32
  TensorView synthesis;                  ///< [coded, C] float32; coded: how many levels are 2 or more
  TensorView in_scale;                   ///< [K] int32, 1 where a coefficient enters r, else 0
  TensorView centroids;                  ///< [sum of the coded levels] float32, ascending per coefficient
};

/// Bytes of one token's row: 1 for r, the codes, padded to row_alignment; 0 where every coefficient is dropped.
///   Throws    InvalidArgument for levels out of the list or ascending, with their place
[[nodiscard]] std::int64_t klt_row_bytes(const std::int32_t* levels, std::int64_t coefficients,
                                         std::int64_t row_alignment);

/// Bits that a coefficient of so many levels takes in a long row: 8/5 for 3 levels, where log2(3) is 1.585.
[[nodiscard]] double klt_level_bits(std::int32_t levels);

/// Checks everything of a table that the operations below take on trust, once after loading it: numbers that are not finite
/// too. Table on the CPU.
///   Throws    InvalidArgument that names the part, the place and both values
void check_klt_table(const KltTable& table);

/// Parameters of simulate_klt.
struct KltOptions {
  std::int64_t protected_tokens = 0;  ///< this many first tokens of every sequence come back exact
};

/// What unpack_klt(compress_klt(x)) gives, without the bytes: equal bit for bit on the same device.
///   Shapes    x, out [tokens, C] or [batch, tokens, C], any strides; out may be x
///   Types     float16, bfloat16, float32 or float64 (computed in float32); out of the same type, rounded once (RNE)
///   Throws    InvalidArgument with both values; on the CPU for x that is not finite its place, and out stays as it was
///   Source    docs/numerics.md, docs/decisions/0007-products-of-klt.md
void simulate_klt(const TensorView& x, const KltTable& table, const KltOptions& options, const TensorView& out,
                  void* stream = nullptr);

/// Compresses every token into its row.
///   Shapes    x [tokens, C] or [batch, tokens, C]; rows [tokens, R] or [batch, tokens, R] uint8, R = klt_row_bytes, rows
///             of a sequence without gaps, sequences at any stride (a cache with room to grow)
///   Throws    as simulate_klt
void compress_klt(const TensorView& x, const KltTable& table, const TensorView& rows, void* stream = nullptr);

/// What unpack_klt does to keys after the synthesis, in the arithmetic of the models (rotate_half):
///   out[i] = x[i] * cos[t, i] + -x[i + d/2] * sin[t, i];  out[i + d/2] = x[i + d/2] * cos[t, i + d/2] + x[i] * sin[t, i + d/2]
///   for i < d/2, d the width of cos, in each head; channels of a head beyond d stay as they are.
struct KltRope {
  std::int64_t head_dim = 0;  ///< 0: no rotation; else it divides C
  TensorView cos;             ///< [tokens, d] float32, d even and at most head_dim
  TensorView sin;             ///< [tokens, d] float32
};

/// Writes the tokens that rows stand for.
///   Shapes    rows as in compress_klt; out [tokens, C] or [batch, tokens, C], float16, bfloat16, float32 or float64
///   Hostile   never reads outside the views, and every row decodes to something; check_klt says what is wrong
///   Throws    InvalidArgument with both values
void unpack_klt(const TensorView& rows, const KltTable& table, const KltRope& rope, const TensorView& out,
                void* stream = nullptr);

/// Checks rows that came from outside: r that is not finite or negative, digits beyond their base, padding that is not 0.
/// Rows on the CPU.
///   Throws    InvalidArgument that names sequence, token, what is wrong, and both values
void check_klt(const TensorView& rows, const KltTable& table);

/// Samples of coefficients, and for which numbers of levels something is fitted to them or measured on them.
struct KltSamples {
  TensorView z;                 ///< [tokens, K] float32, any strides: z / r as the table's rule makes them
  TensorView weights;           ///< [tokens] float32, finite, at least 0 (r squared: errors in loss); rank 0: all 1
  std::int64_t num_levels = 0;  ///< M
  const std::int32_t* levels = nullptr;  ///< [M] host memory, ascending, of kKltLevels or 1
};

/// Fits the codebooks of coefficients: for each one and each number of levels the exact minimum of the squared error (1-D
/// k-means by dynamic programming; more than 1024 different samples are first joined to 1024 runs, single in the tails).
///   Shapes    centroids [K, sum of levels] float32, the codebooks in the order of levels; errors [K, M] float64: weighted mean
///             squared error on the samples
///   Device    CPU
///   Result    the same bits for any number of threads. Where a coefficient has fewer different values than levels, the
///             remaining centroids continue above the largest value, so that they still ascend
///   Throws    InvalidArgument with both values; for a sample that is not finite its place
void calibrate_klt_codebooks(const KltSamples& samples, const TensorView& centroids, const TensorView& errors);

/// The same for uniform grids: centroid i is offset + i * step; both minimise the squared error by alternating assignment and
/// regression from several starts.
///   Shapes    offsets, steps [K, M] float32, errors [K, M] float64; 1 level has step 0
void calibrate_klt_grids(const KltSamples& samples, const TensorView& offsets, const TensorView& steps,
                         const TensorView& errors);

/// Weighted mean squared error that codebooks leave on samples, for example on others than they were fitted to.
///   Shapes    as calibrate_klt_codebooks, centroids being read; they ascend
void measure_klt_errors(const KltSamples& samples, const TensorView& centroids, const TensorView& errors);

/// How bits are counted while levels are shared out.
enum class KltBits : std::int32_t {
  kEntropy = 0,  ///< log2(levels) a coefficient, 16 a table: the bound that rows approach
  kRows = 1,     ///< the bytes of the rows, padding included; padding is filled with levels where it can be
};

/// What has to be shared out: coefficients of all layers, K and V together.
struct KltAllocation {
  std::int64_t coefficients = 0;           ///< N
  std::int64_t tables = 0;                 ///< one for each layer, kind and block
  std::int64_t num_levels = 0;             ///< M
  const std::int32_t* levels = nullptr;    ///< [M] ascending, the first 1, the others of kKltLevels
  const double* errors = nullptr;          ///< [N, M] loss of coefficient n at levels[m]; finite, at least 0
  const std::int32_t* table_of = nullptr;  ///< [N] number of the coefficient's table, 0 to tables - 1
  std::int64_t row_alignment = 2;
  double budget_bits = 0.0;  ///< of one token, all tables together
  KltBits bits = KltBits::kRows;
};

/// Shares out levels greedily: again and again the step with the largest fall of loss per bit, over all coefficients, until no
/// step fits into the budget.
///   Shapes    chosen [N] receives numbers of levels
///   Returns   the bits that the result takes, counted as `bits` says; never above the budget
///   Throws    InvalidArgument with both values
double allocate_klt_levels(const KltAllocation& allocation, std::int32_t* chosen);

}  // namespace kvpack
