// Compressing to tiles, unpacking and checking them on the GPU. Compressing is two kernels: pack blocks of 64 tokens into
// slots of their own, then move every block to its place. No block waits for another one.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "cuda/buffer.h"
#include "cuda/check.h"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "formats/tile64/check_cuda.cuh"
#include "formats/tile64/pack_cuda.cuh"
#include "formats/tile64/pack_halves_cuda.cuh"
#include "formats/tile64/place_cuda.cuh"
#include "formats/tile64/unpack_cuda.cuh"

namespace kvpack::cuda {

namespace {

PackWorkspace divide_workspace(const CompressTile64Problem& problem) {
  PackWorkspace workspace;
  workspace.blocks_per_batch = tile64::blocks_of(problem.out.tokens);
  workspace.blocks = problem.out.batches * workspace.blocks_per_batch;
  workspace.slot_bytes = tile64::slot_bytes(problem.out.bits, problem.out.head_dim);
  workspace.sizes = static_cast<std::int32_t*>(problem.workspace);
  const auto behind = reinterpret_cast<std::uintptr_t>(workspace.sizes + workspace.blocks);
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

/// Where the search for a threshold begins, from a normal distribution: it only decides how many steps are needed.
SearchHint search_hint(const CompressTile64Problem& problem) {
  constexpr double kMeanMagnitude = 0.7978845608;  // of a standard normal number
  const auto entries = static_cast<double>(problem.out.head_dim);
  const double kept = static_cast<double>(problem.rank_from_top) / entries;
  double low = 1e-3;
  double high = 6.0;
  for (int step = 0; step < 30; ++step) {  // the magnitude above which `kept` of all lie
    const double middle = 0.5 * (low + high);
    (std::erfc(middle * std::sqrt(0.5)) > kept ? low : high) = middle;
  }
  const double density = kMeanMagnitude * std::exp(-0.5 * low * low);
  return {static_cast<float>(low / kMeanMagnitude), static_cast<float>(1.25 / (entries * density * low))};
}

template <int kHeadDim, MmaType kType, int kFewBits>
void launch_pack_bits(const CompressTile64Problem& problem, const PackWorkspace& workspace) {
  pack_halves_kernel<kHeadDim, kType, kFewBits>
      <<<grid_blocks(workspace.blocks), kHeadDim, 0, static_cast<cudaStream_t>(problem.stream)>>>(problem, workspace,
                                                                                                  search_hint(problem));
}

template <int kHeadDim, MmaType kType>
void launch_pack_halves(const CompressTile64Problem& problem, const PackWorkspace& workspace) {
  if (problem.out.bits == 1) return launch_pack_bits<kHeadDim, kType, 1>(problem, workspace);
  if (problem.out.bits == 2) return launch_pack_bits<kHeadDim, kType, 2>(problem, workspace);
  launch_pack_bits<kHeadDim, kType, 0>(problem, workspace);
}

template <int kHeadDim>
void launch_pack_as(const CompressTile64Problem& problem, const PackWorkspace& workspace) {
  const DenseMatrices& x = problem.x;
  const std::int64_t strides = x.sequence_stride | x.head_stride | x.token_stride;  // of 8 halves each, or not
  const bool is_aligned = reinterpret_cast<std::uintptr_t>(x.data) % sizeof(uint4) == 0 && strides % kUnitHalves == 0;
  if (x.dtype == DType::kFloat32 || problem.channel_scores != nullptr || !is_aligned) {
    return launch_pack_any<kHeadDim / kWarpLanes>(problem, workspace);
  }
  if (x.dtype == DType::kFloat16) return launch_pack_halves<kHeadDim, MmaType::kHalf>(problem, workspace);
  launch_pack_halves<kHeadDim, MmaType::kBFloat16>(problem, workspace);
}

void launch_pack(const CompressTile64Problem& problem, const PackWorkspace& workspace) {
  if (problem.out.head_dim == 64) return launch_pack_as<64>(problem, workspace);
  if (problem.out.head_dim == 128) return launch_pack_as<128>(problem, workspace);
  launch_pack_as<256>(problem, workspace);
}

}  // namespace

void compress_tile64(const CompressTile64Problem& problem) {
  const DeviceGuard device(problem.workspace, "workspace");
  const auto stream = static_cast<cudaStream_t>(problem.stream);
  const PackWorkspace workspace = divide_workspace(problem);
  if (workspace.blocks == 0) {
    place_nothing_kernel<<<grid_blocks(divide_up(problem.out.batches, kPlaceThreads)), kPlaceThreads, 0, stream>>>(
        problem.out, problem.used);
    return check_cuda(cudaGetLastError(), "launch compress_tile64 of nothing");
  }
  launch_pack(problem, workspace);
  check_cuda(cudaGetLastError(), "launch the packing of compress_tile64");
  const int shares = std::min(grid_blocks(divide_up(workspace.blocks, kPlaceThreads / kWarpLanes)), kMostPlaceBlocks);
  if (problem.out.bits == kUnquantizedBits) {
    place_blocks_kernel<uint4><<<shares, kPlaceThreads, 0, stream>>>(problem.out, workspace, problem.used);
  } else {
    place_blocks_kernel<std::uint32_t><<<shares, kPlaceThreads, 0, stream>>>(problem.out, workspace, problem.used);
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
