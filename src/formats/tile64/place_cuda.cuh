// Second half of compressing: from payloads in slots of their own to one payload without gaps.
#pragma once

#include <cstdint>

#include "formats/tile64/pack_cuda.cuh"

namespace kvpack::cuda {

inline constexpr int kScanThreads = 1024;
inline constexpr int kPlaceThreads = 128;

/// Turns the sizes of blocks into where they start, and writes what is told of whole batches.
///
///   bases before   3 1 0 2 -        two batches of two blocks, 16 bits
///   bases after    0 3 4 4 6        starts 0 4, last offsets of the batches 16 8 (units of 4), used 48 halves
///
/// Launch  one block of kScanThreads
/// Work    thread i adds up its share of adjacent blocks, then writes their starts
/// Reads   bases [blocks]
/// Writes  bases [blocks + 1]; 16 bits: starts, the last offset of each batch; *used, if not null
/// Needs   nothing beyond sm_80
__global__ void __launch_bounds__(kScanThreads)
    scan_blocks_kernel(Tile64Data out, PackWorkspace workspace, std::int64_t* used) {
  __shared__ std::int64_t sums[kScanThreads];
  const std::int64_t share = divide_up(workspace.blocks, kScanThreads);
  const std::int64_t first = min(share * threadIdx.x, workspace.blocks);
  const std::int64_t end = min(first + share, workspace.blocks);
  std::int64_t sum = 0;
#pragma unroll 8
  for (std::int64_t b = first; b < end; ++b) sum += workspace.bases[b];
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned distance = 1; distance < kScanThreads; distance *= 2) {
    const std::int64_t below = threadIdx.x >= distance ? sums[threadIdx.x - distance] : 0;
    __syncthreads();
    sums[threadIdx.x] += below;
    __syncthreads();
  }
  std::int64_t base = sums[threadIdx.x] - sum;
  for (std::int64_t b = first; b < end; ++b) {
    const std::int64_t size = workspace.bases[b];
    workspace.bases[b] = base;
    base += size;
  }
  const std::int64_t total = sums[kScanThreads - 1];
  if (threadIdx.x == 0) {
    workspace.bases[workspace.blocks] = total;
    if (used != nullptr) *used = out.bits == kUnquantizedBits ? total * kUnitHalves : total;
  }
  if (out.bits != kUnquantizedBits) return;
  __syncthreads();  // bases of all threads' blocks
  for (std::int64_t batch = threadIdx.x; batch < out.batches; batch += kScanThreads) {
    const std::int64_t start = workspace.bases[batch * workspace.blocks_per_batch];
    const std::int64_t past = workspace.bases[(batch + 1) * workspace.blocks_per_batch];
    out.starts[batch] = static_cast<std::int32_t>(start * kUnitHalves / tile64_f16::kHalvesPerStart);
    out.offsets[batch * out.offsets_stride() + out.tiles] =
        static_cast<std::int32_t>((past - start) * kUnitHalves / tile64_f16::kHalvesPerOffset);
  }
}

/// Moves each block's payload from its slot to its place and lets its offsets count from the right start.
///
///   slots      | a a a . . . . . | b . . . . . . . |      payload  | a a a b |
///
/// Launch  any number of blocks of kPlaceThreads
/// Work    block i takes blocks of tokens i, i + gridDim.x, ...
/// Reads   slots, bases [blocks + 1]
/// Writes  payload, nothing past its capacity; adds to offsets
/// Needs   Unit is uint4 for 16 bits (the payload starts on 16 bytes) and uint32_t for codes: one payload unit each
template <typename Unit>
__global__ void __launch_bounds__(kPlaceThreads) place_blocks_kernel(Tile64Data out, PackWorkspace workspace) {
  constexpr bool kHasCodes = sizeof(Unit) == sizeof(std::uint32_t);
  const std::int64_t capacity = kHasCodes ? out.payload_capacity : out.payload_capacity / kUnitHalves;
  for (std::int64_t b = blockIdx.x; b < workspace.blocks; b += gridDim.x) {
    const auto [batch, block] = PackPlace(b, workspace);
    const std::int64_t base = workspace.bases[b];
    const auto* slot = reinterpret_cast<const Unit*>(workspace.slots + b * workspace.slot_bytes);
    auto* target = static_cast<Unit*>(out.payload) + base;
    const std::int64_t fitting = min(workspace.bases[b + 1], capacity) - base;
    for (std::int64_t i = threadIdx.x; i < fitting; i += kPlaceThreads) target[i] = __ldcs(slot + i);
    const std::int64_t origin = kHasCodes ? 0 : workspace.bases[batch * workspace.blocks_per_batch];
    const int added = offset_of_units(static_cast<int>(base - origin), out.bits);
    const std::int64_t first_tile = block * out.head_dim;
    std::int32_t* offsets = out.offsets + batch * out.offsets_stride() + first_tile;
    for (std::int64_t t = threadIdx.x; t < out.head_dim; t += kPlaceThreads) offsets[t] += added;
  }
}

}  // namespace kvpack::cuda
