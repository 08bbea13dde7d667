// CUDA side of kron_quantize: which kernel takes which problem.
#include "cuda/device.h"
#include "flatquant/implementations.h"
#include "flatquant/kron_launch_cuda.cuh"

namespace kvpack::cuda {

namespace {

/// Products by mma.sync where the type, the shape and the GPU allow.
bool try_mma(const KronQuantizeProblem& problem) {
  const bool is_half = problem.dtype == DType::kFloat16 || problem.dtype == DType::kBFloat16;
  return is_half && device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8 && launch_kron_mma(problem);
}

/// Products by wgmma, on Hopper alone and where the library holds code for it.
bool try_wgmma([[maybe_unused]] const KronQuantizeProblem& problem) {
#if defined(KVPACK_COMPILES_FOR_SM90A)
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) != 9) return false;
  if (problem.dtype == DType::kFloat16) return launch_kron_wgmma_float16(problem);
  if (problem.dtype == DType::kBFloat16) return launch_kron_wgmma_bfloat16(problem);
#endif
  return false;
}

}  // namespace

void kron_quantize_mma(const KronQuantizeProblem& problem) {
  const DeviceGuard device(problem.x, "x");
  if (!try_mma(problem)) kron_quantize_plain(problem);
}

void kron_quantize(const KronQuantizeProblem& problem) {
  const DeviceGuard device(problem.x, "x");
  if (!try_wgmma(problem) && !try_mma(problem)) kron_quantize_plain(problem);
}

}  // namespace kvpack::cuda
