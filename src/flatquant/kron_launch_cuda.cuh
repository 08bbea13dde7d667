// Starts kron_quantize_kernel: sizes of tiles, how many tokens a thread block takes at a time, shared memory.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/check.h"
#include "cuda/device.h"
#include "flatquant/kron_kernel_cuda.cuh"

namespace kvpack::cuda {

/// Each starts its kernel, or returns false where the shape has none or does not fit the GPU's shared memory.
bool launch_kron_mma(const KronQuantizeProblem& problem);
bool launch_kron_wgmma_float16(const KronQuantizeProblem& problem);
bool launch_kron_wgmma_bfloat16(const KronQuantizeProblem& problem);

constexpr std::int32_t round_up(std::int64_t count, std::int32_t size) {
  return static_cast<std::int32_t>((count + size - 1) / size * size);
}

inline bool is_aligned_to(const void* data, std::int64_t bytes) {
  return reinterpret_cast<std::uintptr_t>(data) % static_cast<std::uintptr_t>(bytes) == 0;
}

/// The outputs, and what their clips ask of the kernel.
template <typename Params>
void set_outputs(const KronQuantizeProblem& problem, Params& params) {
  std::ranges::copy(problem.outputs, params.outputs);
  params.needs_both_sides = problem.is_affine;
  params.clamps = problem.is_affine;
  for (std::int32_t i = 0; i < problem.num_outputs; ++i) {
    const KronOutputData& output = params.outputs[i];
    params.needs_both_sides = params.needs_both_sides || output.clip_max != output.clip_min;
    params.clamps = params.clamps || output.clip_max != 1.0f || output.clip_min != 1.0f;
  }
}

/// What the kernel can take together of each token.
inline void set_widths(KronKernelParams& params) {
  const KronQuantizeProblem& problem = params.problem;
  constexpr std::int64_t kChunkBytes = 16;
  const bool is_silu = problem.producer == KronProducer::kSiluMul;
  params.loads_chunks =
      params.columns % kChunk == 0 && problem.x_stride % kChunk == 0 && is_aligned_to(problem.x, kChunkBytes) &&
      (!is_silu || (problem.second_stride % kChunk == 0 && is_aligned_to(problem.second, kChunkBytes)));
  params.chunks = round_up(params.columns, kChunk) / kChunk;
  params.row_step = params.group_warps * kWarpLanes / params.chunks;
  params.chunk_step = params.group_warps * kWarpLanes % params.chunks;
  params.copies_columns = params.loads_chunks && params.chunk_step == 0 && params.row_step % 8 == 0;
  params.stores_words = params.columns % kChunk == 0;
  for (std::int32_t i = 0; i < problem.num_outputs; ++i) {
    const KronOutputData& output = problem.outputs[static_cast<std::size_t>(i)];
    params.stores_words = params.stores_words && is_aligned_to(output.codes, 4);
    params.stores_vectors = (i == 0 || params.stores_vectors) && is_aligned_to(output.codes, kChunkBytes);
  }
}

/// Most tokens at a time, then most stages, that fit; 0 stages where not even one token does. Returns the bytes.
inline std::int32_t choose_stages(KronKernelParams& params, int most_warps, int most_bytes) {
  const std::int32_t fixed = params.right_tile.bytes() + params.left_bytes + params.vectors * params.x_tile.bytes();
  const std::int32_t exchange =
      static_cast<std::int32_t>(sizeof(GroupExchange)) + (params.stores_words ? 0 : params.rows * params.columns);
  params.stages = 0;
  const int most_groups = std::max(1, most_warps / params.group_warps);
  for (const int least_stages : {2, 1}) {
    for (params.groups = most_groups; params.groups > 0; --params.groups) {
      for (params.stages = kMaxStages; params.stages >= least_stages; --params.stages) {
        // Before the first token, left stands where the stages will.
        const std::int32_t stages = std::max(params.groups * params.stages * params.stage_bytes,
                                             params.left_bytes == 0 ? params.left_tile.bytes() : 0);
        params.tiles_bytes = fixed + stages;
        const std::int32_t bytes = kTileAlignment + params.tiles_bytes + params.groups * exchange;
        if (bytes <= most_bytes) return bytes;
      }
    }
  }
  params.stages = 0;
  return 0;
}

/// Starts the kernel that multiplies as Products does, M padded to x_rows, N to blocks of 64 columns in `right_blocks`.
template <typename Products>
bool launch_kron(const KronQuantizeProblem& problem, int group_warps, TileShape x_tile, TileShape right_tile) {
  KronKernelParams params;
  params.problem = problem;
  set_outputs(problem, params);
  params.rows = static_cast<std::int32_t>(problem.matrices.rows);
  params.columns = static_cast<std::int32_t>(problem.matrices.columns);
  params.x_tile = x_tile;
  params.right_tile = right_tile;
  params.group_warps = group_warps;
  params.left_tile = {x_tile.rows, round_up(16 * group_warps, kBlockColumns) / kBlockColumns};
  params.left_bytes = Products::kKeepsLeft ? params.left_tile.bytes() : 0;
  params.vectors = (problem.producer == KronProducer::kRmsNorm) + (problem.matrices.diagonal != nullptr);
  set_widths(params);
  // A thread's codes are one piece where N is all columns of the tiles.
  params.stores_vectors = params.stores_vectors && params.columns == 8 * Products::kTiles;
  if (group_warps * kWarpLanes > Products::kThreads) return false;
  int shared = 0;
  for (const bool copies_second : {true, false}) {
    params.copies_second = copies_second && problem.producer == KronProducer::kSiluMul;
    params.stage_bytes = x_tile.bytes() * (params.copies_second ? 2 : 1);
    shared = choose_stages(params, Products::kThreads / kWarpLanes,
                           device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
    if (params.stages != 0) break;
  }
  if (params.stages == 0) return false;

  const auto kernel = kron_quantize_kernel<Products>;
  const int threads = params.groups * group_warps * kWarpLanes;
  int resident = 0;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
             "give a kernel its shared memory");
  check_cuda(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, static_cast<std::size_t>(shared)),
      "tell how many thread blocks fit");
  const std::int64_t most = std::int64_t{std::max(1, resident)} * device_attribute(cudaDevAttrMultiProcessorCount);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min(most, problem.tokens)));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shared);
  config.stream = static_cast<cudaStream_t>(problem.stream);
  check_cuda(cudaLaunchKernelEx(&config, kernel, params), "start kron_quantize_kernel");
  return true;
}

}  // namespace kvpack::cuda
