// The device an operation runs on: that of its memory, whatever device the thread has current. And what that device can do.
#pragma once

#include <cuda_runtime.h>

#include "core/check.h"
#include "cuda/check.h"

namespace kvpack::cuda {

/// Makes the device that owns `memory` current, and the old one again at the end of its life.
class DeviceGuard {
 public:
  /// Throws InvalidArgument when no GPU can read `memory`; `name` is that of the tensor.
  DeviceGuard(const void* memory, const char* name) {
    cudaPointerAttributes attributes{};
    check_cuda(cudaPointerGetAttributes(&attributes, memory), "tell whose memory a pointer is");
    require(attributes.type != cudaMemoryTypeUnregistered, name, " is said to be on cuda, but ", memory,
            " is memory of the host that no GPU knows");
    check_cuda(cudaGetDevice(&previous_), "tell the current device");
    if (attributes.device != previous_) check_cuda(cudaSetDevice(attributes.device), "change the device");
  }
  ~DeviceGuard() {
    int now = previous_;
    if (cudaGetDevice(&now) == cudaSuccess && now != previous_) (void)cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

/// What the current device has or can do.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  check_cuda(cudaGetDevice(&device), "tell the current device");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "tell what a device can do");
  return value;
}

}  // namespace kvpack::cuda
