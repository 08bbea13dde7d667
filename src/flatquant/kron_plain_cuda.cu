// kron_quantize and undo_transform without tensor cores: every type, shape and GPU.
#include <algorithm>

#include "core/with_type.h"
#include "cuda/buffer.h"
#include "cuda/check.h"
#include "cuda/device.h"
#include "cuda/element.cuh"
#include "cuda/reduce.cuh"
#include "flatquant/codes.h"
#include "flatquant/implementations.h"
#include "flatquant/plain_products_cuda.cuh"
#include "flatquant/rules.h"
#include "flatquant/workspace.h"

namespace kvpack::cuda {

namespace {

/// A problem with its outputs where a device can index them.
struct PlainParams {
  KronQuantizeProblem problem;
  KronOutputData outputs[kMaxKronOutputs] = {};
  float* rows = nullptr;  // two rows of float32 a thread block, or null: they are in shared memory
};

/// What a thread knows of a row's range.
struct PlainRange {
  float highest;
  float lowest;
  std::uint32_t magnitude;  // largest bits without the sign: infinity and NaN are above all numbers
};

/// Row `token` as the transform receives it.
template <typename T>
__device__ void produce_row(const KronQuantizeProblem& problem, std::int64_t token, int n, float* row) {
  const auto* x = static_cast<const T*>(problem.x) + token * problem.x_stride;
  const auto* second = static_cast<const T*>(problem.second);
  const auto* diagonal = static_cast<const T*>(problem.matrices.diagonal);
  const bool is_norm = problem.producer == KronProducer::kRmsNorm;
  float factor = 1.0f;
  if (is_norm) {
    float squares = 0.0f;
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kPlainThreads) {
      const float value = element_value(x[i]);
      squares = __fmaf_rn(value, value, squares);
    }
    squares = block_reduce<kPlainThreads>(squares, [](float a, float b) { return a + b; });
    factor = 1.0f / sqrtf(squares / static_cast<float>(n) + problem.epsilon);
  }
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kPlainThreads) {
    float value = element_value(x[i]);
    if (is_norm) value = value * factor * element_value(second[i]);
    if (problem.producer == KronProducer::kSiluMul) {
      value = value / (1.0f + expf(-value)) * element_value(second[token * problem.second_stride + i]);
    }
    if (diagonal != nullptr) value *= element_value(diagonal[i]);
    T rounded;
    set_element(value, rounded);
    row[i] = element_value(rounded);
  }
}

/// Y of the row in `row`; returns where it lies, in `row` or in `other`. Every thread must call.
template <typename T>
__device__ float* transform_row(const KronMatrices& matrices, float* row, float* other) {
  const auto* left = static_cast<const T*>(matrices.left);
  const auto* right = static_cast<const T*>(matrices.right);
  const int rows = static_cast<int>(matrices.rows);
  const int columns = static_cast<int>(matrices.columns);
  if (left != nullptr) {
    multiply_plainly(
        rows, columns, rows, [&](int k, int i) { return element_value(left[k * rows + i]); },
        [&](int k, int j) { return row[k * columns + j]; },
        [&](int i, int j, float value) { other[i * columns + j] = value; });
    __syncthreads();
    float* const swapped = row;
    row = other;
    other = swapped;
  }
  if (right == nullptr) return row;
  multiply_plainly(
      rows, columns, columns, [&](int k, int i) { return row[i * columns + k]; },
      [&](int k, int j) { return element_value(right[k * columns + j]); },
      [&](int i, int j, float value) { other[i * columns + j] = value; });
  __syncthreads();
  return other;
}

__device__ RowRange range_of(const float* y, int n) {
  constexpr std::uint32_t kMagnitude = 0x7fffffffu;
  constexpr std::uint32_t kInfinity = 0x7f800000u;
  PlainRange range{0.0f, 0.0f, 0u};
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kPlainThreads) {
    range.highest = fmaxf(range.highest, y[i]);
    range.lowest = fminf(range.lowest, y[i]);
    range.magnitude = max(range.magnitude, __float_as_uint(y[i]) & kMagnitude);
  }
  range = block_reduce<kPlainThreads>(range, [](PlainRange a, PlainRange b) {
    return PlainRange{fmaxf(a.highest, b.highest), fminf(a.lowest, b.lowest), max(a.magnitude, b.magnitude)};
  });
  return {range.highest, range.lowest, range.magnitude < kInfinity};
}

