// kron_quantize in bfloat16 on AMX (Sapphire Rapids and later); other types, and rows without a matrix, go to AVX-512.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/divide_up.h"
#include "core/half.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "flatquant/codes.h"
#include "flatquant/implementations.h"
#include "flatquant/rules.h"

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 in its own header (bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"        // the same one
#include <immintrin.h>
#pragma GCC diagnostic pop

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")
// clang-format off: the vocabulary first
#include "isa/avx512.h"
namespace kvpack::amx {
namespace {
using namespace avx512;  // NOLINT: this file is compiled behind that vocabulary
}
}  // namespace kvpack::amx
#define KVPACK_ISA amx
#define KVPACK_ISA_LANES 16
#include "flatquant/codes_cpu.h"
#include "flatquant/elements_cpu.h"
#include "flatquant/rows_cpu.h"
#include "flatquant/tiles_amx.h"
#include "flatquant/products_amx.h"
// clang-format on

namespace kvpack::amx {
namespace {

/// Buffers of one task.
struct TokenMemory {
  explicit TokenMemory(const PackedMatrices& matrices) {
    const std::int64_t floats = round_up(matrices.elements(), kLanes) + kCodeBlock;
    y = thread_scratch(floats + matrices.elements());
    x = reinterpret_cast<BFloat16*>(y + floats);
    between = x + matrices.elements();
    std::fill_n(x, matrices.elements(), BFloat16{0});  // padding stays so
  }
  float* y;
  BFloat16* x;
  BFloat16* between;
};

/// The rows of one token, padded: x itself where it needs no padding and nothing stands in front.
const BFloat16* stage_token(const KronQuantizeProblem& problem, const PackedMatrices& matrices,
                            const TokenMemory& memory, std::int64_t token) {
  const std::int64_t rows = problem.matrices.rows;
  const std::int64_t columns = problem.matrices.columns;
  const auto* x = static_cast<const BFloat16*>(problem.x) + token * problem.x_stride;
  if (takes_x_as_it_is(problem)) {
    if (rows == matrices.rows && columns == matrices.columns) return x;
    for (std::int64_t i = 0; i < rows; ++i) {
      std::memcpy(memory.x + i * matrices.columns, x + i * columns, static_cast<std::size_t>(columns) * 2);
    }
    return memory.x;
  }
  produce_row<BFloat16>(problem, token, memory.y);
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < columns; j += kLanes) {
      BFloat16 exact[kLanes];
      store(exact, load(memory.y + i * columns + j));
      std::copy_n(exact, std::min<std::int64_t>(kLanes, columns - j), memory.x + i * matrices.columns + j);
    }
  }
  return memory.x;
}

}  // namespace

void kron_quantize(const KronQuantizeProblem& problem) {
  const bool has_matrix = problem.matrices.left != nullptr || problem.matrices.right != nullptr;
  if (problem.dtype != DType::kBFloat16 || !has_matrix) return avx512::kron_quantize(problem);
  const PackedMatrices matrices = pack_matrices(problem.matrices);
  const std::int64_t rows = problem.matrices.rows;
  const std::int64_t columns = problem.matrices.columns;
  constexpr std::int64_t kTaskElements = 1 << 16;  // about 20 microseconds
  const std::int64_t together = std::max<std::int64_t>(1, kTaskElements / matrices.elements());
  auto task = [&](std::int64_t index) {
    const TileScope tiles;
    const TokenMemory memory(matrices);
    const std::int64_t end = std::min(problem.tokens, (index + 1) * together);
    for (std::int64_t token = index * together; token < end; ++token) {
      transform_token(matrices, stage_token(problem, matrices, memory, token), memory.between, memory.y);
      close_gaps(memory.y, rows, columns, matrices.columns);
      write_outputs(problem, token, memory.y, rows * columns);
    }
  };
  parallel_for(divide_up(problem.tokens, together), task);
}

}  // namespace kvpack::amx
#pragma GCC pop_options
#endif
