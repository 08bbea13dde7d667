// Products of a warpgroup (four warps) on Hopper's tensor cores, as thin wrappers over PTX. Code for other GPUs holds a trap:
// whoever launches such a kernel looks at the GPU first.
//
//   D[64 x N] += A[64 x 16] * B[16 x N]; warp w of the group holds rows 16*w .. 16*w+15 of A and D as in mma.cuh, D for N / 8
//   groups of 8 columns. B lies in shared memory in blocks of 64 columns, row k (of A's columns) by row, 64 numbers in 128 bytes:
//     number (k, n) of a block at 128*k + 16*((n / 8) ^ (k % 8)) + 2*(n % 8), the block at a multiple of 1024
#pragma once

#include <cstdint>

#include "cuda/mma.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define KVPACK_HAS_WGMMA 1
#else
#define KVPACK_HAS_WGMMA 0
#endif

namespace kvpack::cuda {

/// What the tensor cores want to know of a B tile at a shared address: 16-byte units; 8 rows further lie 1024 bytes further, the
/// next 64 columns `block_bytes` further (never used by a tile of 64 columns); 128-byte swizzle.
__device__ inline std::uint64_t wgmma_tile(std::uint32_t address, int block_bytes) {
  constexpr std::uint64_t kEightRows = 1024 / 16;
  constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62;
  return kSwizzle128 | kEightRows << 32 | static_cast<std::uint64_t>(block_bytes / 16) << 16 |
         (address & 0x3ffffu) >> 4;
}

/// The tile that lies `bytes` behind another one: a multiple of 16, of 1024 in the layout above.
__device__ inline std::uint64_t wgmma_tile_behind(std::uint64_t tile, int bytes) {
  return tile + static_cast<std::uint64_t>(bytes / 16);
}

/// Orders this warpgroup's registers and what its threads wrote to shared memory before the products that follow.
__device__ inline void wgmma_begin() {
#if KVPACK_HAS_WGMMA
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

/// Ends a batch of products.
__device__ inline void wgmma_commit() {
#if KVPACK_HAS_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

/// Waits until at most kPending of this warpgroup's batches run.
template <int kPending>
__device__ inline void wgmma_wait() {
#if KVPACK_HAS_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

/// Makes shared memory that this thread wrote visible to the tensor cores; a barrier must follow.
__device__ inline void show_shared_to_wgmma() {
#if KVPACK_HAS_WGMMA
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/// Tells the compiler that registers change here, so that it moves no reads of them across.
template <int kTiles>
__device__ inline void hold_numbers(float (*d)[4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[n][i])::"memory");
  }
}

// Eight registers of D: their numbers in the text, and the operands of two groups of 8 columns.
#define KVPACK_D0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define KVPACK_D1 "%8,%9,%10,%11,%12,%13,%14,%15"
#define KVPACK_D2 "%16,%17,%18,%19,%20,%21,%22,%23"
#define KVPACK_D3 "%24,%25,%26,%27,%28,%29,%30,%31"
#define KVPACK_D4 "%32,%33,%34,%35,%36,%37,%38,%39"
#define KVPACK_D5 "%40,%41,%42,%43,%44,%45,%46,%47"
#define KVPACK_D6 "%48,%49,%50,%51,%52,%53,%54,%55"
#define KVPACK_D7 "%56,%57,%58,%59,%60,%61,%62,%63"
#define KVPACK_D8 "%64,%65,%66,%67,%68,%69,%70,%71"
#define KVPACK_D9 "%72,%73,%74,%75,%76,%77,%78,%79"
#define KVPACK_D10 "%80,%81,%82,%83,%84,%85,%86,%87"
#define KVPACK_D11 "%88,%89,%90,%91,%92,%93,%94,%95"
#define KVPACK_D12 "%96,%97,%98,%99,%100,%101,%102,%103"
#define KVPACK_D13 "%104,%105,%106,%107,%108,%109,%110,%111"
#define KVPACK_LIST1 KVPACK_D0
#define KVPACK_LIST2 KVPACK_LIST1 "," KVPACK_D1
#define KVPACK_LIST3 KVPACK_LIST2 "," KVPACK_D2
#define KVPACK_LIST4 KVPACK_LIST3 "," KVPACK_D3
#define KVPACK_LIST5 KVPACK_LIST4 "," KVPACK_D4
#define KVPACK_LIST6 KVPACK_LIST5 "," KVPACK_D5
#define KVPACK_LIST7 KVPACK_LIST6 "," KVPACK_D6
#define KVPACK_LIST8 KVPACK_LIST7 "," KVPACK_D7
#define KVPACK_LIST9 KVPACK_LIST8 "," KVPACK_D8
#define KVPACK_LIST10 KVPACK_LIST9 "," KVPACK_D9
#define KVPACK_LIST11 KVPACK_LIST10 "," KVPACK_D10
#define KVPACK_LIST12 KVPACK_LIST11 "," KVPACK_D11
#define KVPACK_LIST13 KVPACK_LIST12 "," KVPACK_D12
#define KVPACK_LIST14 KVPACK_LIST13 "," KVPACK_D13
#define KVPACK_PAIR(t)                                                                                                 \
  "+f"(d[t][0]), "+f"(d[t][1]), "+f"(d[t][2]), "+f"(d[t][3]), "+f"(d[t + 1][0]), "+f"(d[t + 1][1]), "+f"(d[t + 1][2]), \
      "+f"(d[t + 1][3])
#define KVPACK_PAIRS1 KVPACK_PAIR(0)
#define KVPACK_PAIRS2 KVPACK_PAIRS1, KVPACK_PAIR(2)
#define KVPACK_PAIRS3 KVPACK_PAIRS2, KVPACK_PAIR(4)
#define KVPACK_PAIRS4 KVPACK_PAIRS3, KVPACK_PAIR(6)
#define KVPACK_PAIRS5 KVPACK_PAIRS4, KVPACK_PAIR(8)
#define KVPACK_PAIRS6 KVPACK_PAIRS5, KVPACK_PAIR(10)
#define KVPACK_PAIRS7 KVPACK_PAIRS6, KVPACK_PAIR(12)
#define KVPACK_PAIRS8 KVPACK_PAIRS7, KVPACK_PAIR(14)
#define KVPACK_PAIRS9 KVPACK_PAIRS8, KVPACK_PAIR(16)
#define KVPACK_PAIRS10 KVPACK_PAIRS9, KVPACK_PAIR(18)
#define KVPACK_PAIRS11 KVPACK_PAIRS10, KVPACK_PAIR(20)
#define KVPACK_PAIRS12 KVPACK_PAIRS11, KVPACK_PAIR(22)
#define KVPACK_PAIRS13 KVPACK_PAIRS12, KVPACK_PAIR(24)
#define KVPACK_PAIRS14 KVPACK_PAIRS13, KVPACK_PAIR(26)

// a: the number of the first operand behind D.
#define KVPACK_WGMMA(type, n, pairs, a_0, a_1, a_2, a_3, at_b, at_p)                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #at_p                                              \
               ", 0;\n"                                                                                \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" KVPACK_LIST##pairs \
               "}, {%" #a_0 ",%" #a_1 ",%" #a_2 ",%" #a_3 "}, %" #at_b ", p, 1, 1, 1;\n}\n"            \
               : KVPACK_PAIRS##pairs                                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds))

#define KVPACK_WGMMA_OF(type)                                                             \
  if constexpr (kTiles == 4) {                                                            \
    KVPACK_WGMMA(type, 32, 2, 16, 17, 18, 19, 20, 21);                                    \
  } else if constexpr (kTiles == 8) {                                                     \
    KVPACK_WGMMA(type, 64, 4, 32, 33, 34, 35, 36, 37);                                    \
  } else if constexpr (kTiles == 10) {                                                    \
    KVPACK_WGMMA(type, 80, 5, 40, 41, 42, 43, 44, 45);                                    \
  } else if constexpr (kTiles == 12) {                                                    \
    KVPACK_WGMMA(type, 96, 6, 48, 49, 50, 51, 52, 53);                                    \
  } else if constexpr (kTiles == 16) {                                                    \
    KVPACK_WGMMA(type, 128, 8, 64, 65, 66, 67, 68, 69);                                   \
  } else if constexpr (kTiles == 28) {                                                    \
    KVPACK_WGMMA(type, 224, 14, 112, 113, 114, 115, 116, 117);                            \
  } else {                                                                                \
    static_assert(kTiles == 4, "a number of columns that no instruction is written for"); \
  }

/// Begins D[64 x 8*kTiles] (+)= A[64 x 16] * B; without `adds` D is written, not added to.
template <MmaType kType, int kTiles>
__device__ inline void wgmma_m64k16(float (*d)[4], const std::uint32_t (&a)[4], std::uint64_t b, int adds) {
#if KVPACK_HAS_WGMMA
  if constexpr (kType == MmaType::kHalf) {
    KVPACK_WGMMA_OF("f16")
  } else {
    KVPACK_WGMMA_OF("bf16")
  }
#else
  __trap();
#endif
}

#undef KVPACK_WGMMA_OF
#undef KVPACK_WGMMA
#undef KVPACK_PAIR
#undef KVPACK_D0
#undef KVPACK_D1
#undef KVPACK_D2
#undef KVPACK_D3
#undef KVPACK_D4
#undef KVPACK_D5
#undef KVPACK_D6
#undef KVPACK_D7
#undef KVPACK_D8
#undef KVPACK_D9
#undef KVPACK_D10
#undef KVPACK_D11
#undef KVPACK_D12
#undef KVPACK_D13
#undef KVPACK_LIST1
#undef KVPACK_LIST2
#undef KVPACK_LIST3
#undef KVPACK_LIST4
#undef KVPACK_LIST5
#undef KVPACK_LIST6
#undef KVPACK_LIST7
#undef KVPACK_LIST8
#undef KVPACK_LIST9
#undef KVPACK_LIST10
#undef KVPACK_LIST11
#undef KVPACK_LIST12
#undef KVPACK_LIST13
#undef KVPACK_LIST14
#undef KVPACK_PAIRS1
#undef KVPACK_PAIRS2
#undef KVPACK_PAIRS3
#undef KVPACK_PAIRS4
#undef KVPACK_PAIRS5
#undef KVPACK_PAIRS6
#undef KVPACK_PAIRS7
#undef KVPACK_PAIRS8
#undef KVPACK_PAIRS9
#undef KVPACK_PAIRS10
#undef KVPACK_PAIRS11
#undef KVPACK_PAIRS12
#undef KVPACK_PAIRS13
#undef KVPACK_PAIRS14

}  // namespace kvpack::cuda
