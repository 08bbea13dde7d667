// Temporary device memory in stream order.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "core/check.h"
#include "cuda/check.h"

namespace kvpack::cuda {

/// Lets the current device keep some freed memory: by default a synchronisation gives all of it back to the driver, and
/// the next call's first allocation takes longer than its kernels. For operations that synchronise; once per device.
inline void keep_temporary_memory() {
  constexpr std::uint64_t kKeptBytes = std::uint64_t{64} << 20;
  static std::atomic<std::uint64_t> done{0};  // a bit per device
  int device = 0;
  check_cuda(cudaGetDevice(&device), "tell the current device");
  if (device >= 64) return;
  const std::uint64_t bit = std::uint64_t{1} << device;
  if ((done.fetch_or(bit, std::memory_order_relaxed) & bit) != 0) return;
  cudaMemPool_t pool{};
  check_cuda(cudaDeviceGetDefaultMemPool(&pool, device), "find the memory pool of a device");
  std::uint64_t threshold = 0;
  check_cuda(cudaMemPoolGetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &threshold), "read how much a pool keeps");
  if (threshold >= kKeptBytes) return;  // whoever set more knows why
  threshold = kKeptBytes;
  check_cuda(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &threshold), "let a memory pool keep some");
}

/// `count` uninitialised elements that live as long as the object, in the order of `stream`.
template <typename T>
class DeviceBuffer {
 public:
  DeviceBuffer(std::int64_t count, cudaStream_t stream) : count_(count), stream_(stream) {
    const cudaError_t status = cudaMallocAsync(&memory_, bytes(), stream);
    if (status == cudaSuccess) return;
    (void)cudaGetLastError();
    throw InternalError(text("the GPU has no ", bytes(), " bytes of temporary memory: ", cudaGetErrorString(status)));
  }
  ~DeviceBuffer() { (void)cudaFreeAsync(memory_, stream_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  [[nodiscard]] T* data() const { return static_cast<T*>(memory_); }

  void fill_bytes(int value) { check_cuda(cudaMemsetAsync(memory_, value, bytes(), stream_), "fill memory"); }

  /// Copies all elements to the host. Synchronises the stream.
  void read_to(T* target) const {
    check_cuda(cudaMemcpyAsync(target, memory_, bytes(), cudaMemcpyDeviceToHost, stream_), "copy results to the host");
    check_cuda(cudaStreamSynchronize(stream_), "finish the work of a stream");
  }

 private:
  [[nodiscard]] std::size_t bytes() const { return static_cast<std::size_t>(count_) * sizeof(T); }

  void* memory_ = nullptr;
  std::int64_t count_;
  cudaStream_t stream_;
};

}  // namespace kvpack::cuda
