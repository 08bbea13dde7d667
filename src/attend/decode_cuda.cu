// CUDA side of attention on tiles: which kernels run, on how many thread blocks, with which memory.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "attend/combine_cuda.cuh"
#include "attend/implementations.h"
#include "attend/keys_cuda.cuh"
#include "attend/values_cuda.cuh"
#include "attend/workspace.h"
#include "core/divide_up.h"
#include "cuda/device.h"
#include "formats/tile64/tiles.h"

namespace kvpack::cuda {

namespace {

/// The entry has refused everything but the two 16-bit types.
MmaType mma_type(DType dtype) { return dtype == DType::kBFloat16 ? MmaType::kBFloat16 : MmaType::kHalf; }

const char* half_name(DType dtype) { return dtype == DType::kBFloat16 ? "bfloat16" : "float16"; }

/// 16-bit survivors go to the tensor cores as they are, so both sides must be of one type; they are read 16 bytes at a time.
void require_payload(const Tile64Data& tiles, DType dtype) {
  if (tiles.bits != kUnquantizedBits) return;
  require(reinterpret_cast<std::uintptr_t>(tiles.payload) % 16 == 0, "the payload is at ",
          static_cast<const void*>(tiles.payload), "; a GPU reads 16-bit tiles from addresses that 16 divides");
  if (tiles.payload_type == dtype) return;
  throw Unsupported(text("tiles hold ", half_name(tiles.payload_type), " but the query is ", half_name(dtype),
                         "; on a GPU both must be the same"));
}

/// A grid's second extent is 65535 at most, and it counts batches times 64 channels.
void require_grid(const Tile64Data& tiles) {
  constexpr std::int64_t kMostUnits = 65535;
  const std::int64_t units = tiles.batches * (tiles.head_dim / kTileElements);
  if (units <= kMostUnits) return;
  throw Unsupported(text(tiles.batches, " batches of head_dim ", tiles.head_dim, " are ", units,
                         " pieces of 64 channels; one call takes ", kMostUnits, " at most, so split the batch"));
}

/// How the blocks of 64 tokens are dealt to thread blocks.
struct Splits {
  std::int32_t count = 0;
  std::int32_t block_stride = 0;
};

/// Picks the number of splits whose thread blocks fill the GPU's waves best; `units` thread blocks exist per split. The
/// result depends on shapes and the GPU alone.
Splits choose_splits(std::int64_t units, std::int64_t blocks, std::int64_t resident, std::int64_t most) {
  // A warp of a split should have a few blocks to stream; fewer splits mean less to combine.
  const std::int64_t useful = std::clamp<std::int64_t>(blocks / kAttendWarps, 1, most);
  std::int64_t best = 1;
  double best_cost = INFINITY;
  for (std::int64_t count = 1; count <= useful; ++count) {
    const std::int64_t waves = divide_up(units * count, resident);
    const std::int64_t blocks_of_warp = divide_up(blocks, count * kAttendWarps);
    const double cost = static_cast<double>(waves * blocks_of_warp) + 0.02 * static_cast<double>(count);
    if (cost < best_cost) {
      best_cost = cost;
      best = count;
    }
  }
  const std::int64_t stride = divide_up(blocks, best);
  return {static_cast<std::int32_t>(divide_up(blocks, stride)), static_cast<std::int32_t>(stride)};
}

/// Thread blocks of a kernel that the current GPU holds at a time; allows the kernel its shared memory.
template <typename Params>
std::int64_t resident_blocks(void (*kernel)(Params), int shared_bytes) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
             "give a kernel its shared memory");
  int device = 0, multiprocessors = 0, blocks = 0;
  check_cuda(cudaGetDevice(&device), "tell the current device");
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "count multiprocessors");
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kAttendThreads, shared_bytes),
             "tell how many thread blocks fit");
  return std::max<std::int64_t>(1, static_cast<std::int64_t>(blocks) * multiprocessors);
}

