// What calibration takes from samples: histograms of normalised values, and quantiles of channels. Entries and checks.
#include <algorithm>
#include <cmath>
#include <vector>

#include "codebook/implementations.h"
#include "core/check.h"
#include "core/half.h"
#include "core/parallel.h"
#include "core/sequences.h"
#include "core/with_type.h"
#include "dispatch/registry.h"
#include "quantize/codebook.h"

namespace kvpack {

namespace {

void require_samples(const TensorView& x) {
  require(x.rank == 2 || x.rank == 3, "x has shape ", shape_text(x),
          "; it is [tokens, channels] or [batch, tokens, channels]");
  require(is_floating(x.dtype), "x has type ", name_of(x.dtype), "; it is float16, bfloat16, float32 or float64");
  require(x.num_elements() == 0 || x.data != nullptr, "x has shape ", shape_text(x), " and no memory");
}

void require_protected_tokens(std::int64_t tokens) {
  require(tokens >= 0, "protected_tokens is ", tokens, "; it must be at least 0");
}

/// Throws for the first value after the protected tokens that is not finite in float32 or below `least`.
void require_values(const TensorView& x, const char* name, std::int64_t first_token, float least) {
  with_float_type(x.dtype, [&]<typename T>() {
    for (std::int64_t b = 0; b < num_sequences(x); ++b) {
      const TensorView one = sequence(x, b);
      const auto* data = static_cast<const T*>(one.data);
      for (std::int64_t t = first_token; t < one.shape[0]; ++t) {
        for (std::int64_t c = 0; c < one.shape[1]; ++c) {
          const float value = to_float(data[t * one.strides[0] + c * one.strides[1]]);
          require(std::isfinite(value) && value >= least, name, " holds ", value, " at sequence ", b, ", token ", t,
                  ", channel ", c, least < 0.0f ? "; it must be finite" : "; it must be finite and at least 0");
        }
      }
    }
  });
}

std::vector<ChannelScale> make_scales(const HistogramOptions& options, std::int64_t channels) {
  require(options.lower != nullptr && options.upper != nullptr, "lower or upper is a null pointer");
  std::vector<ChannelScale> scales(static_cast<std::size_t>(channels));
  for (std::int64_t c = 0; c < channels; ++c) {
    const float lower = options.lower[c];
    const float upper = options.upper[c];
    require(std::isfinite(lower) && std::isfinite(upper) && lower <= upper, "lower[", c, "] is ", lower, " and upper[",
            c, "] is ", upper, "; both are finite and lower is at most upper");
    const float weight = options.channel_weights == nullptr ? 1.0f : options.channel_weights[c];
    require(std::isfinite(weight) && weight >= 0.0f, "channel_weights[", c, "] is ", weight,
            "; weights are finite and at least 0");
    const UniformGrid grid = make_codebook_grid(lower, upper, false);
    scales[static_cast<std::size_t>(c)] = {grid.offset, grid.qs, weight};
  }
  return scales;
}

}  // namespace

HistogramCounts accumulate_histogram(const TensorView& x, const TensorView& element_weights,
                                     const HistogramOptions& options, const TensorView& bin_weights,
                                     const TensorView& bin_moments) {
  require_samples(x);
  require_protected_tokens(options.protected_tokens);
  const bool has_weights = element_weights.rank > 0;
  if (has_weights) {
    require(element_weights.rank == x.rank && element_weights.shape == x.shape &&
                element_weights.dtype == DType::kFloat32 && element_weights.device == x.device,
            "element_weights is ", shape_text(element_weights), " ", name_of(element_weights.dtype), " on ",
            device_text(element_weights.device), "; x of shape ", shape_text(x), " on ", device_text(x.device),
            " needs the same shape and device in float32");
  }
  require_exact(bin_weights, {"bin_weights"}, DType::kFloat64, {kHistogramBins}, x.device);
  require_exact(bin_moments, {"bin_moments"}, DType::kFloat64, {kHistogramBins}, x.device);
  require(!may_overlap(bin_weights, bin_moments), "bin_weights overlaps bin_moments");
  const auto function = select<HistogramFunction>(Operation::kAccumulateHistogram, x.device.kind);
  const std::int64_t channels = x.shape[static_cast<std::size_t>(x.rank - 1)];
  const std::vector<ChannelScale> scales = make_scales(options, channels);
  HistogramCounts counts;
  if (x.num_elements() == 0) return counts;
  require_values(x, "x", options.protected_tokens, -HUGE_VALF);
  if (has_weights) require_values(element_weights, "element_weights", options.protected_tokens, 0.0f);
  for (std::int64_t b = 0; b < num_sequences(x); ++b) {
    const TensorView one = sequence(x, b);
    const std::int64_t first = std::min(options.protected_tokens, one.shape[0]);
    HistogramProblem problem;
    problem.x = static_cast<const char*>(one.data) + first * one.strides[0] * element_bytes(x.dtype);
    problem.dtype = x.dtype;
    problem.tokens = one.shape[0] - first;
    problem.channels = channels;
    problem.x_token_stride = one.strides[0];
    problem.x_channel_stride = one.strides[1];
    if (has_weights) {
      const TensorView weights = sequence(element_weights, b);
      problem.element_weights = static_cast<const float*>(weights.data) + first * weights.strides[0];
      problem.weights_token_stride = weights.strides[0];
      problem.weights_channel_stride = weights.strides[1];
    }
    problem.scales = scales.data();
    problem.bin_weights = static_cast<double*>(bin_weights.data);
    problem.bin_moments = static_cast<double*>(bin_moments.data);
    const HistogramCounts one_counts = function(problem);
    counts.counted += one_counts.counted;
    counts.outside += one_counts.outside;
  }
  return counts;
}

namespace {

/// numpy's linear rule: position q * (n - 1) in float64, interpolated from the nearer neighbour.
float quantile_of(std::vector<float>& values, double q) {
  const double position = q * static_cast<double>(values.size() - 1);
  const double below = std::floor(position);
  const auto place = std::min(static_cast<std::ptrdiff_t>(below), static_cast<std::ptrdiff_t>(values.size() - 1));
  std::nth_element(values.begin(), values.begin() + place, values.end());
  const auto low = static_cast<double>(values[static_cast<std::size_t>(place)]);
  if (place + 1 == static_cast<std::ptrdiff_t>(values.size())) return static_cast<float>(low);
  const auto high = static_cast<double>(*std::min_element(values.begin() + place + 1, values.end()));
  const double weight = position - below;
  const double step = high - low;
  return static_cast<float>(weight < 0.5 ? low + step * weight : high - step * (1.0 - weight));
}

}  // namespace

void find_channel_quantiles(const TensorView& x, const double* quantiles, std::int64_t num_quantiles,
                            std::int64_t protected_tokens, const TensorView& out) {
  require_samples(x);
  require_protected_tokens(protected_tokens);
  require(x.device.kind == DeviceKind::kCpu, "x is on ", device_text(x.device),
          "; quantiles of channels are found on cpu");
  require(num_quantiles >= 0 && (quantiles != nullptr || num_quantiles == 0), "quantiles is null for ", num_quantiles);
  for (std::int64_t i = 0; i < num_quantiles; ++i) {
    require(quantiles[i] >= 0.0 && quantiles[i] <= 1.0, "quantiles[", i, "] is ", quantiles[i], "; it is 0 to 1");
  }
  const TensorView first = sequence(x, 0);
  const std::int64_t channels = first.shape[1];
  require_exact(out, {"out"}, DType::kFloat32, {num_quantiles, channels}, x.device);
  const std::int64_t rows = std::max<std::int64_t>(first.shape[0] - protected_tokens, 0) * num_sequences(x);
  require(rows > 0 || channels == 0, "x of shape ", shape_text(x), " has no token after ", protected_tokens,
          " protected ones; a quantile needs one");
  require_values(x, "x", protected_tokens, -HUGE_VALF);
  auto task = [&](std::int64_t c) {
    std::vector<float> values;
    values.reserve(static_cast<std::size_t>(rows));
    with_float_type(x.dtype, [&]<typename T>() {
      for (std::int64_t b = 0; b < num_sequences(x); ++b) {
        const TensorView one = sequence(x, b);
        const T* column = static_cast<const T*>(one.data) + c * one.strides[1];
        for (std::int64_t t = protected_tokens; t < one.shape[0]; ++t) {
          values.push_back(to_float(column[t * one.strides[0]]));
        }
      }
    });
    for (std::int64_t i = 0; i < num_quantiles; ++i) {
      static_cast<float*>(out.data)[i * channels + c] = quantile_of(values, quantiles[i]);
    }
  };
  parallel_for(channels, task);
}

}  // namespace kvpack
