// kron_quantize of 16-bit types by mma.sync: which instantiation takes which shape.
#include "flatquant/kron_launch_cuda.cuh"
#include "flatquant/mma_products_cuda.cuh"

namespace kvpack::cuda {

namespace {

constexpr std::int64_t kRowsInRegisters = 64;

template <MmaType kType, int kTiles>
bool launch_as(const KronQuantizeProblem& problem) {
  const auto rows = round_up(problem.matrices.rows, 16);
  const TileShape x_tile{rows, round_up(problem.matrices.columns, kBlockColumns) / kBlockColumns};
  const TileShape right_tile{round_up(problem.matrices.columns, 16),
                             round_up(8 * kTiles, kBlockColumns) / kBlockColumns};
  if constexpr (kTiles <= 16) {
    if (rows <= kRowsInRegisters) {
      return launch_kron<MmaProducts<kType, kTiles, kRowsInRegisters / 16>>(problem, rows / 16, x_tile, right_tile);
    }
  }
  return launch_kron<MmaProducts<kType, kTiles, 0>>(problem, rows / 16, x_tile, right_tile);
}

template <MmaType kType>
bool launch_of_type(const KronQuantizeProblem& problem) {
  const std::int64_t columns = problem.matrices.columns;
  if (columns <= 32) return launch_as<kType, 4>(problem);
  if (columns <= 64) return launch_as<kType, 8>(problem);
  if (columns <= 128) return launch_as<kType, 16>(problem);
  return launch_as<kType, 32>(problem);
}

}  // namespace

bool launch_kron_mma(const KronQuantizeProblem& problem) {
  constexpr std::int64_t kMostRows = 256;
  constexpr std::int64_t kMostColumns = 256;
  if (problem.matrices.rows > kMostRows || problem.matrices.columns > kMostColumns) return false;
  return problem.dtype == DType::kBFloat16 ? launch_of_type<MmaType::kBFloat16>(problem)
                                           : launch_of_type<MmaType::kHalf>(problem);
}

}  // namespace kvpack::cuda
