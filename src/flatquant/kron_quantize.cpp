// Entry of kron_quantize and of the two with a producer in front: checks and dispatch.
#include <cmath>

#include "dispatch/registry.h"
#include "flatquant/checks.h"
#include "flatquant/codes.h"
#include "flatquant/workspace.h"

namespace kvpack {

namespace {

const char* output_name(std::size_t index) {
  constexpr const char* kNames[] = {"outputs[0]", "outputs[1]", "outputs[2]", "outputs[3]"};
  static_assert(std::size(kNames) == kMaxKronOutputs);
  return kNames[index];
}

void require_clip(double clip, const char* name, const char* side) {
  require(clip > 0.0 && clip <= 1.0, name, ".", side, " is ", clip, "; it must be above 0 and at most 1");
  require(static_cast<float>(clip) > 0.0f, name, ".", side, " is ", clip, ", which float32 rounds to 0");
}

/// One output against x and against the first output, whose form, encoding and grid all of them share.
void add_output(const KronOutput& output, std::size_t index, const Device& device, std::int64_t n,
                KronQuantizeProblem& problem) {
  const char* name = output_name(index);
  const TensorView& codes = output.rows.codes;
  // First what n allows, so that the message does not speak of a shape that no n could have.
  const std::int64_t together = codes.dtype == DType::kInt32 ? 8 : (codes.dtype == DType::kUInt8 ? 2 : 1);
  require(n % together == 0, "n is ", n, "; ", name_of(codes.dtype), " codes need a multiple of ", together);
  const Int4Data rows = checked_rows(output.rows, name, device);
  require(rows.rows == problem.tokens && rows.columns == n, name, ".codes are ", rows.rows, " rows of ", rows.columns,
          " codes, but x has ", problem.tokens, " tokens of n = ", n);
  require_clip(output.clip_max, name, "clip_max");
  require_clip(output.clip_min, name, "clip_min");
  const bool is_affine = rows.zeros != nullptr || is_given(output.rows.zeros);
  if (index == 0) {
    problem.form = rows.form;
    problem.encoding = rows.encoding;
    problem.is_affine = is_affine;
  }
  require(rows.form == problem.form && rows.encoding == problem.encoding, name,
          " has another form or encoding of codes than outputs[0]; all have the same");
  require(is_affine == problem.is_affine, name, is_affine ? " has" : " has no", " zeros, but outputs[0] has",
          problem.is_affine ? "" : " none", "; all or none have them");
  problem.outputs[index] = {codes.data, static_cast<float*>(output.rows.scales.data),
                            static_cast<float*>(output.rows.zeros.data), static_cast<float>(output.clip_max),
                            static_cast<float>(output.clip_min)};
}

/// What is written shares memory with nothing else.
void require_outputs_apart(std::span<const KronOutput> outputs, const TensorView& x, const TensorView& second,
                           const KronTransform& transform, const TensorView& workspace) {
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    const Int4Rows& rows = outputs[i].rows;
    const char* name = output_name(i);
    require_apart(x, "x", rows, name);
    require_apart(second, "the producer's second input", rows, name);
    require_apart(workspace, "workspace", rows, name);
    for (const TensorView* view : {&rows.codes, &rows.scales, &rows.zeros}) require_apart(*view, name, transform);
    require(!may_overlap(rows.codes, rows.scales) && !may_overlap(rows.codes, rows.zeros) &&
                !may_overlap(rows.scales, rows.zeros),
            name, " overlaps itself in memory");
    for (std::size_t j = 0; j < i; ++j) {
      for (const TensorView* view : {&rows.codes, &rows.scales, &rows.zeros}) {
        require_apart(*view, name, outputs[j].rows, output_name(j));
      }
    }
  }
  require_apart(workspace, "workspace", transform);
  require(!may_overlap(workspace, x) && !may_overlap(workspace, second), "workspace overlaps an input in memory");
}

/// All three functions; `problem` holds what the producer needs, x and second are checked.
void quantize(const TensorView& x, const TensorView& second, KronQuantizeProblem& problem,
              const KronTransform& transform, std::span<const KronOutput> outputs, const TensorView& workspace,
              void* stream) {
  const std::int64_t n = x.shape[1];
  problem.x = x.data;
  problem.dtype = x.dtype;
  problem.tokens = x.shape[0];
  problem.x_stride = x.strides[0];
  problem.matrices = checked_matrices(transform, n, x.dtype, x.device);
  require(!outputs.empty() && outputs.size() <= kMaxKronOutputs, "there are ", outputs.size(),
          " outputs; there must be 1 to ", kMaxKronOutputs);
  for (std::size_t i = 0; i < outputs.size(); ++i) add_output(outputs[i], i, x.device, n, problem);
  problem.num_outputs = static_cast<std::int32_t>(outputs.size());
  require_outputs_apart(outputs, x, second, transform, workspace);
  problem.workspace = checked_workspace(
      workspace,
      kron_workspace_bytes(problem.tokens, problem.matrices.rows, problem.matrices.columns, x.dtype, x.device.kind),
      x.device);
  problem.stream = stream;
  const auto function = select<KronQuantizeFunction>(Operation::kKronQuantize, x.device.kind);
  if (problem.tokens > 0) function(problem);
}

}  // namespace

std::int64_t kron_workspace_bytes(std::int64_t tokens, std::int64_t rows, std::int64_t columns, DType dtype,
                                  DeviceKind device) {
  require(tokens >= 0 && rows >= 1 && columns >= 1, "tokens is ", tokens, ", rows ", rows, ", columns ", columns,
          "; they must be at least 0, 1 and 1");
  return device == DeviceKind::kCpu ? 0 : kron_workspace_bytes(tokens, rows, columns, dtype);
}

void kron_quantize(const TensorView& x, const KronTransform& transform, std::span<const KronOutput> outputs,
                   const TensorView& workspace, void* stream) {
  require_token_rows(x, "x");
  KronQuantizeProblem problem;
  quantize(x, {}, problem, transform, outputs, workspace, stream);
}

void rmsnorm_kron_quantize(const TensorView& x, const TensorView& weight, double epsilon,
                           const KronTransform& transform, std::span<const KronOutput> outputs,
                           const TensorView& workspace, void* stream) {
  require_token_rows(x, "x");
  require_exact(weight, {"weight"}, x.dtype, {x.shape[1]}, x.device);
  require(epsilon >= 0.0 && std::isfinite(epsilon), "epsilon is ", epsilon, "; it must be at least 0 and finite");
  KronQuantizeProblem problem;
  problem.producer = KronProducer::kRmsNorm;
  problem.second = weight.data;
  problem.epsilon = static_cast<float>(epsilon);
  quantize(x, weight, problem, transform, outputs, workspace, stream);
}

void silu_mul_kron_quantize(const TensorView& gate, const TensorView& up, const KronTransform& transform,
                            std::span<const KronOutput> outputs, const TensorView& workspace, void* stream) {
  require_token_rows(gate, "gate");
  require_token_rows(up, "up");
  require(gate.shape == up.shape, "gate has shape ", shape_text(gate), " but up has ", shape_text(up));
  require(gate.dtype == up.dtype, "gate is ", name_of(gate.dtype), " but up is ", name_of(up.dtype));
  require(gate.device == up.device, "gate is on ", device_text(gate.device), " but up is on ", device_text(up.device));
  KronQuantizeProblem problem;
  problem.producer = KronProducer::kSiluMul;
  problem.second = up.data;
  problem.second_stride = up.strides[0];
  quantize(gate, up, problem, transform, outputs, workspace, stream);
}

}  // namespace kvpack
