// Softmax over blocks of 64 scores as they come: each column keeps its largest score and the sum of exp(score - largest).
// In the SIMD vocabulary.

namespace kvpack::KVPACK_ISA {
namespace {

inline constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

/// exp(x) for x <= 0; NaN stays.
inline F32 exp_or_nan(F32 x) { return blend(eq(x, x), exp_nonpositive(x), x); }

/// softcap * tanh(score / softcap); NaN stays. With e = exp(-2|y|), tanh |y| = (1 - e) / (1 + e): its absolute error of
/// 1e-7 is that of the score it makes.
inline F32 cap(F32 score, float softcap) {
  const F32 y = div(score, set1(softcap));
  const F32 e = exp_nonpositive(mul(set1(-2.0f), max(y, sub(set1(0.0f), y))));
  const F32 magnitude = div(sub(set1(1.0f), e), add(set1(1.0f), e));
  const F32 signed_tanh = blend(gt(y, set1(0.0f)), magnitude, sub(set1(0.0f), magnitude));
  return blend(eq(y, y), mul(set1(softcap), signed_tanh), y);
}

/// What one column of a task has seen.
struct ColumnState {
  float largest = kMinusInfinity;
  float total = 0.0f;  // of exp(score - largest)
};

inline void scale_sums(float* sums, std::int64_t count, float factor) {
  for (std::int64_t i = 0; i < count; i += kLanes) store(sums + i, mul(load(sums + i), set1(factor)));
}

/// Turns 64 scores into weights exp(score - largest), of which those from `visible` on are 0, and rescales what the
/// column has summed up when its largest score grows.
inline void weigh_block(float* scores, std::int64_t visible, float softcap, ColumnState& state, float* sums,
                        std::int64_t head_dim) {
  if (softcap != 0.0f) {
    for (int i = 0; i < kTileElements; i += kLanes) store(scores + i, cap(load(scores + i), softcap));
  }
  for (std::int64_t t = std::max<std::int64_t>(visible, 0); t < kTileElements; ++t) scores[t] = kMinusInfinity;
  F32 top = load(scores);
  for (int i = kLanes; i < kTileElements; i += kLanes) top = max(load(scores + i), top);
  const float block_largest = reduce_max(top);
  if (block_largest > state.largest) {
    if (state.total != 0.0f) {
      const float factor = std::exp(state.largest - block_largest);
      state.total *= factor;
      scale_sums(sums, head_dim, factor);
    }
    state.largest = block_largest;
  }
  // No score above -infinity so far: any base makes all weights 0.
  const float base = state.largest == kMinusInfinity ? 0.0f : state.largest;
  F32 total = set1(0.0f);
  for (int i = 0; i < kTileElements; i += kLanes) {
    const F32 weight = exp_or_nan(sub(load(scores + i), set1(base)));
    store(scores + i, weight);
    total = add(total, weight);
  }
  state.total += reduce_add(total);
}

}  // namespace
}  // namespace kvpack::KVPACK_ISA