__device__ void write_codes(const KronQuantizeProblem& problem, const float* y, int n, const RowGrid& grid,
                            std::byte* row) {
  const bool is_finite = grid.inverse != 0.0f;
  const auto code = [&](int i) { return is_finite ? code_of(y[i], grid) : 0; };
  if (problem.form == CodeForm::kInt8) {
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kPlainThreads) {
      reinterpret_cast<std::int8_t*>(row)[i] = static_cast<std::int8_t>(code(i));
    }
  } else {
    for (int i = static_cast<int>(threadIdx.x); i < n / 2; i += kPlainThreads) {
      write_pair(row, i, code(2 * i), code(2 * i + 1), problem.encoding);
    }
  }
}

/// Quantises tokens without tensor cores.
///   Launch    any number of thread blocks of kPlainThreads; two rows of float32 in dynamic shared memory or in params.rows
///   Work      a thread block takes every gridDim.x-th token
///   Reads     x once (RMS norm: twice); left and right once a token, from the caches
///   Writes    codes, scales, zeros once per output
///   Needs     nothing
template <typename T>
__global__ void __launch_bounds__(kPlainThreads) kron_plain_kernel(const __grid_constant__ PlainParams params) {
  extern __shared__ float shared_rows[];
  const KronQuantizeProblem& problem = params.problem;
  const int n = static_cast<int>(problem.matrices.rows * problem.matrices.columns);
  float* row = params.rows == nullptr ? shared_rows : params.rows + std::int64_t{2} * blockIdx.x * n;
  for (std::int64_t token = blockIdx.x; token < problem.tokens; token += gridDim.x) {
    produce_row<T>(problem, token, n, row);
    __syncthreads();
    const float* y = transform_row<T>(problem.matrices, row, row + n);
    const RowRange range = range_of(y, n);
    for (int i = 0; i < problem.num_outputs; ++i) {
      const KronOutputData& output = params.outputs[i];
      const RowGrid grid = make_row_grid(range, output.clip_max, output.clip_min, problem.is_affine);
      write_codes(problem, y, n, grid,
                  static_cast<std::byte*>(output.codes) + token * row_bytes_of_codes(problem.form, n));
      if (threadIdx.x != 0) continue;
      output.scales[token] = grid.scale;
      if (output.zeros != nullptr) output.zeros[token] = grid.zero;
    }
    __syncthreads();  // the next token writes the same rows
  }
}

/// Multiplies rows with both matrices and a diagonal, without tensor cores.
///   Launch    any number of thread blocks of kPlainThreads; a row of float32 in dynamic shared memory or in `rows`
///   Work      a thread block takes every gridDim.x-th token
///   Reads     y and the matrices from the caches, as often as they are multiplied
///   Writes    out once
///   Needs     nothing
template <typename T>
__global__ void __launch_bounds__(kPlainThreads)
    undo_transform_kernel(UndoTransformProblem problem, float* rows_memory) {
  extern __shared__ float shared_rows[];
  const KronMatrices& matrices = problem.matrices;
  const auto* left = static_cast<const T*>(matrices.left);
  const auto* right = static_cast<const T*>(matrices.right);
  const auto* diagonal = static_cast<const T*>(matrices.diagonal);
  const int rows = static_cast<int>(matrices.rows);
  const int columns = static_cast<int>(matrices.columns);
  float* half = rows_memory == nullptr ? shared_rows : rows_memory + std::int64_t{blockIdx.x} * rows * columns;
  for (std::int64_t token = blockIdx.x; token < problem.tokens; token += gridDim.x) {
    const auto* y = static_cast<const T*>(problem.y) + token * problem.y_stride;
    auto* out = static_cast<T*>(problem.out) + token * problem.out_stride;
    const auto store = [&](int i, int j, float value) {
      const int place = i * columns + j;
      set_element(diagonal == nullptr ? value : value * element_value(diagonal[place]), out[place]);
    };
    if (left != nullptr) {
      multiply_plainly(
          rows, columns, rows, [&](int k, int i) { return element_value(left[k * rows + i]); },
          [&](int k, int j) { return element_value(y[k * columns + j]); },
          [&](int i, int j, float value) {
            if (right == nullptr) {
              store(i, j, value);
            } else {
              half[i * columns + j] = value;
            }
          });
    } else {
      for (int i = static_cast<int>(threadIdx.x); i < rows * columns; i += kPlainThreads) {
        if (right == nullptr) {
          store(i / columns, i % columns, element_value(y[i]));
        } else {
          half[i] = element_value(y[i]);
        }
      }
    }
    __syncthreads();
    if (right != nullptr) {
      multiply_plainly(
          rows, columns, columns, [&](int k, int i) { return half[i * columns + k]; },
          [&](int k, int j) { return element_value(right[k * columns + j]); }, store);
    }
    __syncthreads();  // the next token writes `half`
  }
}

