// Entries of simulated quantisation: checks, packing of unusual layouts, dispatch, and the name of a bad value.
#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "core/half.h"
#include "core/sequences.h"
#include "core/with_type.h"
#include "dispatch/registry.h"
#include "quantize/implementations.h"
#include "quantize/prepare.h"

namespace kvpack {

namespace {

/// Elements that share a grid: causal mode caps the tokens of a group.
std::int64_t effective_group(const UniformOptions& options, std::int64_t tokens, std::int64_t channels) {
  if (options.axis == Axis::kPerChannel && options.causality == Causality::kCausal) {
    return options.group > 0 ? std::min(options.group, kCausalGroupTokens) : kCausalGroupTokens;
  }
  const std::int64_t length = options.axis == Axis::kPerToken ? channels : tokens;
  return options.group > 0 ? std::min(options.group, length) : length;
}

/// What all sequences of one call share.
struct Call {
  QuantizeOptions options;
  CodebookTable codebook;
  std::vector<VectorGrid> static_grids;
  UniformFunction function;
  void* stream;
};

UniformProblem make_problem(const TensorView& x, const TensorView& out, const Call& call) {
  const QuantizeOptions& options = call.options;
  UniformProblem problem;
  set_sequences(problem, x, out);
  problem.options = options;
  problem.options.protected_tokens = std::min(options.protected_tokens, problem.tokens);
  problem.group = effective_group(options, problem.tokens, problem.channels);
  problem.codebook = options.codebook == nullptr ? nullptr : &call.codebook;
  problem.static_grids = call.static_grids.empty() ? nullptr : call.static_grids.data();
  problem.stream = call.stream;
  return problem;
}

/// Throws InvalidArgument that names the first value of a CPU sequence that would be quantised and is not finite;
/// returns when there is none. Exact tokens are not looked at.
void require_finite(const TensorView& view, const UniformProblem& problem, std::int64_t batch_index) {
  const bool by_channel = problem.options.axis == Axis::kPerChannel;
  const std::int64_t end_token =
      by_channel ? std::min(num_token_groups(problem) * problem.group, problem.tokens) : problem.tokens;
  with_float_type(view.dtype, [&]<typename T>() {
    const auto* data = static_cast<const T*>(view.data);
    for (std::int64_t t = problem.options.protected_tokens; t < end_token; ++t) {
      for (std::int64_t c = 0; c < view.shape[1]; ++c) {
        const float value = to_float(data[t * view.strides[0] + c * view.strides[1]]);
        require(std::isfinite(value), "x holds ", value, " at sequence ", batch_index, ", token ", t, ", channel ", c,
                "; quantisation needs values that are finite in float32");
      }
    }
  });
}

/// Throws InvalidArgument when an implementation found a value that is not finite.
void require_all_finite(const UniformOutcome& outcome, const TensorView& x, std::int64_t batch_index) {
  require(outcome.all_finite || outcome.first_bad < 0, "x holds a value that is not finite in float32 at sequence ",
          batch_index, ", token ", outcome.first_bad / x.shape[1], ", channel ", outcome.first_bad % x.shape[1]);
  require(outcome.all_finite, "x holds a value that is not finite in float32, in sequence ", batch_index, " of shape ",
          shape_text(x));
}

/// The grids of every sequence of a batch, before anything is written; none where implementations find their own.
std::vector<std::vector<VectorGrid>> find_compat_grids(const TensorView& x, const Call& call) {
  const std::int64_t tokens = sequence(x, 0).shape[0];
  if (!needs_compat_grids(call.options, tokens)) return {};
  // Not noted as the last implementation: that is the one that quantises.
  const Implementation& row = select_row(Operation::kFindCompatGrids, x.device.kind);
  const auto find = reinterpret_cast<CompatGridsFunction>(row.function);
  std::vector<std::vector<VectorGrid>> grids;
  for (std::int64_t i = 0; i < num_sequences(x); ++i) {
    const TensorView one = sequence(x, i);
    grids.emplace_back(static_cast<std::size_t>(one.shape[1]));
    const CompatOutcome found = find(make_problem(one, one, call), grids.back().data());
    require_all_finite({{}, found.first_bad < 0, found.first_bad}, one, i);
  }
  return grids;
}

/// `grids` are those of find_compat_grids for this sequence, or null.
UniformCounts simulate_sequence(const TensorView& x, const TensorView& out, const Call& call, const VectorGrid* grids,
                                std::int64_t batch_index) {
  UniformOutcome outcome;
  const bool on_cpu = x.device.kind == DeviceKind::kCpu;
  const auto run = [&](const TensorView& from, const TensorView& to) {
    UniformProblem problem = make_problem(from, to, call);
    if (grids != nullptr) problem.static_grids = grids;
    outcome = call.function(problem);
  };
  if (needs_packing(x, out)) {
    const PackedSequence packed_x(x);
    const PackedSequence packed_out(packed_x.view());
    run(packed_x.view(), packed_out.view());
    if (outcome.all_finite) packed_out.unpack_to(out);
  } else {
    run(x, out);
  }
  if (!outcome.all_finite && on_cpu && !is_same_view(x, out)) {
    require_finite(x, make_problem(x, out, call), batch_index);
  }
  require_all_finite(outcome, x, batch_index);
  return outcome.counts;
}

/// In place, a bad value must be found before anything is overwritten. The CUDA side sees to that within a sequence.
void check_before_overwriting(const TensorView& x, const Call& call) {
  const bool on_cpu = x.device.kind == DeviceKind::kCpu;
  if (!on_cpu && num_sequences(x) == 1) return;
  for (std::int64_t i = 0; i < num_sequences(x); ++i) {
    UniformProblem problem = make_problem(sequence(x, i), sequence(x, i), call);
    problem.only_check = true;
    if (on_cpu) {
      require_finite(sequence(x, i), problem, i);
    } else {
      require_all_finite(call.function(problem), sequence(x, i), i);
    }
  }
}

UniformCounts simulate(const TensorView& x, const TensorView& out, const Call& call) {
  UniformCounts counts;
  if (x.num_elements() == 0) return counts;
  const bool is_copy = call.options.bits == 16;
  if (is_same_view(x, out) && !is_copy) check_before_overwriting(x, call);
  const auto compat_grids = find_compat_grids(x, call);
  for (std::int64_t i = 0; i < num_sequences(x); ++i) {
    const TensorView source = sequence(x, i);
    const TensorView target = sequence(out, i);
    if (is_copy && x.device.kind == DeviceKind::kCpu) {
      copy_sequence(source, target);
      continue;
    }
    const VectorGrid* grids = compat_grids.empty() ? nullptr : compat_grids[static_cast<std::size_t>(i)].data();
    const UniformCounts one = simulate_sequence(source, target, call, grids, i);
    counts.quantized += one.quantized;
    counts.vectors += one.vectors;
    counts.outliers += one.outliers;
  }
  return counts;
}

}  // namespace

UniformCounts simulate_uniform(const TensorView& x, const TensorView& out, const UniformOptions& options,
                               void* stream) {
  require_sequence_pair(x, out);
  QuantizeOptions general;
  static_cast<UniformOptions&>(general) = options;
  require(options.causality != Causality::kCalibrated, "mode is calibrated; simulate_uniform knows oracle and causal");
  require_quantize_options(general);
  const auto function = select<UniformFunction>(Operation::kSimulateUniform, x.device.kind);
  return simulate(x, out, {general, {}, {}, function, stream});
}

UniformCounts simulate_quantized(const TensorView& x, const TensorView& out, const QuantizeOptions& options,
                                 void* stream) {
  require_sequence_pair(x, out);
  require_quantize_options(options);
  const bool is_calibrated = options.causality == Causality::kCalibrated;
  const bool by_channel = options.axis == Axis::kPerChannel;
  const std::int64_t wanted = x.shape[static_cast<std::size_t>(by_channel ? x.rank - 1 : x.rank - 2)];
  require(!is_calibrated || options.num_thresholds == wanted, "lower and upper have ", options.num_thresholds,
          " thresholds; x of shape ", shape_text(x), " has ", wanted, by_channel ? " channels" : " tokens");
  const auto function = select<UniformFunction>(Operation::kSimulateQuantized, x.device.kind);
  Call call{options, {}, {}, function, stream};
  if (options.codebook != nullptr) call.codebook = make_codebook_table(options);
  if (is_calibrated) call.static_grids = make_static_grids(options);
  return simulate(x, out, call);
}

}  // namespace kvpack
