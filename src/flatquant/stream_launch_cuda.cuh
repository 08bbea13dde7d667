// Which shape of kron_stream_kernel takes which problem, and its start.
#pragma once

#include <cstdint>

#include "cuda/tensor_map.h"
#include "flatquant/kron_launch_cuda.cuh"
#include "flatquant/kron_stream_cuda.cuh"

namespace kvpack::cuda {

template <typename Shape>
bool launch_stream_as(const KronQuantizeProblem& problem) {
  StreamParams params;
  const std::int64_t n = problem.matrices.rows * problem.matrices.columns;
  const MatricesInMemory x{problem.x,
                           problem.tokens,
                           problem.matrices.rows,
                           problem.matrices.columns,
                           problem.matrices.columns,
                           problem.tokens == 1 ? n : problem.x_stride};
  if (!make_tensor_map(params.x_map, x, Shape::kRows, Shape::kStacked)) return false;
  params.left = problem.matrices.left;
  params.right = problem.matrices.right;
  params.tokens = static_cast<std::int32_t>(problem.tokens);
  params.row_bytes = row_bytes_of_codes(problem.form, n);
  params.rows = static_cast<std::int32_t>(problem.matrices.rows);
  params.num_outputs = problem.num_outputs;
  params.form = problem.form;
  params.encoding = problem.encoding;
  params.is_affine = problem.is_affine;
  set_outputs(problem, params);
  const int most_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (Shape::kSharedBytes > most_bytes) return false;
  const auto kernel = kron_stream_kernel<Shape>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes),
             "give a kernel its shared memory");
  const std::int64_t most = device_attribute(cudaDevAttrMultiProcessorCount);
  cudaLaunchConfig_t config{};
  const std::int64_t parts = (problem.tokens + Shape::kStacked - 1) / Shape::kStacked;
  config.gridDim = dim3(static_cast<unsigned>(std::min(most, parts)));
  config.blockDim = dim3(static_cast<unsigned>(Shape::kThreads));
  config.dynamicSmemBytes = static_cast<std::size_t>(Shape::kSharedBytes);
  config.stream = static_cast<cudaStream_t>(problem.stream);
  check_cuda(cudaLaunchKernelEx(&config, kernel, params), "start kron_stream_kernel");
  return true;
}

/// Whether x can be brought by the copy engine and codes leave in whole words.
inline bool takes_stream(const KronQuantizeProblem& problem) {
  constexpr std::int64_t kBytes = 16;
  constexpr std::int64_t kMostTokens = std::int64_t{1} << 30;  // the copy engine counts in 32 bits
  if (problem.producer != KronProducer::kNone || problem.matrices.diagonal != nullptr) return false;
  if (problem.tokens > kMostTokens) return false;
  if (!is_aligned_to(problem.x, kBytes) || problem.x_stride % kChunk != 0) return false;
  for (std::int32_t i = 0; i < problem.num_outputs; ++i) {
    if (!is_aligned_to(problem.outputs[static_cast<std::size_t>(i)].codes, kBytes)) return false;
  }
  return true;
}

/// Starts the shape that takes M and N, with as many groups as the registers of a multiprocessor allow, or returns false.
template <MmaType kType>
bool launch_stream(const KronQuantizeProblem& problem) {
  const std::int64_t rows = problem.matrices.rows;
  const std::int64_t columns = problem.matrices.columns;
  if (rows > 128 || !takes_stream(problem)) return false;
  if (columns == 224 && rows > 64) return launch_stream_as<StreamShape<kType, 224, 8, 1>>(problem);
  if (columns == 128) {
    if (rows > 112) return launch_stream_as<StreamShape<kType, 128, 8, 2>>(problem);
    if (rows > 96) return launch_stream_as<StreamShape<kType, 128, 7, 2>>(problem);
    if (rows > 64) return launch_stream_as<StreamShape<kType, 128, 6, 2>>(problem);
    return launch_stream_as<StreamShape<kType, 128, 4, 3>>(problem);
  }
  if (columns == 80 && rows <= 64) return launch_stream_as<StreamShape<kType, 80, 4, 4>>(problem);
  if (columns == 64 && rows <= 64) return launch_stream_as<StreamShape<kType, 64, 4, 5>>(problem);
  return columns == 32 && rows <= 32 && launch_stream_as<StreamShape<kType, 32, 2, 7>>(problem);
}

}  // namespace kvpack::cuda
