// Products of a warpgroup (four warps) on Hopper's tensor cores, as thin wrappers over PTX. Code for other GPUs holds a trap:
// whoever launches such a kernel looks at the GPU first.
//
//   D[64 x 64] += A[64 x 16] * B[16 x 64]; warp w of the group holds rows 16*w .. 16*w+15 of A and D as in mma.cuh, D for eight
//   groups of 8 columns. B lies in shared memory, row k (of A's columns) by row, 64 numbers in 128 bytes:
//     number (k, n) at 128*k + 16*((n / 8) ^ (k % 8)) + 2*(n % 8), the tile at a multiple of 1024
#pragma once

#include <cstdint>

#include "cuda/mma.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define KVPACK_HAS_WGMMA 1
#else
#define KVPACK_HAS_WGMMA 0
#endif

namespace kvpack::cuda {

/// What the tensor cores want to know of a B tile at a shared address: 16-byte units; 8 rows further lie 1024 bytes further;
/// 128-byte swizzle. A tile of 64 columns has no second block of columns, so the other stride is never used.
__device__ inline std::uint64_t wgmma_tile(std::uint32_t address) {
  constexpr std::uint64_t kEightRows = 1024 / 16;
  constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62;
  return kSwizzle128 | kEightRows << 32 | kEightRows << 16 | (address & 0x3ffffu) >> 4;
}

/// The tile that lies `bytes` behind another one, a multiple of 1024.
__device__ inline std::uint64_t wgmma_tile_behind(std::uint64_t tile, int bytes) {
  return tile + static_cast<std::uint64_t>(bytes / 16);
}

/// Orders this warpgroup's registers and what its threads wrote to shared memory before the products that follow.
__device__ inline void wgmma_begin() {
#if KVPACK_HAS_WGMMA
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

/// Waits for all products that this warpgroup began.
__device__ inline void wgmma_end() {
#if KVPACK_HAS_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
}

/// Makes shared memory that this thread wrote visible to the tensor cores; a barrier must follow.
__device__ inline void show_shared_to_wgmma() {
#if KVPACK_HAS_WGMMA
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/// Tells the compiler that registers change here, so that it moves no reads of them across.
__device__ inline void hold_registers(float (*d)[4]) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[n][i])::"memory");
  }
}

#define KVPACK_WGMMA_M64N64K16(type)                                                                                 \
  asm volatile(                                                                                                      \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                                                   \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                                    \
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28," \
      "%29,%30,%31}, {%32,%33,%34,%35}, %36, p, 1, 1, 1;\n}\n"                                                       \
      : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]),     \
        "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]),     \
        "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]),     \
        "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]),     \
        "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3])                                                   \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds))

/// Begins D (+)= A * B; without `adds` D is written, not added to.
template <MmaType kType>
__device__ inline void wgmma_m64n64k16(float (*d)[4], const std::uint32_t (&a)[4], std::uint64_t b, int adds) {
#if KVPACK_HAS_WGMMA
  if constexpr (kType == MmaType::kHalf) {
    KVPACK_WGMMA_M64N64K16("f16");
  } else {
    KVPACK_WGMMA_M64N64K16("bf16");
  }
#else
  __trap();
#endif
}

#undef KVPACK_WGMMA_M64N64K16

}  // namespace kvpack::cuda