/// Allows a kernel its shared memory and says how many of its thread blocks the current GPU holds.
template <typename Kernel>
std::int64_t plain_blocks(Kernel kernel, std::int64_t shared, std::int64_t tokens) {
  int device = 0, multiprocessors = 0, resident = 0;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
             "give a kernel its shared memory");
  check_cuda(cudaGetDevice(&device), "tell the current device");
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "count multiprocessors");
  check_cuda(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kPlainThreads, static_cast<std::size_t>(shared)),
      "tell how many thread blocks fit");
  return std::min(tokens, std::int64_t{std::max(1, resident)} * multiprocessors);
}

}  // namespace

void kron_quantize_plain(const KronQuantizeProblem& problem) {
  const DeviceGuard device(problem.x, "x");
  const std::int64_t n = problem.matrices.rows * problem.matrices.columns;
  PlainParams params;
  params.problem = problem;
  std::ranges::copy(problem.outputs, params.outputs);
  const bool is_shared = kron_rows_fit_shared_memory(n);
  params.rows = is_shared ? nullptr : static_cast<float*>(problem.workspace);
  const std::int64_t shared = is_shared ? kron_plain_row_bytes(n) : 0;
  with_float_type(problem.dtype, [&]<typename T>() {
    std::int64_t blocks = plain_blocks(kron_plain_kernel<T>, shared, problem.tokens);
    if (!is_shared) blocks = std::min(blocks, kKronPlainBlocks);
    kron_plain_kernel<T><<<static_cast<unsigned>(blocks), kPlainThreads, static_cast<std::size_t>(shared),
                           static_cast<cudaStream_t>(problem.stream)>>>(params);
    check_cuda(cudaGetLastError(), "start kron_plain_kernel");
  });
}

void undo_transform(const UndoTransformProblem& problem) {
  const DeviceGuard device(problem.y, "y");
  const auto stream = static_cast<cudaStream_t>(problem.stream);
  const std::int64_t n = problem.matrices.rows * problem.matrices.columns;
  const bool is_shared = kron_rows_fit_shared_memory(n);
  const std::int64_t shared = is_shared ? n * static_cast<std::int64_t>(sizeof(float)) : 0;
  with_float_type(problem.dtype, [&]<typename T>() {
    std::int64_t blocks = plain_blocks(undo_transform_kernel<T>, shared, problem.tokens);
    if (!is_shared) blocks = std::min(blocks, kKronPlainBlocks);
    const DeviceBuffer<float> rows(is_shared ? 1 : blocks * n, stream);
    undo_transform_kernel<T>
        <<<static_cast<unsigned>(blocks), kPlainThreads, static_cast<std::size_t>(shared), stream>>>(
            problem, is_shared ? nullptr : rows.data());
    check_cuda(cudaGetLastError(), "start undo_transform_kernel");
  });
}

}  // namespace kvpack::cuda
