// linear_w4a4 on the GPU: products of bytes on tensor cores (sm_80 and later), or plain sums. Whole numbers, so every order of
// summing gives the same bits.
#include "core/with_type.h"
#include "cuda/check.h"
#include "cuda/device.h"
#include "cuda/element.cuh"
#include "cuda/launch.h"
#include "cuda/mma.cuh"
#include "cuda/reduce.cuh"
#include "flatquant/int4_tiles_cuda.cuh"
#include "flatquant/rules.h"

namespace kvpack::cuda {

namespace {

constexpr int kThreads = 256;

/// One output from its sum.
template <typename T>
__device__ void write_output(const LinearW4A4Problem& problem, std::int64_t token, std::int64_t feature,
                             std::int32_t sum) {
  float value = linear_value(sum, problem.x.scales[token], problem.weight.scales[feature]);
  if (problem.bias != nullptr) value += element_value(static_cast<const T*>(problem.bias)[feature]);
  set_element(value, static_cast<T*>(problem.out)[token * problem.weight.rows + feature]);
}

/// Sums of a warp: 64 tokens x 32 features.
struct WarpSums {
  std::int32_t of[4][4][4];  // [16 tokens][8 features]
};

/// Adds the products of one pair of tiles.
[[maybe_unused]] __device__ void multiply_tiles(std::uint32_t x_tile, std::uint32_t weight_tile, int warp, int lane,
                                                WarpSums& sums) {
  const int x_row = warp % 2 * 64 + lane % 16;
  const int weight_row = warp / 2 * 32 + lane / 16 * 8 + lane % 8;
#pragma unroll
  for (int k = 0; k < kTileCodes / 32; ++k) {
    std::uint32_t b[2][4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      load_matrices(b[n], weight_tile + code_chunk_offset(weight_row + 16 * n, 2 * k + lane / 8 % 2));
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      std::uint32_t a[4];
      load_matrices(a, x_tile + code_chunk_offset(x_row + 16 * m, 2 * k + lane / 16));
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        mma_m16n8k32(sums.of[m][n], a, make_uint2(b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]));
      }
    }
  }
}

/// out = x * weight^T of int4 rows.
///   Launch    a thread block of 8 warps per 128 tokens x 128 features, features first; two pairs of tiles of shared memory
///   Work      64 codes of all rows a step: unpacked to bytes in shared memory, a warp multiplies 64 tokens x 32 features
///   Reads     x once per 128 features, weight once per 128 tokens, a step ahead
///   Writes    out once
///   Needs     nothing
template <typename T>
__global__ void __launch_bounds__(kThreads)
    linear_w4a4_kernel(LinearW4A4Problem problem, bool x_aligned, bool weight_aligned) {
#if __CUDA_ARCH__ >= 800
  __shared__ __align__(128) std::byte tiles[2][2][kTileBytes];
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpLanes;
  const int warp = thread / kWarpLanes;
  const std::int64_t across = divide_up(problem.weight.rows, kTileRows);
  const std::int64_t first_token = blockIdx.x / across * kTileRows;
  const std::int64_t first_feature = blockIdx.x % across * kTileRows;
  const int tile_row = thread / 2;
  const int half = thread % 2;
  const CodeRows x = CodeRows::of(problem.x, first_token + tile_row, x_aligned);
  const CodeRows weight = CodeRows::of(problem.weight, first_feature + tile_row, weight_aligned);
  const std::int64_t columns = problem.x.columns;

  WarpSums sums{};
  std::int64_t code = half * kPieceCodes;
  CodePiece x_piece = x.load(code);
  CodePiece weight_piece = weight.load(code);
  int parity = 0;
  for (std::int64_t first = 0; first < columns; first += kTileCodes) {
    const std::uint32_t x_tile = shared_address(tiles[parity][0]);
    const std::uint32_t weight_tile = shared_address(tiles[parity][1]);
    x.store(x_piece, x_tile, tile_row, half, x.is_packed(code));
    weight.store(weight_piece, weight_tile, tile_row, half, weight.is_packed(code));
    code += kTileCodes;
    if (first + kTileCodes < columns) {
      x_piece = x.load(code);
      weight_piece = weight.load(code);
    }
    __syncthreads();  // the tiles of the step before were read before this one's barrier, so two pairs are enough
    multiply_tiles(x_tile, weight_tile, warp, lane, sums);
    parity ^= 1;
  }
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::int64_t token = first_token + warp % 2 * 64 + 16 * m + lane / 4 + i / 2 * 8;
        const std::int64_t feature = first_feature + warp / 2 * 32 + 8 * n + lane % 4 * 2 + i % 2;
        if (token < problem.x.rows && feature < problem.weight.rows) {
          write_output<T>(problem, token, feature, sums.of[m][n][i]);
        }
      }
    }
  }
