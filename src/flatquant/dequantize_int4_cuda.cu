// dequantize_int4 on the GPU: one product a code, the bits of the reference.
#include "core/with_type.h"
#include "cuda/check.h"
#include "cuda/device.h"
#include "cuda/element.cuh"
#include "cuda/launch.h"
#include "flatquant/codes.h"
#include "flatquant/implementations.h"

namespace kvpack::cuda {

namespace {

constexpr int kThreads = 256;

/// Elements that a thread writes together: 16 bytes of a 16-bit type.
constexpr int kTogether = 8;

template <typename T>
struct alignas(16) Eight {
  T of[kTogether];
};

/// Writes the values of codes.
///   Launch    any number of thread blocks of kThreads
///   Work      a thread per kTogether neighbours, all of one row where is_whole, which rows of a multiple of 8 are
///   Reads     codes, scales, zeros once
///   Writes    out once
///   Needs     is_whole: out aligned to 16 bytes
template <typename T>
__global__ void __launch_bounds__(kThreads) dequantize_int4_kernel(DequantizeInt4Problem problem, bool is_whole) {
  const Int4Data& rows = problem.rows;
  auto* out = static_cast<T*>(problem.out);
  const std::int64_t count = rows.rows * rows.columns;
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads * kTogether;
  const std::int64_t row_bytes = row_bytes_of_codes(rows.form, rows.columns);
  const auto value_at = [&](std::int64_t row, std::int64_t column) {
    const auto* bytes = static_cast<const std::byte*>(rows.codes) + row * row_bytes;
    const int code = read_code(bytes, column, rows.form, rows.encoding);
    return (static_cast<float>(code) - (rows.zeros == nullptr ? 0.0f : rows.zeros[row])) * rows.scales[row];
  };
  for (std::int64_t i = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * kTogether; i < count; i += step) {
    if (is_whole) {
      const std::int64_t row = i / rows.columns;
      Eight<T> values;
#pragma unroll
      for (int j = 0; j < kTogether; ++j) set_element(value_at(row, i % rows.columns + j), values.of[j]);
      *reinterpret_cast<Eight<T>*>(out + i) = values;
    } else {
      for (std::int64_t j = i; j < min(i + kTogether, count); ++j) {
        set_element(value_at(j / rows.columns, j % rows.columns), out[j]);
      }
    }
  }
}

}  // namespace

void dequantize_int4(const DequantizeInt4Problem& problem) {
  const DeviceGuard device(problem.out, "out");
  const Int4Data& rows = problem.rows;
  const bool is_whole = rows.columns % kTogether == 0 && reinterpret_cast<std::uintptr_t>(problem.out) % 16 == 0;
  const std::int64_t blocks = divide_up(rows.rows * rows.columns, std::int64_t{kThreads} * kTogether);
  with_float_type(problem.dtype, [&]<typename T>() {
    dequantize_int4_kernel<T>
        <<<grid_blocks(blocks), kThreads, 0, static_cast<cudaStream_t>(problem.stream)>>>(problem, is_whole);
    check_cuda(cudaGetLastError(), "start dequantize_int4_kernel");
  });
}

}  // namespace kvpack::cuda
