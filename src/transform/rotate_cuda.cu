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
    rotate_kernel<T><<<grid_blocks(tiles), kThreads, 0, stream>>>(problem, matrix, heads_together, tiles);
    check_cuda(cudaGetLastError(), "launch rotate");
  });
}

}  // namespace kvpack::cuda
