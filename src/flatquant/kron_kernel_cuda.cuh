// The kernel of kron_quantize on tensor cores: both products, range, codes, in one pass over x. How a warp multiplies is its
// parameter: mma_products_cuda.cuh for every GPU since sm_80, wgmma_products_cuda.cuh for Hopper.
#pragma once

#include <cstdint>

#include "flatquant/codes_cuda.cuh"
#include "flatquant/producers_cuda.cuh"
#include "flatquant/token_tiles_cuda.cuh"

namespace kvpack::cuda {

/// Shared-memory addresses of one thread block.
struct KronMemory {
  std::uint32_t right;
  std::uint32_t left;  // where Products keeps it there; else in the stages until it is in registers
  std::uint32_t vectors;
  std::uint32_t stages;

  __device__ static KronMemory of(const KronKernelParams& params, std::uint32_t first) {
    const std::uint32_t left = first + params.right_tile.bytes();
    const std::uint32_t vectors = left + params.left_bytes;
    return {first, left, vectors, vectors + params.vectors * params.x_tile.bytes()};
  }
};

/// Padding of X must be zeros; copies never touch it.
__device__ inline void clear_stages(const KronKernelParams& params, const KronMemory& memory) {
  const int bytes = params.groups * params.stages * params.stage_bytes;
  for (int i = static_cast<int>(threadIdx.x) * 16; i < bytes; i += static_cast<int>(blockDim.x) * 16) {
    store_shared_chunk(memory.stages + i, make_uint4(0, 0, 0, 0));
  }
}

/// What the kernel below does.
template <typename Products>
__device__ void quantize_tokens(const KronKernelParams& params) {
  constexpr MmaType kType = Products::kType;
  constexpr int kTiles = Products::kTiles;
  extern __shared__ __align__(1024) std::byte unaligned[];
  std::byte* shared = unaligned + (kTileAlignment - 1 - (shared_address(unaligned) - 1) % kTileAlignment);
  const KronMemory memory = KronMemory::of(params, shared_address(shared));
  const Group group = Group::of_this_thread(params);

  load_right<kType, kTiles>(params, memory.right);
  load_left<kType>(params, Products::kKeepsLeft ? memory.left : memory.stages);
  load_vectors(params, memory.vectors);
  __syncthreads();
  Products products(params, group, memory.left, memory.stages);
  __syncthreads();
  clear_stages(params, memory);
  Products::show_memory();
  __syncthreads();

  GroupExchange& exchange = reinterpret_cast<GroupExchange*>(shared + params.tiles_bytes)[group.index];
  auto* codes = reinterpret_cast<std::int8_t*>(shared + params.tiles_bytes + params.groups * sizeof(GroupExchange)) +
                group.index * params.rows * params.columns;  // where !stores_words
  const std::uint32_t first_stage = memory.stages + group.index * params.stages * params.stage_bytes;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * params.groups;
  std::int64_t token = blockIdx.x + static_cast<std::int64_t>(gridDim.x) * group.index;
  for (int s = 0; s < params.stages; ++s) {
    start_token(params, group, token + s * step, first_stage + s * params.stage_bytes);
  }
  for (int slot = 0; token < params.problem.tokens; token += step) {
    const std::uint32_t stage = first_stage + slot * params.stage_bytes;
    wait_for_token(params.stages);
    produce_token<kType>(params, group, token, stage, memory.vectors, exchange);
    Products::show_memory();
    group.sync();
    float y[kTiles][4];
    products.multiply(params, stage, memory.right, y);
    publish_range(params, group, y, exchange);
    group.sync();  // now nobody reads the stage any more
    const RowRange range = read_range(params, exchange);
    start_token(params, group, token + params.stages * step, stage);
    store_token(params, group, token, range, y, codes);
    slot = slot + 1 == params.stages ? 0 : slot + 1;
  }
  wait_copies<0>();
}

/// Quantises tokens: Y = left^T * X * right, codes of Y.
///   Launch    any number of thread blocks of groups*group_warps warps, one after another on a multiprocessor; dynamic shared
///             memory as KronKernelParams says
///   Work      a group of warps takes every (blocks*groups)-th token; a warp owns 16 rows of Y in registers
///   Reads     x once, by copies that run `stages` tokens ahead; left and right once per thread block
///   Writes    codes, scales, zeros once per output
///   Needs     problem.tokens > 0; columns at most 8*Products::kTiles
///
///                     shared memory            registers of warp w
///   X [M x N]         a stage, 2 or 3 tokens     -
///   Z = left^T * X    -                        rows 16w .. 16w+15, 16 or 64 columns at a time, rounded to the type of x
///   Y = Z * right     -                        rows 16w .. 16w+15, all columns, float32
template <typename Products>
__global__ void __launch_bounds__(Products::kThreads, 1)
    kron_quantize_kernel(const __grid_constant__ KronKernelParams params) {
  // For other GPUs there is no code: the launch looks first.
#if __CUDA_ARCH__ >= 800
  if constexpr (Products::kExists) quantize_tokens<Products>(params);
#endif
}

}  // namespace kvpack::cuda
