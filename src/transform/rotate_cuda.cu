// Rotation on the GPU: plain float32 sums in the order that docs/numerics.md fixes, so that the bits equal the reference.
// Tensor cores round otherwise.
#include "core/with_type.h"
#include "cuda/buffer.h"
#include "cuda/check.h"
#include "cuda/device.h"
#include "cuda/element.cuh"
#include "cuda/launch.h"
#include "transform/implementations.h"

namespace kvpack::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kTogether = 8;  // tokens that share each matrix element on its way from the cache

/// Writes the transpose of a [dim, dim] matrix.
///
/// Launch  any number of blocks of kThreads
/// Work    a thread per element
/// Reads   matrix once, against its rows: it is small
/// Writes  transposed once
/// Needs   nothing
__global__ void __launch_bounds__(kThreads) transpose_kernel(const float* matrix, std::int64_t dim, float* transposed) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < dim * dim; i += step) {
    transposed[i] = matrix[i % dim * dim + i / dim];
  }
}

/// Multiplies heads by one matrix. A tile is kTogether tokens x as many heads as a block has threads for:
///
///   heads of 64      thread 0 ... 63  64 ... 127  128 ... 191  192 ... 255
///   tokens t ... t+7    head 0           1            2            3
///
/// Launch  any number of blocks of kThreads
/// Work    per tile: x into shared memory, then a thread per output channel, with a sum for each token
/// Reads   x once; matrix [dim, dim] rows in order, once per tile from the caches
/// Writes  out once, may be x: a tile is read before it is written
/// Needs   dim at most kMaxRotatedHead
template <typename T>
__global__ void __launch_bounds__(kThreads)
    rotate_kernel(RotateProblem problem, const float* matrix, int heads_together, std::int64_t num_tiles) {
  __shared__ float tile_x[kTogether][kMaxRotatedHead];
  const auto* x = static_cast<const T*>(problem.x);
  auto* out = static_cast<T*>(problem.out);
  const int dim = static_cast<int>(problem.head_dim);
  const std::int64_t width = static_cast<std::int64_t>(heads_together) * dim;
  const std::int64_t tiles_across = divide_up(problem.channels, width);
  for (std::int64_t tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    const std::int64_t first_channel = tile % tiles_across * width;
    const std::int64_t first_token = tile / tiles_across * kTogether;
    const int channels = static_cast<int>(min(width, problem.channels - first_channel));
    const int tokens = static_cast<int>(min(static_cast<std::int64_t>(kTogether), problem.tokens - first_token));
    for (int i = static_cast<int>(threadIdx.x); i < kTogether * channels; i += kThreads) {
      const int token = i / channels;
      const int channel = i % channels;
      const std::int64_t place =
          (first_token + token) * problem.x_token_stride + (first_channel + channel) * problem.x_channel_stride;
      tile_x[token][channel] = token < tokens ? element_value(x[place]) : 0.0f;
    }
    __syncthreads();
    for (int channel = static_cast<int>(threadIdx.x); channel < channels; channel += kThreads) {
      const int head = channel / dim * dim;
      const float* column = matrix + (channel - head);
      float sums[kTogether] = {};
      for (int i = 0; i < dim; ++i) {
        const float factor = column[static_cast<std::int64_t>(i) * dim];
        for (int t = 0; t < kTogether; ++t) sums[t] = __fmaf_rn(tile_x[t][head + i], factor, sums[t]);
      }
      for (int t = 0; t < kTogether; ++t) {
        if (t >= tokens) break;
        const std::int64_t place =
            (first_token + t) * problem.out_token_stride + (first_channel + channel) * problem.out_channel_stride;
        set_element(sums[t], out[place]);
      }
    }
    __syncthreads();  // the next tile writes tile_x
  }
}

inline constexpr int kTileRows = 64;      // heads of tokens
inline constexpr int kTileThreads = 128;  // 8 times 8 rows x 16 times 4 or 8 channels
inline constexpr int kThreadRows = 8;
inline constexpr int kThreadColumns = 16;  // threads beside each other

