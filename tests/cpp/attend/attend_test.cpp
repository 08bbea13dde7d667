// Attention on tiles and its two products: every implementation, the reference included, against float64 over what
// unpack_tile64 writes.
#include <gtest/gtest.h>

#include "attend/attend_cases.h"
#include "formats/tile64_cases.h"
#include "support/implementations.h"
#include "support/tiles.h"
#include "support/tolerances.h"

namespace kvpack::test {
namespace {

/// One side of a cache: its tiles, and the values they unpack to in the type of the queries.
struct Side {
  Side(const AttendCase& c, CacheKind kind, std::uint32_t seed)
      : tiles(kind, kind == CacheKind::kKey ? c.key_bits : c.value_bits, c.batch * c.kv_heads, c.tokens, c.head_dim,
              c.dtype),
        values(c.batch * c.kv_heads * c.tokens, c.head_dim, c.dtype),
        recent(c.recent_heads_inside ? c.batch * c.recent : c.batch * c.kv_heads * c.recent,
               c.recent_heads_inside ? c.kv_heads * c.head_dim : c.head_dim, c.dtype) {
    const Forced forced("reference");
    Matrix x(values.tokens(), c.head_dim, c.dtype);
    x.fill(Fill::kNormal, seed);
    recent.fill(Fill::kNormal, seed + 1);
    Tile64Options options;
    options.sparsity = c.sparsity;
    compress(as_batches(x, c.batch * c.kv_heads), options, tiles);
    unpack_tile64(tiles.view(), as_batches(values, c.batch * c.kv_heads));
  }
  [[nodiscard]] TensorView recent_view(const AttendCase& c) const {
    if (c.recent == 0) return {};
    if (c.recent_heads_inside) return as_heads(recent, c.batch, c.kv_heads);
    TensorView view = as_batches(recent, c.batch * c.kv_heads);
    view.rank = 4;
    view.shape = {c.batch, c.kv_heads, c.recent, c.head_dim};
    view.strides = {c.kv_heads * view.strides[0], view.strides[0], view.strides[1], 1};
    return view;
  }
  /// Element of KV head b (through all sequences), tiles first and then the window.
  [[nodiscard]] double get(const AttendCase& c, std::int64_t b, std::int64_t token, std::int64_t channel) const {
    if (token < c.tokens) return values.get(b * c.tokens + token, channel);
    const std::int64_t t = token - c.tokens;
    if (!c.recent_heads_inside) return recent.get(b * c.recent + t, channel);
    return recent.get(b / c.kv_heads * c.recent + t, b % c.kv_heads * c.head_dim + channel);
  }

