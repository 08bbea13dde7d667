// One row before and after its products: what a producer and a diagonal make of it, its range, its codes. Compiled once per
// instruction set, behind codes_cpu.h and elements_cpu.h; without an include guard.
#include "isa/exp.h"

namespace kvpack::KVPACK_ISA {
namespace {

/// Floats of a row's buffer: whole vectors, and a block of codes that may be read behind the last one.
inline std::int64_t row_floats(std::int64_t n) { return round_up(n, kLanes) + kCodeBlock; }

/// x / (1 + exp(-x)). NaN and -infinity give NaN, +infinity itself.
inline F32 silu(F32 x) {
  const F32 opposite = sub(set1(0.0f), x);
  const F32 e = exp_nonpositive(min(x, opposite));
  const F32 numerator = blend(ge(x, set1(0.0f)), set1(1.0f), e);
  return mul(x, div(numerator, add(set1(1.0f), e)));
}

/// 1 / sqrt(mean of squares + epsilon) of a row.
template <typename T>
inline float norm_factor(const T* x, std::int64_t n, float epsilon) {
  F32 sums[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const F32 value = load_some(x + i, n - i);
    F32& sum = sums[i / kLanes % 4];
    sum = fma(value, value, sum);
  }
  const float squares = reduce_add(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  return 1.0f / std::sqrt(squares / static_cast<float>(n) + epsilon);
}

/// True when the transform receives x as it is.
inline bool takes_x_as_it_is(const KronQuantizeProblem& problem) {
  return problem.producer == KronProducer::kNone && problem.matrices.diagonal == nullptr;
}

/// Writes what the transform receives of one token: n values in the type of x as floats, then zeros up to a whole vector.
template <typename T>
inline void produce_row(const KronQuantizeProblem& problem, std::int64_t token, float* out) {
  const std::int64_t n = problem.matrices.rows * problem.matrices.columns;
  const T* x = static_cast<const T*>(problem.x) + token * problem.x_stride;
  const T* second = static_cast<const T*>(problem.second) + token * problem.second_stride;
  const T* diagonal = static_cast<const T*>(problem.matrices.diagonal);
  const KronProducer producer = problem.producer;
  const bool is_rounded = !takes_x_as_it_is(problem);
  const F32 factor = set1(producer == KronProducer::kRmsNorm ? norm_factor(x, n, problem.epsilon) : 1.0f);
  for (std::int64_t i = 0; i < n; i += kLanes) {
    F32 value = load_some(x + i, n - i);
    if (producer == KronProducer::kRmsNorm) value = mul(mul(value, factor), load_some(second + i, n - i));
    if (producer == KronProducer::kSiluMul) value = mul(silu(value), load_some(second + i, n - i));
    if (diagonal != nullptr) value = mul(value, load_some(diagonal + i, n - i));
    store(out + i, is_rounded ? round_to<T>(value) : value);
  }
}

/// The range of n values, of which those behind n up to a whole vector are 0.
inline RowRange range_of(const float* y, std::int64_t n) {
  F32 high[2] = {set1(0.0f), set1(0.0f)};
  F32 low[2] = {set1(0.0f), set1(0.0f)};
  Mask broken = mask_from_bits(0);
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const F32 value = load(y + i);
    const std::int64_t strand = i / kLanes % 2;
    high[strand] = max(value, high[strand]);
    low[strand] = min(value, low[strand]);
    broken = either(broken, is_nonfinite(value));
  }
  return {reduce_max(max(high[0], high[1])), reduce_min(min(low[0], low[1])), bits(broken) == 0};
}

/// Codes, scale and zero of one transformed row for every output. y has row_floats(n), zeros behind n.
inline void write_outputs(const KronQuantizeProblem& problem, std::int64_t token, const float* y, std::int64_t n) {
  const RowRange range = range_of(y, n);
  const std::int64_t row_bytes = row_bytes_of_codes(problem.form, n);
  for (std::int32_t i = 0; i < problem.num_outputs; ++i) {
    const KronOutputData& output = problem.outputs[static_cast<std::size_t>(i)];
    const RowGrid grid = make_row_grid(range, output.clip_max, output.clip_min, problem.is_affine);
    std::byte* row = static_cast<std::byte*>(output.codes) + token * row_bytes;
    if (grid.inverse != 0.0f) {
      write_row_codes(y, n, grid, problem.form, problem.encoding, row);
    } else {  // a row that is not finite
      const unsigned nibble = problem.form == CodeForm::kInt8 ? 0u : nibble_of(0, problem.encoding);
      std::memset(row, static_cast<int>(nibble | nibble << 4), static_cast<std::size_t>(row_bytes));
    }
    output.scales[token] = grid.scale;
    if (output.zeros != nullptr) output.zeros[token] = grid.zero;
  }
}

/// Moves rows of `columns` values that lie `stride` apart next to each other, in place, and clears a vector behind them.
inline void close_gaps(float* y, std::int64_t rows, std::int64_t columns, std::int64_t stride) {
  for (std::int64_t i = 1; i < rows && stride != columns; ++i) {
    std::memmove(y + i * columns, y + i * stride, static_cast<std::size_t>(columns) * sizeof(float));
  }
  std::fill_n(y + rows * columns, kLanes, 0.0f);
}

}  // namespace
}  // namespace kvpack::KVPACK_ISA
