// kron_quantize of float16 on Hopper. A file of its own so that the types compile side by side.
#include "flatquant/stream_launch_cuda.cuh"
#include "flatquant/wgmma_launch_cuda.cuh"

namespace kvpack::cuda {

bool launch_kron_wgmma_float16(const KronQuantizeProblem& problem) {
  return launch_stream<MmaType::kHalf>(problem) || launch_kron_wgmma<MmaType::kHalf>(problem);
}

}  // namespace kvpack::cuda
