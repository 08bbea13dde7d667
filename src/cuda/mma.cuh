// Tensor-core products of one warp and the loads that feed them, as thin wrappers over PTX (sm_80 and later). Products for older
// GPUs are a trap: the registry (dispatch/cuda_registry.cu) starts no such kernel there.
//
//   mma_m16n8k16: D[16 x 8] += A[16 x 16] * B[16 x 8]; lane = 4*g + i holds
//     A  {(g, 2i..2i+1), (g+8, 2i..), (g, 2i+8..), (g+8, 2i+8..)}   four registers of two 16-bit numbers along k
//     B  {(2i..2i+1, g), (2i+8.., g)}                                two registers, along k
//     D  {(g, 2i), (g, 2i+1), (g+8, 2i), (g+8, 2i+1)}               four float32
//   mma_m16n8k32: the same of bytes, twice as many along k: four bytes a register, D int32
#pragma once

#include <cstdint>

namespace kvpack::cuda {

/// Which 16-bit type the bits of A and B are.
enum class MmaType : std::int32_t { kHalf, kBFloat16 };

__device__ inline void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], uint2 b, MmaType type) {
#if __CUDA_ARCH__ >= 800
  if (type == MmaType::kHalf) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
  }
#else
  __trap();
#endif
}

/// Signed bytes; sums wrap around.
__device__ inline void mma_m16n8k32(std::int32_t (&d)[4], const std::uint32_t (&a)[4], uint2 b) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
#else
  __trap();
#endif
}

/// The address that shared-memory instructions want.
__device__ inline std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

/// Four 8x8 matrices of 16-bit numbers (or 8x16 of bytes): lanes 8*j .. 8*j+7 give the row addresses of matrix j, which
/// becomes register j.
__device__ inline void load_matrices(std::uint32_t (&a)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(address)
               : "memory");
}

/// Four 8x8 matrices of 16-bit numbers, transposed: lanes 8*j .. 8*j+7 give the row addresses of matrix j.
__device__ inline void load_matrices_transposed(std::uint32_t (&a)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(address)
               : "memory");
}

}  // namespace kvpack::cuda
