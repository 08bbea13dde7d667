// kron_quantize and undo_transform in the SIMD vocabulary, float32 products: a token's matrices stay in cache from its first
// load to its codes. Compiled once per instruction set by kron_quantize_cpu.cpp.
#include "flatquant/codes_cpu.h"
#include "flatquant/elements_cpu.h"
#include "flatquant/products_cpu.h"
#include "flatquant/rows_cpu.h"

namespace kvpack::KVPACK_ISA {
namespace {

/// Buffers of one task, [rows, stride] floats each, with room for a block of codes.
struct TokenMemory {
  TokenMemory(const FloatMatrices& matrices, std::int64_t threads_of_a_product) : parts(threads_of_a_product) {
    const std::int64_t floats = round_up(matrices.floats(), kLanes) + kCodeBlock;
    x = thread_scratch(3 * floats);
    half = x + floats;
    y = half + floats;
  }
  std::int64_t parts;  // threads that share one product: more than one only outside of parallel loops
  float* x;
  float* half;
  float* y;
};

/// Spreads n values that lie next to each other, in place, to rows that lie `stride` apart, with zeros between them.
inline void open_gaps(float* x, std::int64_t rows, std::int64_t columns, std::int64_t stride) {
  if (stride == columns) return;
  for (std::int64_t i = rows - 1; i >= 0; --i) {
    std::memmove(x + i * stride, x + i * columns, static_cast<std::size_t>(columns) * sizeof(float));
    std::fill_n(x + i * stride + columns, stride - columns, 0.0f);
  }
}

template <typename T>
void quantize_token(const KronQuantizeProblem& problem, const FloatMatrices& matrices, const TokenMemory& memory,
                    std::int64_t token) {
  const std::int64_t n = matrices.rows * matrices.columns;
  const float* x = memory.x;
  bool is_direct = false;
  if constexpr (std::is_same_v<T, float>) {
    is_direct = takes_x_as_it_is(problem) && matrices.stride == matrices.columns &&
                (problem.matrices.left != nullptr || problem.matrices.right != nullptr);
    if (is_direct) x = static_cast<const float*>(problem.x) + token * problem.x_stride;
  }
  if (!is_direct) {
    produce_row<T>(problem, token, memory.x);
    open_gaps(memory.x, matrices.rows, matrices.columns, matrices.stride);
  }
  float* y = const_cast<float*>(transform_token(matrices, x, matrices.stride, memory.half, memory.y, memory.parts));
  close_gaps(y, matrices.rows, matrices.columns, matrices.stride);
  write_outputs(problem, token, y, n);
}

template <typename T>
void undo_token(const UndoTransformProblem& problem, const FloatMatrices& matrices, const TokenMemory& memory,
                std::int64_t token) {
  const std::int64_t n = matrices.rows * matrices.columns;
  const T* source = static_cast<const T*>(problem.y) + token * problem.y_stride;
  for (std::int64_t i = 0; i < n; i += kLanes) store(memory.x + i, load_some(source + i, n - i));
  open_gaps(memory.x, matrices.rows, matrices.columns, matrices.stride);
  float* y =
      const_cast<float*>(transform_token(matrices, memory.x, matrices.stride, memory.half, memory.y, memory.parts));
  close_gaps(y, matrices.rows, matrices.columns, matrices.stride);
  const T* diagonal = static_cast<const T*>(problem.matrices.diagonal);
  T* out = static_cast<T*>(problem.out) + token * problem.out_stride;
  for (std::int64_t i = 0; i < n; i += kLanes) {
    F32 value = load(y + i);
    if (diagonal != nullptr) value = mul(value, load_some(diagonal + i, n - i));
    if (n - i >= kLanes) {
      store(out + i, value);
    } else {
      T last[kLanes];
      store(last, value);
      std::copy_n(last, n - i, out + i);
    }
  }
}

/// Runs token(memory, t) for all tokens, several to a task: one is worth about 20 microseconds. Fewer tokens than threads
/// are taken one by one, and their products are shared out where that is worth waking a thread.
template <typename Token>
void for_each_token(const FloatMatrices& matrices, std::int64_t tokens, const Token& token) {
  constexpr std::int64_t kTaskProducts = 1 << 20;
  const std::int64_t products = matrices.floats() * (matrices.rows + matrices.columns);
  const std::int64_t threads = num_threads();
  if (tokens < threads && products > kTaskProducts) {
    const TokenMemory memory(matrices, threads);
    for (std::int64_t t = 0; t < tokens; ++t) token(memory, t);
    return;
  }
  const std::int64_t together = std::max<std::int64_t>(1, kTaskProducts / products);
  auto task = [&](std::int64_t index) {
    const TokenMemory memory(matrices, 1);
    const std::int64_t end = std::min(tokens, (index + 1) * together);
    for (std::int64_t t = index * together; t < end; ++t) token(memory, t);
  };
  parallel_for(divide_up(tokens, together), task);
}

}  // namespace

void kron_quantize(const KronQuantizeProblem& problem) {
  with_float_type(problem.dtype, [&]<typename T>() {
    const FloatMatrices matrices = widen_matrices<T>(problem.matrices);
    for_each_token(matrices, problem.tokens, [&](const TokenMemory& memory, std::int64_t token) {
      quantize_token<T>(problem, matrices, memory, token);
    });
  });
}

void undo_transform(const UndoTransformProblem& problem) {
  with_float_type(problem.dtype, [&]<typename T>() {
    const FloatMatrices matrices = widen_matrices<T>(problem.matrices);
    for_each_token(matrices, problem.tokens, [&](const TokenMemory& memory, std::int64_t token) {
      undo_token<T>(problem, matrices, memory, token);
    });
  });
}

}  // namespace kvpack::KVPACK_ISA
