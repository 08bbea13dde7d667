// Entry of rotation: checks, packing of unusual layouts, the transposed matrix, dispatch.
#include <vector>

#include "core/check.h"
#include "core/sequences.h"
#include "dispatch/registry.h"
#include "transform/implementations.h"

namespace kvpack {

namespace {

void require_rotation(const TensorView& x, const TensorView& rotation, const TensorView& out) {
  require(rotation.rank == 2 && rotation.shape[0] == rotation.shape[1], "rotation has shape ", shape_text(rotation),
          "; it is [head_dim, head_dim]");
  const std::int64_t dim = rotation.shape[0];
  require(dim >= 1 && dim <= kMaxRotatedHead, "rotation has shape ", shape_text(rotation), "; head_dim is 1 to ",
          kMaxRotatedHead);
  require_exact(rotation, {"rotation"}, DType::kFloat32, {dim, dim}, x.device);
  const std::int64_t channels = x.shape[static_cast<std::size_t>(x.rank - 1)];
  require(channels % dim == 0, "x has ", channels, " channels; heads of ", dim, " do not divide them");
  require(!may_overlap(rotation, out), "rotation overlaps out");
}

std::vector<float> transpose(const float* matrix, std::int64_t dim) {
  std::vector<float> result(static_cast<std::size_t>(dim * dim));
  for (std::int64_t i = 0; i < dim; ++i) {
    for (std::int64_t j = 0; j < dim; ++j) result[static_cast<std::size_t>(j * dim + i)] = matrix[i * dim + j];
  }
  return result;
}

}  // namespace

void rotate(const TensorView& x, const TensorView& rotation, const TensorView& out, Direction direction, void* stream) {
  require_sequence_pair(x, out);
  require(direction == Direction::kForward || direction == Direction::kInverse, "there is no direction number ",
          static_cast<int>(direction));
  require_rotation(x, rotation, out);
  const auto function = select<RotateFunction>(Operation::kRotate, x.device.kind);
  if (x.num_elements() == 0) return;
  const bool on_cpu = x.device.kind == DeviceKind::kCpu;
  const std::int64_t dim = rotation.shape[0];
  const auto* matrix = static_cast<const float*>(rotation.data);
  const bool transposes = on_cpu && direction == Direction::kInverse;
  const std::vector<float> transposed = transposes ? transpose(matrix, dim) : std::vector<float>{};
  const auto run = [&](const TensorView& source, const TensorView& target) {
    RotateProblem problem;
    set_sequences(problem, source, target);
    problem.rotation = transposes ? transposed.data() : matrix;
    problem.head_dim = dim;
    problem.direction = on_cpu ? Direction::kForward : direction;
    problem.stream = stream;
    function(problem);
  };
  for (std::int64_t i = 0; i < num_sequences(x); ++i) run_packed(sequence(x, i), sequence(out, i), run);
}

}  // namespace kvpack
