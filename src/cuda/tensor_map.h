// What the copy engine must know of a tensor in global memory (Hopper's bulk tensor copies), made on the host.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/check.h"

namespace kvpack::cuda {

/// Rows of 16-bit numbers of many matrices: [matrices, rows, columns], columns adjacent.
struct MatricesInMemory {
  const void* data = nullptr;  // aligned to 16 bytes
  std::int64_t matrices = 0;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  std::int64_t row_stride = 0;  // elements, multiples of 8
  std::int64_t matrix_stride = 0;
};

/// A map for boxes of 64 columns, `box_rows` rows and `box_matrices` matrices, in shared memory rows of 128 bytes whose 16-byte
/// chunks are XORed with the row; what lies outside of a matrix is filled with zeros. Returns false where the copy engine cannot
/// take such a tensor.
inline bool make_tensor_map(CUtensorMap& map, const MatricesInMemory& tensor, std::uint32_t box_rows,
                            std::uint32_t box_matrices) {
  // Asked of the runtime, so that the library needs no libcuda to be loaded.
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
               "find cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  if (encode == nullptr) return false;
  constexpr std::uint32_t kBoxColumns = 64;
  constexpr std::int64_t kBytes = 2;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(tensor.columns), static_cast<cuuint64_t>(tensor.rows),
                               static_cast<cuuint64_t>(tensor.matrices)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(tensor.row_stride * kBytes),
                                 static_cast<cuuint64_t>(tensor.matrix_stride * kBytes)};
  const cuuint32_t box[3] = {kBoxColumns, box_rows, box_matrices};
  const cuuint32_t element_strides[3] = {1, 1, 1};
  return encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(tensor.data), sizes, strides, box,
                element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace kvpack::cuda
