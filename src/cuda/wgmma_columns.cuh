// Products of a warpgroup as in wgmma.cuh, of bfloat16 and of more columns, with B column after column:
//
//   D[64 x kColumns] += A[64 x 16] * B[16 x kColumns]; A and D lie in registers as in wgmma.cuh. B lies in shared memory, column
//   n by column, 64 rows in 128 bytes, so that a tile serves four products:
//     number (k, n) at 128*n + 16*((k / 8) ^ (n % 8)) + 2*(k % 8), the tile at a multiple of 1024
//   Rows 16*j .. begin 32*j bytes behind the tile.
#pragma once

#include <cstdint>

#include "cuda/wgmma.cuh"

namespace kvpack::cuda {

// Operands of an instruction: 8 columns, and multiples of them.
#define KVPACK_D8(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define KVPACK_D32(n) KVPACK_D8(n), KVPACK_D8(n + 1), KVPACK_D8(n + 2), KVPACK_D8(n + 3)
#define KVPACK_D64(n) KVPACK_D32(n), KVPACK_D32(n + 4)
#define KVPACK_D128(n) KVPACK_D64(n), KVPACK_D64(n + 8)
#define KVPACK_NAMES_0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define KVPACK_NAMES_1 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define KVPACK_NAMES_2 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define KVPACK_NAMES_3 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define KVPACK_NAMES_4 "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define KVPACK_NAMES_5 "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define KVPACK_NAMES_6 "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define KVPACK_NAMES_7 "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// The names of the text's operands; none of a, b, d and adds is a parameter, which stand for what wgmma_columns() has.
#define KVPACK_WGMMA(columns, names, a_0, a_1, a_2, a_3, at_b, at_p, ...)                                         \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " at_p                                                           \
               ", 0;\n"                                                                                           \
               "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32.bf16.bf16 {" names "}, {" a_0 "," a_1 "," a_2 \
               "," a_3 "}, " at_b ", p, 1, 1, 0;\n}\n"                                                            \
               : __VA_ARGS__                                                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds))

/// Begins D (+)= A * B; without `adds` D is written, not added to. kColumns is 32, 192, 240 or 256.
template <int kColumns>
__device__ inline void wgmma_columns(float (&d)[kColumns / 8][4], const std::uint32_t (&a)[4], std::uint64_t b,
                                     int adds) {
  static_assert(kColumns == 32 || kColumns == 192 || kColumns == 240 || kColumns == 256);
#if KVPACK_HAS_WGMMA
  if constexpr (kColumns == 32) {
    KVPACK_WGMMA("32", KVPACK_NAMES_0, "%16", "%17", "%18", "%19", "%20", "%21", KVPACK_D32(0));
  } else if constexpr (kColumns == 192) {
    KVPACK_WGMMA("192",
                 KVPACK_NAMES_0 "," KVPACK_NAMES_1 "," KVPACK_NAMES_2 "," KVPACK_NAMES_3 "," KVPACK_NAMES_4
                                "," KVPACK_NAMES_5,
                 "%96", "%97", "%98", "%99", "%100", "%101", KVPACK_D128(0), KVPACK_D64(16));
  } else if constexpr (kColumns == 240) {
    KVPACK_WGMMA("240",
                 KVPACK_NAMES_0 "," KVPACK_NAMES_1 "," KVPACK_NAMES_2 "," KVPACK_NAMES_3 "," KVPACK_NAMES_4
                                "," KVPACK_NAMES_5 "," KVPACK_NAMES_6 ",%112,%113,%114,%115,%116,%117,%118,%119",
                 "%120", "%121", "%122", "%123", "%124", "%125", KVPACK_D128(0), KVPACK_D64(16), KVPACK_D32(24),
                 KVPACK_D8(28), KVPACK_D8(29));
  } else if constexpr (kColumns == 256) {
    KVPACK_WGMMA("256",
                 KVPACK_NAMES_0 "," KVPACK_NAMES_1 "," KVPACK_NAMES_2 "," KVPACK_NAMES_3 "," KVPACK_NAMES_4
                                "," KVPACK_NAMES_5 "," KVPACK_NAMES_6 "," KVPACK_NAMES_7,
                 "%128", "%129", "%130", "%131", "%132", "%133", KVPACK_D128(0), KVPACK_D128(16));
  }
#else
  __trap();
#endif
}

/// Warps of a warpgroup all call one of these: registers that one group gives up are there for another to take. The kernel has
/// launch bounds with one block a multiprocessor.
template <int kRegisters>
__device__ inline void give_up_registers() {
#if KVPACK_HAS_WGMMA
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ inline void take_registers() {
#if KVPACK_HAS_WGMMA
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

/// What the tensor cores want to know of a B tile at a shared address: 16-byte units; 8 columns further lie 1024 bytes further;
/// 128-byte swizzle. The other stride is never used.
__device__ inline std::uint64_t wgmma_columns_tile(std::uint32_t address) {
  constexpr std::uint64_t kEightColumns = 1024 / 16;
  constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62;
  return kSwizzle128 | kEightColumns << 32 | kEightColumns << 16 | (address & 0x3ffffu) >> 4;
}

#undef KVPACK_WGMMA
#undef KVPACK_NAMES_0
#undef KVPACK_NAMES_1
#undef KVPACK_NAMES_2
#undef KVPACK_NAMES_3
#undef KVPACK_NAMES_4
#undef KVPACK_NAMES_5
#undef KVPACK_NAMES_6
#undef KVPACK_NAMES_7
#undef KVPACK_D128
#undef KVPACK_D64
#undef KVPACK_D32
#undef KVPACK_D8

}  // namespace kvpack::cuda
