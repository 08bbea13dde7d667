// Reference of attention on tiles and of its two products: float64 over the values that unpack_tile64 would write.
// Plain and slow; every other implementation is compared with this one, by norm.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "attend/implementations.h"
#include "formats/tile64/codec_ref.h"

namespace kvpack::reference {

namespace {

/// Rows of one KV head: all tokens, first those of the tiles and then the recent ones, as float64 [tokens, head_dim].
template <typename T>
std::vector<double> widen(const std::vector<T>& matrix) {
  std::vector<double> result;
  for (const T value : matrix) result.push_back(static_cast<double>(to_float(value)));
  return result;
}

template <typename T>
void append_recent(const DenseMatrices& recent, std::int64_t batch, std::int64_t tokens, std::int64_t head_dim,
                   std::vector<double>& matrix) {
  for (std::int64_t t = 0; t < tokens; ++t) {
    const T* row = static_cast<const T*>(recent.data) + recent.row_start(batch, t);
    for (std::int64_t c = 0; c < head_dim; ++c) matrix.push_back(static_cast<double>(to_float(row[c])));
  }
}

template <typename T>
void multiply_as(const MultiplyTile64Problem& problem) {
  const Tile64Data& tiles = problem.tiles;
  const bool is_key = tiles.kind == CacheKind::kKey;
  const std::int64_t x_columns = is_key ? tiles.head_dim : tiles.tokens;
  const std::int64_t out_columns = is_key ? tiles.tokens : tiles.head_dim;
  const std::int64_t rows = problem.group * problem.rows;  // of one batch
  for (std::int64_t b = 0; b < tiles.batches; ++b) {
    const std::vector<double> matrix = widen(unpack_batch<T>(tiles, b));
    for (std::int64_t i = b * rows; i < (b + 1) * rows; ++i) {
      const T* x = static_cast<const T*>(problem.x) + i * x_columns;
      T* out = static_cast<T*>(problem.out) + i * out_columns;
      for (std::int64_t column = 0; column < out_columns; ++column) {
        double sum = 0.0;
        for (std::int64_t k = 0; k < x_columns; ++k) {
          const std::int64_t place = is_key ? column * tiles.head_dim + k : k * tiles.head_dim + column;
          sum += static_cast<double>(to_float(x[k])) * matrix[static_cast<std::size_t>(place)];
        }
        from_float(static_cast<float>(sum), out[column]);
      }
    }
  }
}

/// Tokens that query row `row` sees, tiles first.
std::int64_t visible_tokens(const AttendTile64Problem& problem, std::int64_t row) {
  const std::int64_t all = problem.keys.tokens + problem.recent_tokens;
  return problem.masking == Masking::kCausal ? all - (problem.rows - 1 - row) : all;
}

/// The score of one token after scale and softcap.
double score(const AttendTile64Problem& problem, const double* q, const double* key) {
  double sum = 0.0;
  for (std::int64_t c = 0; c < problem.keys.head_dim; ++c) sum += q[c] * key[c];
  sum *= static_cast<double>(problem.scale);
  const auto softcap = static_cast<double>(problem.softcap);
  return softcap > 0.0 ? softcap * std::tanh(sum / softcap) : sum;
}

/// One query row over the visible tokens of one KV head.
template <typename T>
void attend_row(const AttendTile64Problem& problem, std::int64_t i, const std::vector<double>& keys,
                const std::vector<double>& values) {
  const std::int64_t head_dim = problem.keys.head_dim;
  const auto tokens = static_cast<std::size_t>(visible_tokens(problem, i % problem.rows));
  std::vector<double> q;
  for (std::int64_t c = 0; c < head_dim; ++c) {
    q.push_back(static_cast<double>(to_float(static_cast<const T*>(problem.q)[i * head_dim + c])));
  }
  std::vector<double> weights;
  double largest = -std::numeric_limits<double>::infinity();
  for (std::size_t t = 0; t < tokens; ++t) {
    weights.push_back(score(problem, q.data(), keys.data() + t * static_cast<std::size_t>(head_dim)));
    largest = std::max(largest, weights.back());
  }
  // No score above -infinity, or none at all: all weights are 0, and so is the result.
  const double origin = std::isinf(largest) && largest < 0.0 ? 0.0 : largest;
  double total = 0.0;
  for (double& weight : weights) total += weight = std::exp(weight - origin);
  for (std::int64_t c = 0; c < head_dim; ++c) {
    double sum = 0.0;
    for (std::size_t t = 0; t < tokens; ++t)
      sum += weights[t] * values[t * static_cast<std::size_t>(head_dim) + static_cast<std::size_t>(c)];
    from_float(total == 0.0 ? 0.0f : static_cast<float>(sum / total), static_cast<T*>(problem.out)[i * head_dim + c]);
  }
  if (problem.lse != nullptr) problem.lse[i] = static_cast<float>(origin + std::log(total));
}

template <typename T>
void attend_as(const AttendTile64Problem& problem) {
  const std::int64_t rows = problem.group * problem.rows;
  const std::int64_t head_dim = problem.keys.head_dim;
  for (std::int64_t b = 0; b < problem.keys.batches; ++b) {
    std::vector<double> keys = widen(unpack_batch<T>(problem.keys, b));
    std::vector<double> values = widen(unpack_batch<T>(problem.values, b));
    append_recent<T>(problem.recent_keys, b, problem.recent_tokens, head_dim, keys);
    append_recent<T>(problem.recent_values, b, problem.recent_tokens, head_dim, values);
    for (std::int64_t i = b * rows; i < (b + 1) * rows; ++i) attend_row<T>(problem, i, keys, values);
  }
}

}  // namespace

void multiply_tile64(const MultiplyTile64Problem& problem) {
  tile64::require_inside(problem.tiles, problem.tiles.kind == CacheKind::kKey ? "keys" : "values");
  with_float_type(problem.dtype, [&]<typename T>() { multiply_as<T>(problem); });
}

void attend_tile64(const AttendTile64Problem& problem) {
  tile64::require_inside(problem.keys, "keys");
  tile64::require_inside(problem.values, "values");
  with_float_type(problem.dtype, [&]<typename T>() { attend_as<T>(problem); });
}

}  // namespace kvpack::reference