template <int kBits, int kTiles>
void launch_keys_as(KeysParams params, cudaStream_t stream) {
  const auto kernel = multiply_keys_kernel<kBits, kTiles>;
  const auto head_dim = static_cast<int>(params.tiles.head_dim);
  const int shared = stream_memory_bytes<kBits>() + head_dim / 16 * kTiles * 256;
  const std::int64_t chunks = divide_up(params.columns, kTiles * kColumnsOfMma);
  const Splits splits = choose_splits(params.tiles.batches * chunks, params.blocks, resident_blocks(kernel, shared),
                                      std::min<std::int64_t>(params.blocks, 1 << 16));
  params.block_stride = splits.block_stride;
  const dim3 grid(static_cast<unsigned>(splits.count), static_cast<unsigned>(params.tiles.batches),
                  static_cast<unsigned>(chunks));
  kernel<<<grid, kAttendThreads, shared, stream>>>(params);
  check_cuda(cudaGetLastError(), "start multiply_keys_kernel");
}

/// Starts the values kernel; returns the splits it writes.
template <int kBits, int kTiles>
std::int32_t launch_values_as(ValuesParams params, cudaStream_t stream) {
  const auto kernel = multiply_values_kernel<kBits, kTiles>;
  constexpr int kShared = stream_memory_bytes<kBits>();
  const std::int64_t chunks = divide_up(params.columns, kTiles * kColumnsOfMma);
  const std::int64_t units = params.tiles.batches * (params.tiles.head_dim / kTileElements);
  const Splits splits =
      choose_splits(units * chunks, params.blocks, resident_blocks(kernel, kShared), most_splits(units));
  params.block_stride = splits.block_stride;
  const dim3 grid(static_cast<unsigned>(splits.count), static_cast<unsigned>(units), static_cast<unsigned>(chunks));
  kernel<<<grid, kAttendThreads, kShared, stream>>>(params);
  check_cuda(cudaGetLastError(), "start multiply_values_kernel");
  return splits.count;
}

/// Calls body.operator()<kBits, kTiles>() for the tiles' bits and one or two groups of 8 columns.
template <typename Body>
auto with_bits(std::int32_t bits, std::int32_t columns, Body body) {
  const auto with_tiles = [&]<int kBits>() {
    return columns <= kColumnsOfMma ? body.template operator()<kBits, 1>() : body.template operator()<kBits, 2>();
  };
  switch (bits) {
    case 1:
      return with_tiles.template operator()<1>();
    case 2:
      return with_tiles.template operator()<2>();
    case 4:
      return with_tiles.template operator()<4>();
    case 8:
      return with_tiles.template operator()<8>();
    case kUnquantizedBits:
      return with_tiles.template operator()<kUnquantizedBits>();
    default:
      throw InternalError(text("tiles of ", bits, " bits reached the GPU"));
  }
}

void launch_keys(const KeysParams& params, cudaStream_t stream) {
  with_bits(params.tiles.bits, params.columns,
            [&]<int kBits, int kTiles>() { launch_keys_as<kBits, kTiles>(params, stream); });
}

std::int32_t launch_values(const ValuesParams& params, cudaStream_t stream) {
  return with_bits(params.tiles.bits, params.columns,
                   [&]<int kBits, int kTiles>() { return launch_values_as<kBits, kTiles>(params, stream); });
}

void launch_combine(const CombineParams& params, std::int64_t batches, DType dtype, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(params.columns), static_cast<unsigned>(batches));
  if (dtype == DType::kFloat16) {
    combine_splits_kernel<Half><<<grid, kCombineThreads, 0, stream>>>(params);
  } else {
    combine_splits_kernel<BFloat16><<<grid, kCombineThreads, 0, stream>>>(params);
  }
  check_cuda(cudaGetLastError(), "start combine_splits_kernel");
}

/// Folds the step to units of log2 into the factors: log2(e) * cap * tanh(scale/cap * score), or log2(e)*scale * score.
void set_scale(KeysParams& params, float scale, float softcap) {
  params.scale = softcap > 0.0f ? scale : scale * kLog2E;
  params.softcap = softcap * kLog2E;
  params.softcap_inverse = softcap > 0.0f ? 1.0f / softcap : 0.0f;
}

/// Views of the working memory.
struct WorkspaceParts {
  float* logits;
  float* sums;
  float2* maxima;
};

