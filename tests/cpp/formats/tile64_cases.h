// The inputs of every test of the tile formats; each is compressed as keys and as values, in all five widths.
#pragma once

#include <string>
#include <vector>

#include "kvpack/kvpack.h"
#include "support/matrix.h"

namespace kvpack::test {

struct TileCase {
  const char* name;  // why it is here
  std::int64_t batches;
  std::int64_t tokens;
  std::int64_t head_dim;
  double sparsity;
  Fill fill = Fill::kNormal;
  DType dtype = DType::kFloat16;
  PruneRule rule = PruneRule::kExact;
  Layout layout = {};
  std::int64_t heads = 0;  // > 0: x is [batches / heads, heads, tokens, head_dim] with heads inside a row
  int scores = 0;          // 1: one vector for all batches, 2: one for each
};

inline constexpr std::int32_t kAllBits[] = {16, 8, 4, 2, 1};
inline constexpr CacheKind kAllKinds[] = {CacheKind::kKey, CacheKind::kValue};

inline const std::vector<TileCase>& tile_cases() {
  constexpr PruneRule kPublished = PruneRule::kKthValue;
  static const std::vector<TileCase> cases{
      {"no token", 2, 0, 64, 0.7},
      {"no batch", 0, 64, 64, 0.7},
      {"one token", 2, 1, 64, 0.7},
      {"one below a block", 2, 63, 128, 0.7},
      {"one block", 3, 64, 128, 0.7},
      {"one above a block", 2, 65, 128, 0.7},
      {"two blocks", 3, 128, 64, 0.5},
      {"three blocks, head 256", 2, 192, 256, 0.7},
      {"a long ragged one", 1, 300, 128, 0.7},
      {"bfloat16", 3, 130, 128, 0.7, Fill::kNormal, DType::kBFloat16},
      {"float32", 3, 130, 128, 0.7, Fill::kNormal, DType::kFloat32},
      {"all kept: full tiles", 2, 70, 64, 0.0},
      {"all kept, float32", 2, 64, 64, 0.0, Fill::kNormal, DType::kFloat32},
      {"nothing survives", 2, 70, 128, 0.7, Fill::kNothing},
      {"one survivor in a block", 2, 130, 128, 0.7, Fill::kLone},
      {"one kept in a row", 2, 66, 64, 0.99},
      {"all equal: a grid without width", 2, 66, 64, 0.5, Fill::kConstant},
      {"ties go to lower channels", 2, 66, 64, 0.5, Fill::kTies},
      {"ties stay together", 2, 66, 64, 0.5, Fill::kTies, DType::kFloat16, kPublished},
      {"published rule", 2, 130, 128, 0.7, Fill::kNormal, DType::kFloat16, kPublished},
      {"zeros of both signs survive pruning but not packing", 2, 66, 64, 0.3, Fill::kZeros},
      {"NaN, infinities, denormals", 2, 130, 64, 0.5, Fill::kSpecial},
      {"NaN, infinities, denormals in float32", 2, 130, 64, 0.5, Fill::kSpecial, DType::kFloat32},
      {"NaN, infinities, bfloat16, all kept", 2, 66, 64, 0.0, Fill::kSpecial, DType::kBFloat16},
      {"a scale that vanishes", 2, 66, 64, 0.5, Fill::kDenormal, DType::kFloat32},
      {"denormals of bfloat16", 2, 66, 64, 0.5, Fill::kDenormal, DType::kBFloat16},
      {"a span beyond float32", 2, 66, 64, 0.5, Fill::kHuge, DType::kFloat32},
      {"far from zero", 2, 66, 64, 0.5, Fill::kPositive},
      {"negative", 2, 66, 64, 0.5, Fill::kNegative},
      {"padded rows, unaligned start", 2, 66, 64, 0.7, Fill::kNormal, DType::kFloat16, PruneRule::kExact, {1, 3, 1}},
      {"heads inside a row", 6, 66, 64, 0.7, Fill::kNormal, DType::kFloat16, PruneRule::kExact, {}, 3},
      {"heads inside a padded row", 4, 66, 128, 0.7, Fill::kNormal, DType::kFloat32, PruneRule::kExact, {1, 5, 3}, 2},
      {"scores", 3, 66, 64, 0.7, Fill::kNormal, DType::kFloat16, PruneRule::kExact, {}, 0, 1},
      {"scores for each batch", 3, 66, 128, 0.7, Fill::kNormal, DType::kBFloat16, PruneRule::kExact, {}, 0, 2},
      {"scores, published rule", 3, 66, 64, 0.5, Fill::kTies, DType::kFloat32, kPublished, {}, 0, 2},
  };
  return cases;
}

/// The input of a case, with the options and scores that go with it.
class TileInput {
 public:
  explicit TileInput(const TileCase& c)
      : matrix(c.heads > 0 ? c.batches / c.heads * c.tokens : c.batches * c.tokens,
               c.heads > 0 ? c.heads * c.head_dim : c.head_dim, c.dtype, c.layout),
        case_(c) {
    matrix.fill(c.fill, 20261121);
    for (std::int64_t i = 0; i < c.batches * c.head_dim; ++i) {
      scores_.push_back(0.25f + static_cast<float>((i * 37) % 101) / 16.0f);
    }
  }
  [[nodiscard]] TensorView view() const { return view_of(matrix); }
  /// A matrix of the same layout, seen in the same way.
  [[nodiscard]] TensorView view_of(const Matrix& same) const {
    TensorView view = same.view();
    const std::int64_t row = view.strides[0];
    const std::int64_t batch = case_.heads > 0 ? case_.batches / case_.heads : case_.batches;
    if (case_.heads > 0) {
      view.rank = 4;
      view.shape = {batch, case_.heads, case_.tokens, case_.head_dim};
      view.strides = {case_.tokens * row, case_.head_dim, row, 1};
    } else {
      view.rank = 3;
      view.shape = {batch, case_.tokens, case_.head_dim, 0};
      view.strides = {case_.tokens * row, row, 1, 0};
    }
    return view;
  }
  [[nodiscard]] Tile64Options options() const {
    Tile64Options options;
    options.sparsity = case_.sparsity;
    options.rule = case_.rule;
    if (case_.scores > 0) options.channel_scores = scores_.data();
    if (case_.scores == 2) options.channel_scores_batch_stride = case_.head_dim;
    return options;
  }

  Matrix matrix;

 private:
  TileCase case_;
  std::vector<float> scores_;
};

}  // namespace kvpack::test
