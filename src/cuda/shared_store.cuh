// Loads from and stores to shared memory by its 32-bit address: pointers that move under a condition stay one register, where
// the compiler keeps a second one for the pointer of C++.
#pragma once

#include <cstdint>

namespace kvpack::cuda {

/// Writes 16 bits at an address of mma.cuh's shared_address().
__device__ inline void store_shared_half(std::uint32_t address, std::uint16_t bits) {
  asm volatile("st.shared.u16 [%0], %1;" : : "r"(address), "h"(bits) : "memory");
}

/// Writes 4 aligned bytes.
__device__ inline void store_shared_word(std::uint32_t address, std::uint32_t word) {
  asm volatile("st.shared.u32 [%0], %1;" : : "r"(address), "r"(word) : "memory");
}

/// Writes 16 aligned bytes.
__device__ inline void store_shared_chunk(std::uint32_t address, uint4 value) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};"
               :
               : "r"(address), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

/// Sets bits of 4 aligned bytes that other threads may change too.
__device__ inline void set_shared_bits(std::uint32_t address, std::uint32_t bits) {
  asm volatile("red.shared.or.b32 [%0], %1;" : : "r"(address), "r"(bits) : "memory");
}

/// Reads 4 aligned bytes.
__device__ inline std::uint32_t load_shared_word(std::uint32_t address) {
  std::uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  return word;
}

/// Reads 16 aligned bytes.
__device__ inline uint4 load_shared_chunk(std::uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

}  // namespace kvpack::cuda
