// Entry of simulated uniform quantisation: checks, packing of unusual layouts, dispatch, and the name of a bad value.
#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "core/half.h"
#include "core/sequences.h"
#include "core/with_type.h"
#include "dispatch/registry.h"
#include "quantize/implementations.h"

namespace kvpack {

namespace {

void require_options(const UniformOptions& options) {
  const std::int32_t bits = options.bits;
  require(bits == 2 || bits == 3 || bits == 4 || bits == 8 || bits == 16, "bits is ", bits,
          "; it is one of 2, 3, 4, 8 and 16");
  require(options.axis == Axis::kPerChannel || options.axis == Axis::kPerToken, "there is no axis number ",
          static_cast<int>(options.axis));
  require(options.offset == OffsetRule::kFloating || options.offset == OffsetRule::kClamp,
          "there is no offset rule number ", static_cast<int>(options.offset));
  require(options.causality == Causality::kOracle || options.causality == Causality::kCausal,
          "there is no mode number ", static_cast<int>(options.causality));
  require(options.group >= 0, "group is ", options.group, "; it must be at least 0");
  require(options.protected_tokens >= 0, "protected_tokens is ", options.protected_tokens, "; it must be at least 0");
  require(options.outlier_fraction >= 0.0 && options.outlier_fraction < 1.0, "outlier_fraction is ",
          options.outlier_fraction, "; it must be at least 0 and below 1");
}

/// Elements that share a grid: causal mode caps the tokens of a group.
std::int64_t effective_group(const UniformOptions& options, std::int64_t tokens, std::int64_t channels) {
  if (options.axis == Axis::kPerChannel && options.causality == Causality::kCausal) {
    return options.group > 0 ? std::min(options.group, kCausalGroupTokens) : kCausalGroupTokens;
  }
  const std::int64_t length = options.axis == Axis::kPerToken ? channels : tokens;
  return options.group > 0 ? std::min(options.group, length) : length;
}

UniformProblem make_problem(const TensorView& x, const TensorView& out, const UniformOptions& options, void* stream) {
  UniformProblem problem;
  problem.x = x.data;
  problem.out = out.data;
  problem.dtype = x.dtype;
  problem.tokens = x.shape[0];
  problem.channels = x.shape[1];
  problem.x_token_stride = x.strides[0];
  problem.x_channel_stride = x.strides[1];
  problem.out_token_stride = out.strides[0];
  problem.out_channel_stride = out.strides[1];
  problem.options = options;
  problem.options.protected_tokens = std::min(options.protected_tokens, problem.tokens);
  problem.group = effective_group(options, problem.tokens, problem.channels);
  problem.stream = stream;
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

UniformCounts simulate_sequence(const TensorView& x, const TensorView& out, const UniformOptions& options,
                                std::int64_t batch_index, UniformFunction function, void* stream) {
  UniformOutcome outcome;
  const bool on_cpu = x.device.kind == DeviceKind::kCpu;
  if (on_cpu && (x.strides[1] != 1 || out.strides[1] != 1)) {
    const PackedSequence packed_x(x);
    const PackedSequence packed_out(packed_x.view());
    outcome = function(make_problem(packed_x.view(), packed_out.view(), options, stream));
    if (outcome.all_finite) packed_out.unpack_to(out);
  } else {
    outcome = function(make_problem(x, out, options, stream));
  }
  if (!outcome.all_finite && on_cpu && !is_same_view(x, out)) {
    require_finite(x, make_problem(x, out, options, stream), batch_index);
  }
  require_all_finite(outcome, x, batch_index);
  return outcome.counts;
}

}  // namespace

UniformCounts simulate_uniform(const TensorView& x, const TensorView& out, const UniformOptions& options,
                               void* stream) {
  require_sequence_pair(x, out);
  require_options(options);
  const auto function = select<UniformFunction>(Operation::kSimulateUniform, x.device.kind);
  UniformCounts counts;
  if (x.num_elements() == 0) return counts;
  const bool in_place = is_same_view(x, out);
  const bool on_cpu = x.device.kind == DeviceKind::kCpu;
  // In place, a bad value must be found before anything is overwritten. The CUDA side sees to that within a sequence.
  const bool check_first = in_place && options.bits < 16 && (on_cpu || num_sequences(x) > 1);
  for (std::int64_t i = 0; check_first && i < num_sequences(x); ++i) {
    UniformProblem problem = make_problem(sequence(x, i), sequence(x, i), options, stream);
    problem.only_check = true;
    if (on_cpu) {
      require_finite(sequence(x, i), problem, i);
    } else {
      require_all_finite(function(problem), sequence(x, i), i);
    }
  }
  for (std::int64_t i = 0; i < num_sequences(x); ++i) {
    const TensorView source = sequence(x, i);
    const TensorView target = sequence(out, i);
    if (options.bits == 16 && on_cpu) {
      copy_sequence(source, target);
      continue;
    }
    const UniformCounts one = simulate_sequence(source, target, options, i, function, stream);
    counts.quantized += one.quantized;
    counts.vectors += one.vectors;
    counts.outliers += one.outliers;
  }
  return counts;
}

}  // namespace kvpack
