// Temporary device memory in stream order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/check.h"
#include "cuda/check.h"

namespace kvpack::cuda {

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
