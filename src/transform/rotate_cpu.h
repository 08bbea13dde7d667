// Rotation in the SIMD vocabulary: lanes are neighbouring outputs, and each sum runs over the inputs in order, so that every
// instruction set rounds alike. Compiled once per instruction set by rotate_cpu.cpp.
//
//   head    x0 x1 ... xD         sums of outputs j .. j + kLanes:
//   matrix  R00 R01 ... R0D        fma(x0, R0j, 0), then fma(x1, R1j, sum), ...
//           R10 R11 ... R1D

namespace kvpack::KVPACK_ISA {
namespace {

/// Tokens that go through the matrix together: each of its registers is read once for all of them.
inline constexpr int kTogether = 4;

/// Rotates kTokens heads, [kTokens, dim] floats each, `out` another memory.
template <int kTokens>
inline void rotate_heads(const float* heads, const float* matrix, std::int64_t dim, float* out) {
  std::int64_t j = 0;
  for (; j + kLanes <= dim; j += kLanes) {
    F32 sums[kTokens];
    for (F32& sum : sums) sum = set1(0.0f);
    for (std::int64_t i = 0; i < dim; ++i) {
      const F32 row = load(matrix + i * dim + j);
      for (int t = 0; t < kTokens; ++t) sums[t] = fma(set1(heads[t * dim + i]), row, sums[t]);
    }
    for (int t = 0; t < kTokens; ++t) store(out + t * dim + j, sums[t]);
  }
  for (; j < dim; ++j) {
    for (int t = 0; t < kTokens; ++t) {
      float sum = 0.0f;
      for (std::int64_t i = 0; i < dim; ++i) sum = std::fma(heads[t * dim + i], matrix[i * dim + j], sum);
      out[t * dim + j] = sum;
    }
  }
}

/// Tokens [first, end) of all heads.
template <typename T>
void rotate_tokens(const RotateProblem& problem, std::int64_t first, std::int64_t end) {
  const std::int64_t dim = problem.head_dim;
  float* heads = thread_scratch(2 * kTogether * dim);
  float* rotated = heads + kTogether * dim;
  for (std::int64_t t = first; t < end; t += kTogether) {
    const std::int64_t count = end - t < kTogether ? end - t : kTogether;
    for (std::int64_t c = 0; c < problem.channels; c += dim) {
      for (std::int64_t k = 0; k < count; ++k) {
        const T* x = static_cast<const T*>(problem.x) + (t + k) * problem.x_token_stride + c;
        for (std::int64_t i = 0; i < dim; ++i) heads[k * dim + i] = to_float(x[i]);
      }
      if (count == kTogether) {
        rotate_heads<kTogether>(heads, problem.rotation, dim, rotated);
      } else {
        for (std::int64_t k = 0; k < count; ++k) {
          rotate_heads<1>(heads + k * dim, problem.rotation, dim, rotated + k * dim);
        }
      }
      for (std::int64_t k = 0; k < count; ++k) {
        T* out = static_cast<T*>(problem.out) + (t + k) * problem.out_token_stride + c;
        std::int64_t i = 0;
        for (; i + kLanes <= dim; i += kLanes) store(out + i, load(rotated + k * dim + i));
        for (; i < dim; ++i) from_float(rotated[k * dim + i], out[i]);
      }
    }
  }
}

}  // namespace

void rotate(const RotateProblem& problem) {
  constexpr std::int64_t kTaskProducts = 1 << 20;  // worth handing to another thread
  const std::int64_t block = (1 + kTaskProducts / (problem.channels * problem.head_dim) / kTogether) * kTogether;
  with_float_type(problem.dtype, [&]<typename T>() {
    auto task = [&](std::int64_t first, std::int64_t end) { rotate_tokens<T>(problem, first, end); };
    parallel_for_blocks(0, problem.tokens, block, task);
  });
}

}  // namespace kvpack::KVPACK_ISA