/// Four elements that are stored together.
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

/// Multiplies heads of kDim channels by one matrix, kTileRows heads a block, sums in registers:
///
///   thread 16 * r + c   rows r, r + 8 ... r + 56     channels 4 * c ... + 3, 64 + 4 * c ... + 3, of 128 at a time
///
/// Launch  any number of blocks of kTileThreads
/// Work    per tile: x into shared memory; each loaded element of x or of the matrix serves eight or more sums
/// Reads   x once; matrix [kDim, kDim] rows in order, once per tile from the caches
/// Writes  out once, may be x: a tile is read before it is written
/// Needs   channels side by side, all rows aligned to four elements, the matrix to 16 bytes; fewer than 2^31 channels
template <int kDim, typename T>
__global__ void __launch_bounds__(kTileThreads, kDim <= 128 ? 4 : 3)
    rotate_tiles_kernel(RotateProblem problem, const float* matrix, std::int64_t num_rows) {
  constexpr int kColumns = kDim < 128 ? kDim : 128;
  constexpr int kFours = kColumns / kThreadColumns / 4;  // runs of four channels of a thread
  extern __shared__ float tile_x[];                      // [kTileRows][kDim + 4]: rows of a warp lie in different banks
  constexpr int kPitch = kDim + 4;
  static_assert(kDim % kColumns == 0);
  const auto* x = static_cast<const T*>(problem.x);
  auto* out = static_cast<T*>(problem.out);
  const auto heads = static_cast<unsigned>(problem.channels / kDim);
  const int own_row = static_cast<int>(threadIdx.x) / kThreadColumns;
  const int own_column = static_cast<int>(threadIdx.x) % kThreadColumns * 4;
  for (std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kTileRows; first < num_rows;
       first += static_cast<std::int64_t>(gridDim.x) * kTileRows) {
    const std::int64_t first_token = first / heads;
    const int first_head = static_cast<int>(first % heads);
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < kTileRows * kDim / 4; i += kTileThreads) {
      const int r = i / (kDim / 4);
      const int channel = i % (kDim / 4) * 4;
      const unsigned head = static_cast<unsigned>(first_head + r);
      const T* source = x + (first_token + head / heads) * problem.x_token_stride + head % heads * kDim + channel;
      float4 values{};
      if (first + r < num_rows) {
        const Four<T> four = *reinterpret_cast<const Four<T>*>(source);
        values = {element_value(four.at[0]), element_value(four.at[1]), element_value(four.at[2]),
                  element_value(four.at[3])};
      }
      *reinterpret_cast<float4*>(tile_x + r * kPitch + channel) = values;
    }
    __syncthreads();
    for (int columns = 0; columns < kDim; columns += kColumns) {
      float sums[kThreadRows][kFours][4] = {};
      const float* factors = matrix + columns + own_column;
#pragma unroll 1
      for (int i = 0; i < kDim; i += 4) {
        float4 of_x[kThreadRows];
#pragma unroll
        for (int r = 0; r < kThreadRows; ++r) {
          of_x[r] = *reinterpret_cast<const float4*>(tile_x + (own_row + 8 * r) * kPitch + i);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
          for (int f = 0; f < kFours; ++f) {
            const float4 factor = *reinterpret_cast<const float4*>(factors + (i + k) * kDim + 64 * f);
#pragma unroll
            for (int r = 0; r < kThreadRows; ++r) {
              const float value = k == 0 ? of_x[r].x : k == 1 ? of_x[r].y : k == 2 ? of_x[r].z : of_x[r].w;
              sums[r][f][0] = __fmaf_rn(value, factor.x, sums[r][f][0]);
              sums[r][f][1] = __fmaf_rn(value, factor.y, sums[r][f][1]);
              sums[r][f][2] = __fmaf_rn(value, factor.z, sums[r][f][2]);
              sums[r][f][3] = __fmaf_rn(value, factor.w, sums[r][f][3]);
            }
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) {
        const std::int64_t row = first + own_row + 8 * r;
        if (row >= num_rows) break;
        const auto head = static_cast<unsigned>(first_head + own_row + 8 * r);
        T* target =
            out + (first_token + head / heads) * problem.out_token_stride + head % heads * kDim + columns + own_column;
#pragma unroll
        for (int f = 0; f < kFours; ++f) {
          Four<T> four;
          for (int k = 0; k < 4; ++k) set_element(sums[r][f][k], four.at[k]);
          *reinterpret_cast<Four<T>*>(target + 64 * f) = four;
        }
      }
    }
    __syncthreads();  // the next tile writes tile_x
  }
}

template <int kDim, typename T>
void launch_rotate_tiles(const RotateProblem& problem, const float* matrix, cudaStream_t stream) {
  constexpr int kBytes = kTileRows * (kDim + 4) * static_cast<int>(sizeof(float));
  if constexpr (kBytes > 48 * 1024) {
    check_cuda(cudaFuncSetAttribute(rotate_tiles_kernel<kDim, T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
               "make room for the tiles of rotate");
  }
  const std::int64_t rows = problem.tokens * (problem.channels / kDim);
  rotate_tiles_kernel<kDim, T>
      <<<grid_blocks(divide_up(rows, kTileRows)), kTileThreads, kBytes, stream>>>(problem, matrix, rows);
}

/// Whether rotate_tiles_kernel takes a problem.
template <typename T>
bool suits_tiles(const RotateProblem& problem, const float* matrix) {
  const auto is_aligned = [](const void* memory, std::int64_t token_stride) {
    return reinterpret_cast<std::uintptr_t>(memory) % (4 * sizeof(T)) == 0 && token_stride % 4 == 0;
  };
  const std::int64_t dim = problem.head_dim;
  return (dim == 64 || dim == 128 || dim == 256) && problem.channels < (std::int64_t{1} << 31) - dim * kTileRows &&
         problem.x_channel_stride == 1 && problem.out_channel_stride == 1 &&
         is_aligned(problem.x, problem.x_token_stride) && is_aligned(problem.out, problem.out_token_stride) &&
         reinterpret_cast<std::uintptr_t>(matrix) % 16 == 0;
}

}  // namespace

void rotate(const RotateProblem& problem) {
  const DeviceGuard device(problem.x, "x");
  const auto stream = static_cast<cudaStream_t>(problem.stream);
  const std::int64_t dim = problem.head_dim;
  const bool is_inverse = problem.direction == Direction::kInverse;
  DeviceBuffer<float> transposed(is_inverse ? dim * dim : 1, stream);
  if (is_inverse) {
    transpose_kernel<<<grid_blocks(divide_up(dim * dim, kThreads)), kThreads, 0, stream>>>(problem.rotation, dim,
                                                                                           transposed.data());
    check_cuda(cudaGetLastError(), "launch the transposition of rotate");
  }
  const float* matrix = is_inverse ? transposed.data() : problem.rotation;
  const std::int64_t heads = problem.channels / dim;
  const int heads_together = static_cast<int>(std::clamp<std::int64_t>(kThreads / dim, 1, heads));
  const std::int64_t tiles = divide_up(heads, heads_together) * divide_up(problem.tokens, kTogether);
  with_float_type(problem.dtype, [&]<typename T>() {
    if (!suits_tiles<T>(problem, matrix)) {
      rotate_kernel<T><<<grid_blocks(tiles), kThreads, 0, stream>>>(problem, matrix, heads_together, tiles);
    } else if (dim == 64) {
      launch_rotate_tiles<64, T>(problem, matrix, stream);
    } else if (dim == 128) {
      launch_rotate_tiles<128, T>(problem, matrix, stream);
    } else {
      launch_rotate_tiles<256, T>(problem, matrix, stream);
    }
    check_cuda(cudaGetLastError(), "launch rotate");
  });
}

}  // namespace kvpack::cuda
