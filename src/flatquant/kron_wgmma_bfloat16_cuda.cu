// kron_quantize of bfloat16 on Hopper. A file of its own so that the types compile side by side.
#include "flatquant/stream_launch_cuda.cuh"
#include "flatquant/wgmma_launch_cuda.cuh"

namespace kvpack::cuda {

bool launch_kron_wgmma_bfloat16(const KronQuantizeProblem& problem) {
  return launch_stream<MmaType::kBFloat16>(problem) || launch_kron_wgmma<MmaType::kBFloat16>(problem);
}

}  // namespace kvpack::cuda
