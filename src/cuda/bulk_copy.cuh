// Copies of whole blocks of memory to shared memory by the copy engine, and the barriers in shared memory that tell when they
// have arrived (Hopper and later). Code for other GPUs holds a trap: whoever launches such a kernel looks at the GPU first.
#pragma once

#include <cstdint>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define KVPACK_HAS_BULK_COPY 1
#else
#define KVPACK_HAS_BULK_COPY 0
#endif

namespace kvpack::cuda {

/// Sets up a barrier of 8 aligned bytes that `arrivals` complete. Then show_barriers() and a barrier of the block.
__device__ inline void init_barrier(std::uint32_t barrier, std::uint32_t arrivals) {
#if KVPACK_HAS_BULK_COPY
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
#else
  __trap();
#endif
}

/// Makes new barriers visible to the copy engine.
__device__ inline void show_barriers() {
#if KVPACK_HAS_BULK_COPY
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/// One arrival.
__device__ inline void arrive(std::uint32_t barrier) {
#if KVPACK_HAS_BULK_COPY
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}

/// One arrival that also makes the barrier wait for so many bytes of copies.
__device__ inline void arrive_and_expect(std::uint32_t barrier, std::uint32_t bytes) {
#if KVPACK_HAS_BULK_COPY
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}

/// Waits until the barrier's phase of this parity is complete; phases count from 0. Of a new barrier the phase before the
/// first one, parity 1, is complete.
__device__ inline void wait_barrier(std::uint32_t barrier, std::uint32_t parity) {
#if KVPACK_HAS_BULK_COPY
  asm volatile(
      "{\n.reg .pred done;\n"
      "WAIT_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE_%=;\n"
      "bra WAIT_%=;\n"
      "DONE_%=:\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}

/// Starts a copy; all three are multiples of 16. The barrier counts the bytes that have arrived.
__device__ inline void copy_bulk_async(std::uint32_t shared, const void* global, std::uint32_t bytes,
                                       std::uint32_t barrier) {
#if KVPACK_HAS_BULK_COPY
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(barrier)
               : "memory");
#endif
}

}  // namespace kvpack::cuda
