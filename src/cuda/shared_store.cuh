// A store to shared memory by its 32-bit address: pointers that move under a condition stay one register, where the
// compiler keeps a second one for the pointer of C++.
#pragma once

#include <cstdint>

namespace kvpack::cuda {

/// Writes 16 bits at an address of mma.cuh's shared_address().
__device__ inline void store_shared_half(std::uint32_t address, std::uint16_t bits) {
  asm volatile("st.shared.u16 [%0], %1;" : : "r"(address), "h"(bits) : "memory");
}

}  // namespace kvpack::cuda