#endif  // the launch looks at the GPU first
}

/// The same without tensor cores.
///   Launch    any number of thread blocks of kThreads
///   Work      a warp per output
///   Reads     a row of x and one of weight per output, from the caches
///   Writes    out once
///   Needs     nothing
template <typename T>
__global__ void __launch_bounds__(kThreads) linear_plain_kernel(LinearW4A4Problem problem) {
  constexpr int kWarps = kThreads / kWarpLanes;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const std::int64_t features = problem.weight.rows;
  const std::int64_t columns = problem.x.columns;
  const std::int64_t step = std::int64_t{gridDim.x} * kWarps;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpLanes; i < problem.x.rows * features;
       i += step) {
    const std::int64_t token = i / features;
    const std::int64_t feature = i % features;
    const auto* x =
        static_cast<const std::byte*>(problem.x.codes) + token * row_bytes_of_codes(problem.x.form, columns);
    const auto* weight = static_cast<const std::byte*>(problem.weight.codes) +
                         feature * row_bytes_of_codes(problem.weight.form, columns);
    const int zero = problem.x.zeros == nullptr ? 0 : static_cast<int>(problem.x.zeros[token]);
    std::int32_t sum = 0;
    for (std::int64_t c = lane; c < columns; c += kWarpLanes) {
      sum += (read_code(x, c, problem.x.form, problem.x.encoding) - zero) *
             read_code(weight, c, problem.weight.form, problem.weight.encoding);
    }
    for (int distance = kWarpLanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
    if (lane == 0) write_output<T>(problem, token, feature, sum);
  }
}

bool reads_chunks(const Int4Data& rows) {
  return rows.columns % kPieceCodes == 0 && reinterpret_cast<std::uintptr_t>(rows.codes) % 16 == 0;
}

}  // namespace

void linear_w4a4_plain(const LinearW4A4Problem& problem) {
  const DeviceGuard device(problem.out, "out");
  const std::int64_t blocks = divide_up(problem.x.rows * problem.weight.rows, kThreads / kWarpLanes);
  with_float_type(problem.dtype, [&]<typename T>() {
    linear_plain_kernel<T><<<grid_blocks(blocks), kThreads, 0, static_cast<cudaStream_t>(problem.stream)>>>(problem);
    check_cuda(cudaGetLastError(), "start linear_plain_kernel");
  });
}

void linear_w4a4(const LinearW4A4Problem& problem) {
  const DeviceGuard device(problem.out, "out");
  int current = 0, major = 0;
  check_cuda(cudaGetDevice(&current), "tell the current device");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, current), "tell what a device can do");
  const std::int64_t blocks = divide_up(problem.x.rows, kTileRows) * divide_up(problem.weight.rows, kTileRows);
  if (major < 8 || blocks > INT32_MAX) return linear_w4a4_plain(problem);
  with_float_type(problem.dtype, [&]<typename T>() {
    linear_w4a4_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(problem.stream)>>>(
        problem, reads_chunks(problem.x), reads_chunks(problem.weight));
    check_cuda(cudaGetLastError(), "start linear_w4a4_kernel");
  });
}

}  // namespace kvpack::cuda
