// Per token: a vector lies in a row and stays in the first cache level for its two or three sweeps.

namespace kvpack::KVPACK_ISA {
namespace {

/// Range of a vector. Returns false when a value is not finite.
template <typename T>
inline bool find_range(const T* x, std::int64_t count, float& low, float& high) {
  F32 low_lanes = set1(std::numeric_limits<float>::infinity());
  F32 high_lanes = set1(-std::numeric_limits<float>::infinity());
  Mask bad = mask_from_bits(0);
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const F32 value = load(x + i);
    low_lanes = min(value, low_lanes);
    high_lanes = max(value, high_lanes);
    bad = either(bad, is_nonfinite(value));
  }
  low = reduce_min(low_lanes);
  high = reduce_max(high_lanes);
  bool all_finite = bits(bad) == 0;
  for (; i < count; ++i) {
    const float value = to_float(x[i]);
    low = value < low ? value : low;
    high = value > high ? value : high;
    all_finite = all_finite && std::isfinite(value);
  }
  return all_finite;
}

/// Outlier thresholds and dense range of one vector of floats. `scratch` holds 3 * (count + kLanes) floats.
inline OutlierSplit split_row(const float* values, std::int64_t count, const OutlierPlan& plan, float* scratch) {
  const std::int64_t top_length = upper_tail_length(plan, count);
  const std::int64_t bottom_length = lower_tail_length(plan);
  const std::int64_t longest = top_length > bottom_length ? top_length : bottom_length;
  float* top = scratch;
  float* bottom = top + count + kLanes;
  if (tails_are_short(plan, count) && count >= kLanes) {
    // Pivots: extremes of 2k blocks, a block being one lane of a run of registers. The k-th largest of these maxima is
    // at most the k-th largest element, and only about 1.4 k elements lie above it.
    const std::int64_t chunks = divide_up(2 * longest, kLanes);
    const std::int64_t chunk = count / kLanes / chunks * kLanes;
    for (std::int64_t b = 0; b < chunks; ++b) {
      F32 high = load(values + b * chunk);
      F32 low = high;
      for (std::int64_t i = kLanes; i < chunk; i += kLanes) {
        const F32 value = load(values + b * chunk + i);
        high = max(value, high);
        low = min(value, low);
      }
      store(top + b * kLanes, high);
      store(bottom + b * kLanes, low);
    }
    const float top_pivot = select_largest(top, chunks * kLanes, top_length);
    const float bottom_pivot = select_smallest(bottom, chunks * kLanes, bottom_length);
    std::int64_t num_top = 0;
    std::int64_t num_bottom = 0;
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const F32 value = load(values + i);
      num_top += compress_store(top + num_top, ge(value, set1(top_pivot)), value);
      num_bottom += compress_store(bottom + num_bottom, le(value, set1(bottom_pivot)), value);
    }
    for (; i < count; ++i) {
      if (values[i] >= top_pivot) top[num_top++] = values[i];
      if (values[i] <= bottom_pivot) bottom[num_bottom++] = values[i];
    }
    OutlierSplit split;
    if (split_from_tails({top, num_top}, {bottom, num_bottom}, count, plan, split)) return split;
  }
  std::memcpy(scratch, values, static_cast<std::size_t>(count) * sizeof(float));
  return split_by_selection(scratch, count, plan);
}

/// Elements at or beyond the thresholds of a calibrated vector.
template <typename T>
inline std::int64_t count_outliers(const T* x, std::int64_t count, const VectorGrid& vector) {
  std::int64_t outliers = 0;
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const F32 value = load(x + i);
    outliers += std::popcount(bits(either(ge(value, set1(vector.upper)), le(value, set1(vector.lower)))));
  }
  for (; i < count; ++i) outliers += to_float(x[i]) >= vector.upper || to_float(x[i]) <= vector.lower;
  return outliers;
}

/// Root mean square of a vector, in the strands of quantize/codebook.h.
template <typename T>
inline UniformGrid find_rms(const T* x, std::int64_t count) {
  constexpr int kRegisters = kStrands / kLanes;
  F32 sums[kRegisters];
  for (F32& sum : sums) sum = set1(0.0f);
  std::int64_t i = 0;
  for (; i + kStrands <= count; i += kStrands) {
    for (int r = 0; r < kRegisters; ++r) {
      const F32 value = load(x + i + r * kLanes);
      sums[r] = add(sums[r], mul(value, value));
    }
  }
  float strands[kStrands];
  for (int r = 0; r < kRegisters; ++r) store(strands + r * kLanes, sums[r]);
  for (std::int64_t strand = 0; i < count; ++i, ++strand) {
    const float value = to_float(x[i]);
    strands[strand] = strands[strand] + value * value;
  }
  return make_rms_grid(join_strands(strands), count);
}

