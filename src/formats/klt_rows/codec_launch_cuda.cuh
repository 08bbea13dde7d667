// Launches of codec_cuda.cuh, pack_cuda.cuh and expand_cuda.cuh: how many threads take a token, and how many tokens a block.
#pragma once

#include <algorithm>

#include "core/divide_up.h"
#include "cuda/check.h"
#include "cuda/device.h"
#include "formats/klt_rows/expand_cuda.cuh"
#include "formats/klt_rows/pack_cuda.cuh"

namespace kvpack::cuda {

namespace rows {

/// Up to so many tokens each gets a block of its own: two for each multiprocessor of the largest GPUs.
inline constexpr std::int64_t kFewRows = 264;

/// How threads of the codec share tokens out: with many tokens a warp takes several, for which coefficients and boundaries are
/// read once; with few a block takes one.
enum class Sharing : std::int32_t { kSeveralAWarp, kOneAWarp, kOneABlock };
inline constexpr int kWarpTokens = 4;

/// `token_bytes` of shared memory for a token beside those for all: of the 48 KB that need no permission.
inline Sharing choose_sharing(std::int64_t num_rows, std::int64_t token_bytes, std::int64_t all_bytes) {
  constexpr std::int64_t kMostBytes = 48 << 10;
  constexpr std::int64_t kManyRows = 12288;  // enough warps of kWarpTokens for all multiprocessors of the largest GPUs
  if (num_rows <= kFewRows || kWarps * token_bytes + all_bytes > kMostBytes) return Sharing::kOneABlock;
  const bool fits = kWarps * kWarpTokens * token_bytes + all_bytes <= kMostBytes;
  return num_rows >= kManyRows && fits ? Sharing::kSeveralAWarp : Sharing::kOneAWarp;
}

/// Calls launch<tokens of a team, threads of a team>(blocks, tokens of a block).
template <typename Launch>
void with_sharing(Sharing sharing, std::int64_t num_rows, std::int64_t most_blocks, Launch&& launch) {
  const auto call = [&]<int kTokens, int kTeam>() {
    constexpr int kBlockTokens = Team<kTeam>::kTeams * kTokens;
    const auto blocks =
        static_cast<int>(std::min<std::int64_t>(grid_blocks(divide_up(num_rows, kBlockTokens)), most_blocks));
    launch.template operator()<kTokens, kTeam>(blocks, kBlockTokens);
    check_cuda(cudaGetLastError(), "launch the codec of transform-coded rows");
  };
  switch (sharing) {
    case Sharing::kSeveralAWarp:
      return call.template operator()<kWarpTokens, kWarpLanes>();
    case Sharing::kOneAWarp:
      return call.template operator()<1, kWarpLanes>();
    case Sharing::kOneABlock:
      return call.template operator()<1, kThreads>();
  }
}

inline constexpr std::int64_t kAnyBlocks = std::int64_t{1} << 30;

/// Whether pack_tiles_kernel takes a call: enough rows, and a multiprocessor holds a tile of them.
inline bool packs_tiles(std::int64_t num_rows, std::int64_t pitch) {
  return num_rows > kFewRows && tile_bytes(pitch) <= device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

/// Launches pack_tiles_kernel.
inline void launch_pack_tiles(const Parts& parts, cudaStream_t stream) {
  const auto bytes = static_cast<int>(tile_bytes(parts.pitch));
  check_cuda(cudaFuncSetAttribute(pack_tiles_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
             "reserve shared memory for the packing of transform-coded rows");
  const int blocks = grid_blocks(divide_up(parts.num_rows, kTileTokens));
  pack_tiles_kernel<<<blocks, kTileThreads, static_cast<unsigned>(bytes), stream>>>(parts);
  check_cuda(cudaGetLastError(), "launch the packing of transform-coded rows");
}

inline void launch_pack(const Parts& parts, cudaStream_t stream) {
  if (parts.plan.layout.coded == 0) return;  // no bytes
  if (parts.num_rows > kFewRows && parts.tiles.units != nullptr) return launch_pack_tiles(parts, stream);
  const std::int32_t token_bytes = packing_bytes(parts.plan);
  with_sharing(choose_sharing(parts.num_rows, token_bytes, 0), parts.num_rows, kAnyBlocks,
               [&]<int kTokens, int kTeam>(int blocks, int block_tokens) {
                 pack_kernel<kTokens, kTeam><<<blocks, kThreads, block_tokens * token_bytes, stream>>>(parts);
               });
}

inline void launch_quantize(const Parts& parts, cudaStream_t stream) {
  with_sharing(choose_sharing(parts.num_rows, 0, 0), parts.num_rows, kAnyBlocks,
               [&]<int kTokens, int kTeam>(int blocks, int) {
                 quantize_kernel<kTokens, kTeam><<<blocks, kThreads, 0, stream>>>(parts);
               });
}

inline void launch_expand(const Parts& parts, cudaStream_t stream) {
  constexpr std::int32_t kMostSharedCentroids = 8192;  // 32 KB: several blocks still fit on a multiprocessor
  // A block fills its shared memory once, so few blocks with many rows each are enough.
  constexpr int kMostBlocks = 132 * 6;  // six for each multiprocessor of the largest GPUs
  const std::int32_t token_bytes = 4 * (row_words(parts.plan) + 1);
  const auto centroid_bytes = static_cast<std::int32_t>(4 * round_up(parts.plan.centroids, 4));
  const bool fit = parts.plan.centroids <= kMostSharedCentroids;
  const Sharing sharing = choose_sharing(parts.num_rows, token_bytes, fit ? centroid_bytes : 0);
  const bool shares = fit && sharing != Sharing::kOneABlock;  // few tokens would not use most centroids
  with_sharing(sharing, parts.num_rows, shares ? kMostBlocks : kAnyBlocks,
               [&]<int kTokens, int kTeam>(int blocks, int block_tokens) {
                 const int bytes = block_tokens * token_bytes;
                 if constexpr (kTeam == kWarpLanes) {
                   if (shares) {
                     expand_kernel<kTokens, kTeam, true><<<blocks, kThreads, centroid_bytes + bytes, stream>>>(parts);
                     return;
                   }
                 }
                 expand_kernel<kTokens, kTeam, false><<<blocks, kThreads, bytes, stream>>>(parts);
               });
}

}  // namespace rows

}  // namespace kvpack::cuda