WorkspaceParts parts_of(void* workspace, const Tile64Data& tiles, std::int64_t columns) {
  const AttendWorkspace sizes = attend_workspace(tiles.batches, columns, tiles.tokens, tiles.head_dim);
  auto* bytes = static_cast<std::byte*>(workspace);
  return {reinterpret_cast<float*>(bytes), reinterpret_cast<float*>(bytes + sizes.logits_bytes),
          reinterpret_cast<float2*>(bytes + sizes.logits_bytes + sizes.sums_bytes)};
}

}  // namespace

void multiply_tile64(const MultiplyTile64Problem& problem) {
  const Tile64Data& tiles = problem.tiles;
  const MmaType type = mma_type(problem.dtype);
  require_payload(tiles, problem.dtype);
  const auto columns = static_cast<std::int32_t>(problem.group * problem.rows);
  if (tiles.batches == 0 || columns == 0) return;
  require_grid(tiles);
  const DeviceGuard guard(problem.out, "out");
  const auto stream = static_cast<cudaStream_t>(problem.stream);
  if (tiles.kind == CacheKind::kKey) {
    if (tiles.tokens == 0) return;
    KeysParams params;
    params.tiles = tiles;
    params.q = static_cast<const std::uint16_t*>(problem.x);
    params.out = static_cast<std::uint16_t*>(problem.out);
    params.type = type;
    params.columns = columns;
    params.blocks = static_cast<std::int32_t>(tile64::blocks_of(tiles.tokens));
    launch_keys(params, stream);
    return;
  }
  const WorkspaceParts parts = parts_of(problem.workspace, tiles, columns);
  CombineParams combine;
  if (tiles.tokens > 0) {
    ValuesParams params;
    params.tiles = tiles;
    params.weights = static_cast<const std::uint16_t*>(problem.x);
    params.sums = parts.sums;
    params.type = type;
    params.columns = columns;
    params.blocks = static_cast<std::int32_t>(tile64::blocks_of(tiles.tokens));
    combine.splits = launch_values(params, stream);
  }
  combine.sums = parts.sums;
  combine.out = problem.out;
  combine.columns = columns;
  combine.head_dim = static_cast<std::int32_t>(tiles.head_dim);
  launch_combine(combine, tiles.batches, problem.dtype, stream);
}

void attend_tile64(const AttendTile64Problem& problem) {
  const MmaType type = mma_type(problem.dtype);
  require_payload(problem.keys, problem.dtype);
  require_payload(problem.values, problem.dtype);
  const auto columns = static_cast<std::int32_t>(problem.group * problem.rows);
  if (problem.keys.batches == 0 || columns == 0) return;
  require_grid(problem.keys);
  const DeviceGuard guard(problem.out, "out");
  const auto stream = static_cast<cudaStream_t>(problem.stream);
  const WorkspaceParts parts = parts_of(problem.workspace, problem.keys, columns);
  CombineParams combine;
  if (problem.keys.tokens > 0) {
    KeysParams keys;
    keys.tiles = problem.keys;
    keys.q = static_cast<const std::uint16_t*>(problem.q);
    keys.logits = parts.logits;
    keys.output = ScoreOutput::kLogits;
    keys.type = type;
    keys.columns = columns;
    keys.blocks = static_cast<std::int32_t>(tile64::blocks_of(problem.keys.tokens));
    set_scale(keys, problem.scale, problem.softcap);
    launch_keys(keys, stream);
    ValuesParams values;
    values.tiles = problem.values;
    values.logits = parts.logits;
    values.sums = parts.sums;
    values.maxima = parts.maxima;
    values.input = WeightInput::kLogits;
    values.type = type;
    values.columns = columns;
    values.blocks = keys.blocks;
    combine.splits = launch_values(values, stream);
  }
  combine.sums = parts.sums;
  combine.maxima = parts.maxima;
  combine.out = problem.out;
  combine.lse = problem.lse;
  combine.q = problem.q;
  combine.recent_keys = problem.recent_keys;
  combine.recent_values = problem.recent_values;
  combine.columns = columns;
  combine.head_dim = static_cast<std::int32_t>(problem.keys.head_dim);
  combine.rows = static_cast<std::int32_t>(problem.rows);
  combine.recent_tokens = problem.recent_tokens;
  combine.masking = problem.masking;
  combine.scale = problem.scale;
  combine.softcap = problem.softcap;
  launch_combine(combine, problem.keys.batches, problem.dtype, stream);
}

}  // namespace kvpack::cuda
