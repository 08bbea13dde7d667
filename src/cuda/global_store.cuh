// Stores to global memory under a condition, without a branch: what is stored is computed in any case, and the compiler may mix it
// with what stands around it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace kvpack::cuda {

/// Writes 4, 8 or 16 aligned bytes where `condition` holds.
__device__ inline void store_word_if(bool condition, void* target, std::uint32_t word) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %0, 0;\n@p st.global.u32 [%1], %2;\n}\n"
               :
               : "r"(static_cast<std::uint32_t>(condition)), "l"(target), "r"(word)
               : "memory");
}
__device__ inline void store_pair_if(bool condition, void* target, uint2 words) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %0, 0;\n@p st.global.v2.u32 [%1], {%2, %3};\n}\n"
               :
               : "r"(static_cast<std::uint32_t>(condition)), "l"(target), "r"(words.x), "r"(words.y)
               : "memory");
}
__device__ inline void store_quad_if(bool condition, void* target, uint4 words) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %0, 0;\n@p st.global.v4.u32 [%1], {%2, %3, %4, %5};\n}\n"
               :
               : "r"(static_cast<std::uint32_t>(condition)), "l"(target), "r"(words.x), "r"(words.y), "r"(words.z),
                 "r"(words.w)
               : "memory");
}

}  // namespace kvpack::cuda
