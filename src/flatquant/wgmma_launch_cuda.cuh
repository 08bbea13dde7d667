// Which instantiation of Hopper's products takes which shape.
#pragma once

#include <cstdint>

#include "flatquant/kron_launch_cuda.cuh"
#include "flatquant/wgmma_products_cuda.cuh"

namespace kvpack::cuda {

template <MmaType kType, int kBlocks, int kSteps>
bool launch_kron_wgmma_as(const KronQuantizeProblem& problem) {
  using Products = WgmmaProducts<kType, kBlocks, kSteps>;
  return launch_kron<Products>(problem, Products::kGroupWarps, {16 * kSteps, kBlocks},
                               {kBlockColumns * kBlocks, kBlocks});
}

/// M of 33 to 128 and N of 33 to 256: smaller ones are mostly padding here, and mma.sync pads less.
template <MmaType kType>
bool launch_kron_wgmma(const KronQuantizeProblem& problem) {
  const std::int64_t rows = problem.matrices.rows;
  const std::int64_t columns = problem.matrices.columns;
  if (rows <= 32 || rows > 128 || columns <= 32 || columns > 256) return false;
  if (columns <= 64) {
    return rows <= 64 ? launch_kron_wgmma_as<kType, 1, 4>(problem) : launch_kron_wgmma_as<kType, 1, 8>(problem);
  }
  if (columns > 128) {
    return rows <= 64 ? launch_kron_wgmma_as<kType, 4, 4>(problem) : launch_kron_wgmma_as<kType, 4, 8>(problem);
  }
  if (rows <= 64) return launch_kron_wgmma_as<kType, 2, 4>(problem);
  if (rows <= 96) return launch_kron_wgmma_as<kType, 2, 6>(problem);
  return rows <= 112 ? launch_kron_wgmma_as<kType, 2, 7>(problem) : launch_kron_wgmma_as<kType, 2, 8>(problem);
}

}  // namespace kvpack::cuda
