// Compressing to tiles, unpacking and checking them on the GPU. Compressing is three kernels: pack blocks of 64 tokens
// into slots of their own, add up the blocks' sizes, move every block to its place. No block waits for another one.
#include <cuda_runtime.h>

#include "cuda/buffer.h"
#include "cuda/check.h"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "formats/tile64/check_cuda.cuh"
#include "formats/tile64/pack_cuda.cuh"
#include "formats/tile64/place_cuda.cuh"
#include "formats/tile64/unpack_cuda.cuh"

namespace kvpack::cuda {

namespace {

PackWorkspace divide_workspace(const CompressTile64Problem& problem) {
  PackWorkspace workspace;
  workspace.blocks_per_batch = tile64::blocks_of(problem.out.tokens);
  workspace.blocks = problem.out.batches * workspace.blocks_per_batch;
  workspace.slot_bytes = tile64::slot_bytes(problem.out.bits, problem.out.head_dim);
  workspace.bases = static_cast<std::int64_t*>(problem.workspace);
  const auto behind = reinterpret_cast<std::uintptr_t>(workspace.bases + workspace.blocks + 1);
  const auto aligned = (behind + tile64::kSlotAlignment - 1) / tile64::kSlotAlignment * tile64::kSlotAlignment;
  workspace.slots = reinterpret_cast<std::uint8_t*>(aligned);
  return workspace;
}

template <int kSlots>
void launch_pack_any(const CompressTile64Problem& problem, const PackWorkspace& workspace) {
  constexpr int kSharedBytes = static_cast<int>(pack_any_shared_bytes(kSlots * kWarpLanes));
  check_cuda(cudaFuncSetAttribute(pack_any_kernel<kSlots>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
             "give a block more shared memory");
  pack_any_kernel<kSlots>
      <<<grid_blocks(workspace.blocks), kPackThreads, kSharedBytes, static_cast<cudaStream_t>(problem.stream)>>>(
          problem, workspace);
}

void launch_pack(const CompressTile64Problem& problem, const PackWorkspace& workspace) {
  if (problem.out.head_dim == 64) return launch_pack_any<2>(problem, workspace);
  if (problem.out.head_dim == 128) return launch_pack_any<4>(problem, workspace);
  launch_pack_any<8>(problem, workspace);
}

}  // namespace

void compress_tile64(const CompressTile64Problem& problem) {
  const DeviceGuard device(problem.workspace, "workspace");
  const auto stream = static_cast<cudaStream_t>(problem.stream);
  const PackWorkspace workspace = divide_workspace(problem);
  if (workspace.blocks > 0) {
    launch_pack(problem, workspace);
    check_cuda(cudaGetLastError(), "launch the packing of compress_tile64");
  }
  scan_blocks_kernel<<<1, kScanThreads, 0, stream>>>(problem.out, workspace, problem.used);
  check_cuda(cudaGetLastError(), "launch the scan of compress_tile64");
  if (workspace.blocks == 0) return;
  if (problem.out.bits == kUnquantizedBits) {
    place_blocks_kernel<uint4><<<grid_blocks(workspace.blocks), kPlaceThreads, 0, stream>>>(problem.out, workspace);
  } else {
    place_blocks_kernel<std::uint32_t>
        <<<grid_blocks(workspace.blocks), kPlaceThreads, 0, stream>>>(problem.out, workspace);
  }
  check_cuda(cudaGetLastError(), "launch the placing of compress_tile64");
}

void unpack_tile64(const UnpackTile64Problem& problem) {
  const std::int64_t squares = problem.tiles.batches * problem.tiles.tiles / kTileElements;
  if (squares == 0) return;
  const DeviceGuard device(problem.out.data, "out");
  unpack_squares_kernel<<<grid_blocks(squares), kUnpackThreads, 0, static_cast<cudaStream_t>(problem.stream)>>>(
      problem);
  check_cuda(cudaGetLastError(), "launch unpack_tile64");
}

/// Synchronises the stream: the finding is read back.
Tile64Finding check_tile64(const CheckTile64Problem& problem) {
  const std::int64_t places = problem.tiles.batches * problem.tiles.offsets_stride();
  Tile64Finding finding;
  if (places == 0) return finding;
  const DeviceGuard device(problem.tiles.offsets, "offsets");
  const auto stream = static_cast<cudaStream_t>(problem.stream);
  const int blocks = std::min(grid_blocks(divide_up(places, kCheckThreads)), kMostCheckBlocks);
  const DeviceBuffer<std::int64_t> first_of_blocks(blocks, stream);
  const DeviceBuffer<Tile64Finding> result(1, stream);
  find_faults_kernel<<<blocks, kCheckThreads, 0, stream>>>(problem.tiles, places, first_of_blocks.data());
  tell_fault_kernel<<<1, kCheckThreads, 0, stream>>>(problem.tiles, places, first_of_blocks.data(), blocks,
                                                     result.data());
  check_cuda(cudaGetLastError(), "launch check_tile64");
  result.read_to(&finding);
  return finding;
}

}  // namespace kvpack::cuda
