// Entry of comparing predictions: checks and dispatch.
#include "core/check.h"
#include "dispatch/registry.h"
#include "evaluate/implementations.h"

namespace kvpack {

namespace {

void require_logits(const TensorView& view, const char* name, const TensorView& reference) {
  require(view.rank == 2, name, " has ", view.rank, " dimensions ", shape_text(view),
          "; expected [positions, vocabulary]");
  const bool known = view.dtype == DType::kFloat16 || view.dtype == DType::kBFloat16 || view.dtype == DType::kFloat32;
  require(known, name, " is ", name_of(view.dtype), "; expected float16, bfloat16 or float32");
  require(view.shape[1] >= 1, name, " has shape ", shape_text(view), "; the vocabulary must not be empty");
  require(view.strides[1] == 1 || view.shape[1] == 1, name, " has the strides ", text_of(view.strides, view.rank),
          "; rows must be contiguous");
  require(view.shape == reference.shape, "reference has shape ", shape_text(reference), " but ", name, " has ",
          shape_text(view));
  require(view.dtype == reference.dtype, "reference is ", name_of(reference.dtype), " but ", name, " is ",
          name_of(view.dtype));
  require(view.device == reference.device, "reference and ", name, " are on different devices");
}

void require_vector(const TensorView& view, const char* name, DType dtype, const TensorView& reference) {
  require(view.rank == 1 && view.shape[0] == reference.shape[0], name, " has shape ", shape_text(view), "; expected [",
          reference.shape[0], "]");
  require(view.dtype == dtype, name, " is ", name_of(view.dtype), "; expected ", name_of(dtype));
  require(view.strides[0] == 1 || view.shape[0] <= 1, name, " has the stride ", view.strides[0], "; expected 1");
  require(view.device == reference.device, "reference and ", name, " are on different devices");
}

}  // namespace

void compare_logits(const TensorView& reference, const TensorView& logits, const TensorView& targets,
                    const TensorView& nll, const TensorView& kl, const TensorView& top1, void* stream) {
  require_logits(reference, "reference", reference);
  require_logits(logits, "logits", reference);
  require_vector(targets, "targets", DType::kInt64, reference);
  require_vector(nll, "nll", DType::kFloat64, reference);
  require_vector(kl, "kl", DType::kFloat64, reference);
  require_vector(top1, "top1", DType::kFloat64, reference);
  CompareLogitsProblem problem;
  problem.reference = reference.data;
  problem.logits = logits.data;
  problem.targets = static_cast<const std::int64_t*>(targets.data);
  problem.nll = static_cast<double*>(nll.data);
  problem.kl = static_cast<double*>(kl.data);
  problem.top1 = static_cast<double*>(top1.data);
  problem.dtype = reference.dtype;
  problem.positions = reference.shape[0];
  problem.vocabulary = reference.shape[1];
  problem.reference_stride = reference.strides[0];
  problem.logits_stride = logits.strides[0];
  problem.stream = stream;
  const auto function = select<CompareLogitsFunction>(Operation::kCompareLogits, reference.device.kind);
  for (std::int64_t i = 0; reference.device.kind == DeviceKind::kCpu && i < problem.positions; ++i) {
    require(problem.targets[i] >= 0 && problem.targets[i] < problem.vocabulary, "target ", i, " is ",
            problem.targets[i], "; the vocabulary has ", problem.vocabulary, " tokens");
  }
  if (problem.positions > 0) function(problem);
}

}  // namespace kvpack