  Tiles tiles;
  Matrix values;
  Matrix recent;
};

/// A contiguous matrix [heads * rows, columns] seen as [heads, rows, columns] or [batch, q_heads, rows, columns].
TensorView contiguous_view(const Matrix& matrix, std::initializer_list<std::int64_t> shape) {
  TensorView view = make_view(matrix.view().data, matrix.view().dtype, shape);
  return view;
}

/// Relative error by norm; 0 for two empty or zero vectors, and NaN stays NaN.
double relative_error(const std::vector<double>& expected, const Matrix& actual) {
  double error = 0.0;
  double norm = 0.0;
  for (std::int64_t r = 0; r < actual.tokens(); ++r) {
    for (std::int64_t c = 0; c < actual.channels(); ++c) {
      const double wanted = expected[static_cast<std::size_t>(r * actual.channels() + c)];
      error += (actual.get(r, c) - wanted) * (actual.get(r, c) - wanted);
      norm += wanted * wanted;
    }
  }
  return norm == 0.0 ? std::sqrt(error) : std::sqrt(error / norm);
}

class MultiplyTile64 : public ImplementationTest {};
class AttendTile64 : public ImplementationTest {};
std::vector<std::string> with_reference(const std::string& operation) {
  std::vector<std::string> names = cpu_implementations(operation);
  names.insert(names.begin(), "reference");
  return names;
}
INSTANTIATE_TEST_SUITE_P(Cpu, MultiplyTile64, ::testing::ValuesIn(with_reference("multiply_tile64")), test_name);
INSTANTIATE_TEST_SUITE_P(Cpu, AttendTile64, ::testing::ValuesIn(with_reference("attend_tile64")), test_name);

TEST_P(MultiplyTile64, KeysAndValuesEqualFloat64OverUnpackedValues) {
  for (const AttendCase& c : attend_cases()) {
    for (const CacheKind kind : kAllKinds) {
      SCOPED_TRACE(std::string(c.name) + (kind == CacheKind::kKey ? ", keys" : ", values"));
      const Side side(c, kind, kSeed);
      const bool is_key = kind == CacheKind::kKey;
      const std::int64_t heads = c.batch * c.kv_heads * c.group;
      const std::int64_t x_columns = is_key ? c.head_dim : c.tokens;
      const std::int64_t out_columns = is_key ? c.tokens : c.head_dim;
      Matrix x(heads * c.rows, x_columns, c.dtype);
      Matrix out(heads * c.rows, out_columns, c.dtype);
      x.fill(Fill::kNormal, kSeed + 5);
      force_implementation(GetParam());
      (is_key ? multiply_keys : multiply_values)(side.tiles.view(), contiguous_view(x, {heads, c.rows, x_columns}),
                                                 contiguous_view(out, {heads, c.rows, out_columns}), {}, nullptr);
      EXPECT_EQ(last_implementation(), GetParam());
      std::vector<double> expected;
      for (std::int64_t r = 0; r < out.tokens(); ++r) {
        const std::int64_t b = r / c.rows / c.group;
        for (std::int64_t column = 0; column < out_columns; ++column) {
          double sum = 0.0;
          for (std::int64_t k = 0; k < x_columns; ++k) {
            sum += x.get(r, k) * (is_key ? side.get(c, b, column, k) : side.get(c, b, k, column));
          }
          expected.push_back(sum);
        }
      }
      EXPECT_LE(relative_error(expected, out), attend_tolerance(c.dtype));
      EXPECT_TRUE(out.guards_are_intact());
    }
  }
}

/// Queries whose scores are a few units, as a model's are: a softmax that is all but a maximum would multiply the
/// rounding of keys.
void fill_queries(Matrix& q) {
  q.fill(Fill::kNormal, kSeed + 7);
  for (std::int64_t r = 0; r < q.tokens(); ++r) {
    for (std::int64_t c = 0; c < q.channels(); ++c) q.set(r, c, q.get(r, c) / 16.0);
  }
}

/// What attention gives in float64, and its log-sum-exps.
struct Attended {
  std::vector<double> out;
  std::vector<double> lse;
};

Attended attend_exactly(const AttendCase& c, const Side& keys, const Side& values, const Matrix& q) {
  Attended result;
  const double scale = c.scale > 0.0 ? c.scale : 1.0 / std::sqrt(static_cast<double>(c.head_dim));
  for (std::int64_t r = 0; r < q.tokens(); ++r) {
    const std::int64_t b = r / c.rows / c.group;
    std::int64_t tokens = c.tokens + c.recent;
    if (c.masking == Masking::kCausal) tokens -= c.rows - 1 - r % c.rows;
    std::vector<double> weights;
    double total = 0.0;
    for (std::int64_t t = 0; t < tokens; ++t) {
      double score = 0.0;
      for (std::int64_t k = 0; k < c.head_dim; ++k) score += q.get(r, k) * keys.get(c, b, t, k);
      score *= scale;
      if (c.softcap > 0.0) score = c.softcap * std::tanh(score / c.softcap);
      weights.push_back(std::exp(score));  // scores of the cases are small: no maximum needed
      total += weights.back();
    }
    for (std::int64_t k = 0; k < c.head_dim; ++k) {
      double sum = 0.0;
      for (std::int64_t t = 0; t < tokens; ++t) sum += weights[static_cast<std::size_t>(t)] * values.get(c, b, t, k);
      result.out.push_back(tokens == 0 ? 0.0 : sum / total);
    }
    result.lse.push_back(std::log(total));
  }
  return result;
}

TEST_P(AttendTile64, EqualsFloat64OverUnpackedValues) {
  for (const AttendCase& c : attend_cases()) {
    SCOPED_TRACE(c.name);
    const Side keys(c, CacheKind::kKey, kSeed);
    const Side values(c, CacheKind::kValue, kSeed + 9);
    const std::int64_t q_heads = c.kv_heads * c.group;
    Matrix q(c.batch * q_heads * c.rows, c.head_dim, c.dtype);
    Matrix out(q.tokens(), c.head_dim, c.dtype);
    Matrix again(q.tokens(), c.head_dim, c.dtype);
    Part lse(DType::kFloat32, {c.batch, q_heads, c.rows});
    fill_queries(q);
    AttendOptions options;
    options.scale = c.scale;
    options.softcap = c.softcap;
    options.masking = c.masking;
    const std::initializer_list<std::int64_t> shape{c.batch, q_heads, c.rows, c.head_dim};
    force_implementation(GetParam());
    attend_tile64(keys.tiles.view(), values.tiles.view(), contiguous_view(q, shape), keys.recent_view(c),
                  values.recent_view(c), options, contiguous_view(out, shape), lse.view(), {});
    EXPECT_EQ(last_implementation(), GetParam());
    attend_tile64(keys.tiles.view(), values.tiles.view(), contiguous_view(q, shape), keys.recent_view(c),
                  values.recent_view(c), options, contiguous_view(again, shape), {}, {});
    const Attended expected = attend_exactly(c, keys, values, q);
    EXPECT_LE(relative_error(expected.out, out), attend_tolerance(c.dtype));
    EXPECT_TRUE(same_bits(out, again)) << "a second run, without lse";
    EXPECT_TRUE(out.guards_are_intact() && lse.guards_are_intact());
    for (std::size_t i = 0; i < expected.lse.size(); ++i) {
      const auto actual = static_cast<double>(lse.as<float>()[i]);
      if (std::isinf(expected.lse[i])) {
        EXPECT_EQ(actual, expected.lse[i]);
      } else {
        EXPECT_NEAR(actual, expected.lse[i], lse_tolerance(c.dtype, expected.lse[i])) << "row " << i;
      }
    }
  }
}

}  // namespace
}  // namespace kvpack::test