/// Writes the whole registers of a vector; returns how many elements that were.
template <Outliers kOutliers, Steps kSteps, typename T>
inline std::int64_t write_registers(const T* x, T* out, std::int64_t count, const VectorGrid& vector,
                                    const UniformProblem& problem) {
  const GridLanes lanes{set1(vector.qs), set1(vector.offset), set1(vector.qs == 0.0f ? 0.0f : 1.0f / vector.qs)};
  const F32 upper = set1(vector.upper);
  const F32 lower = set1(vector.lower);
  const RuleLanes rule = make_rule(problem);
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(out + i, simulate_lanes<kOutliers, kSteps>(load(x + i), lanes, upper, lower, rule));
  }
  return i;
}

template <Outliers kOutliers, typename T>
inline void write_row(const T* x, T* out, std::int64_t count, const VectorGrid& vector, const UniformProblem& problem) {
  std::int64_t i = 0;
  if constexpr (!std::is_same_v<T, double>) {
    if (problem.codebook != nullptr) {
      i = write_registers<kOutliers, Steps::kCodebook>(x, out, count, vector, problem);
    } else if (suits_reciprocal(vector.qs, vector.offset)) {
      i = write_registers<kOutliers, Steps::kReciprocal>(x, out, count, vector, problem);
    } else {
      i = write_registers<kOutliers, Steps::kDivision>(x, out, count, vector, problem);
    }
  }
  const UniformGrid grid{vector.qs, vector.offset};
  for (; i < count; ++i) out[i] = simulate_element<kOutliers>(x[i], grid, vector.upper, vector.lower, problem);
}

/// One vector along channels; `fixed` is its calibrated grid, or null. `scratch` holds 4 * (count + kLanes) floats.
/// Returns false, and writes nothing, when a value is not finite.
template <Outliers kOutliers, typename T>
inline bool simulate_row(const T* x, T* out, std::int64_t count, const UniformProblem& problem, const VectorGrid* fixed,
                         float* scratch, std::int64_t& outliers) {
  OutlierSplit split;
  if (!find_range(x, count, split.low, split.high)) return false;
  if (fixed != nullptr) {
    if constexpr (kOutliers == Outliers::kKept) outliers += count_outliers(x, count, *fixed);
    write_row<kOutliers>(x, out, count, *fixed, problem);
    return true;
  }
  if constexpr (kOutliers == Outliers::kKept) {
    const OutlierPlan plan = make_outlier_plan(problem.options.outlier_fraction, count);
    float* values = scratch + 3 * (count + kLanes);
    for (std::int64_t i = 0; i < count; ++i) values[i] = to_float(x[i]);
    split = split_row(values, count, plan, scratch);
    outliers += split.outliers;
  }
  const bool has_rms = problem.options.scale == ScaleRule::kRms;
  const UniformGrid grid = has_rms ? find_rms(x, count) : make_range_grid(split.low, split.high, problem.options);
  write_row<kOutliers>(x, out, count, VectorGrid{grid.qs, grid.offset, split.upper, split.lower}, problem);
  return true;
}

/// Tokens [first, end): every group of channels of each.
template <Outliers kOutliers, typename T>
bool simulate_tokens(const UniformProblem& problem, std::int64_t first, std::int64_t end, UniformCounts& counts) {
  float* scratch = thread_scratch(4 * (problem.group + kLanes));
  bool all_finite = true;
  for (std::int64_t token = first; token < end; ++token) {
    const T* x = static_cast<const T*>(problem.x) + token * problem.x_token_stride;
    T* out = static_cast<T*>(problem.out) + token * problem.out_token_stride;
    for (std::int64_t c = 0; c < problem.channels; c += problem.group) {
      const std::int64_t count = problem.channels - c < problem.group ? problem.channels - c : problem.group;
      const VectorGrid* fixed = problem.static_grids == nullptr ? nullptr : &static_grid(problem, token, c);
      all_finite &= simulate_row<kOutliers>(x + c, out + c, count, problem, fixed, scratch, counts.outliers);
      counts.vectors += 1;
      counts.quantized += count;
    }
  }
  return all_finite;
}

}  // namespace
}  // namespace kvpack::KVPACK_ISA
