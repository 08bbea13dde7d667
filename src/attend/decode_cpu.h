// The two products and attention on compressed tiles, in the SIMD vocabulary. Compiled once per instruction set by
// decode_cpu.cpp.
//
// A task takes one KV head, kSplitTokens of its tokens and all query heads that share it (up to kTaskColumns columns).
// It expands 64 tiles at a time to 16 KiB of floats, which stay in the first-level cache, and multiplies all columns with
// them: a tile is read and expanded once, however many columns there are. Partial results are put together in the order
// of splits, so that the same bits come out in every run.
#include "attend/expand_cpu.h"
#include "attend/multiply_cpu.h"
#include "isa/exp.h"
// behind exp.h
#include "attend/softmax_cpu.h"

namespace kvpack::KVPACK_ISA {
namespace {

inline constexpr std::int64_t kExpandedFloats = kTileElements * kTileElements;

/// sums += x * tiles [first, first + 64), of which `count` (even) matter, through `expanded` [64][64]. Values are
/// rounded as for x of type `rounding`.
template <typename Survivor>
void multiply_64_tiles(const Tile64Data& tiles, std::int64_t batch, std::int64_t first, std::int64_t count,
                       const Columns& columns, std::int64_t num_columns, float* expanded, DType rounding,
                       tile64::OutsideTile& outside) {
  const TileReader<Survivor> reader(tiles, batch, rounding, outside);
  reader.prefetch(first + kTileElements);
#if KVPACK_ISA_LANES == 16
  if (reader.all_are_whole(first)) {
    const std::int64_t done = multiply_first_columns(reader, first, count, columns, num_columns, expanded);
    const Columns others{columns.x + done * columns.x_stride, columns.x_stride,
                         columns.sums + done * columns.sums_stride, columns.sums_stride};
    return multiply_tiles(expanded, count, others, num_columns - done);
  }
#endif
  reader.expand_tiles(first, expanded);
  multiply_tiles(expanded, count, columns, num_columns);
}

template <typename Survivor>
void order_64_sums(float* sums) {
  order_elements(Survivor{}, sums);
}

/// The two functions for one payload, chosen once per call.
struct TileProduct {
  decltype(&multiply_64_tiles<Codes<1>>) multiply;
  decltype(&order_64_sums<Codes<1>>) order;
  DType rounding;  // the type of x
};

TileProduct product_of(const Tile64Data& tiles, DType rounding) {
  return with_survivor(tiles, [rounding]<typename Survivor>() {
    return TileProduct{multiply_64_tiles<Survivor>, order_64_sums<Survivor>, rounding};
  });
}

/// target[n][i] = source[n][i] * factor as floats, for i < count, with zeros up to a multiple of 64.
void load_columns(const void* source, DType dtype, std::int64_t first, std::int64_t source_stride, std::int64_t count,
                  std::int64_t num_columns, float factor, float* target, std::int64_t target_stride) {
  with_float_type(dtype, [&]<typename T>() {
    for (std::int64_t n = 0; n < num_columns; ++n) {
      const T* from = static_cast<const T*>(source) + first + n * source_stride;
      float* to = target + n * target_stride;
      std::int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) store(to + i, mul(load(from + i), set1(factor)));
      for (; i < count; ++i) to[i] = to_float(from[i]) * factor;
      for (; i % kTileElements != 0; ++i) to[i] = 0.0f;
    }
  });
}

/// target[i] = source[i] in the type of target, i < count.
void store_row(const float* source, std::int64_t count, void* target, DType dtype, std::int64_t first) {
  with_float_type(dtype, [&]<typename T>() {
    T* to = static_cast<T*>(target) + first;
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(source + i));
    for (; i < count; ++i) from_float(source[i], to[i]);
  });
}

/// Even, for multiply_tiles; a tile past the last token holds zeros and has weight 0.
std::int64_t even_tokens(std::int64_t first, std::int64_t end) {
  const std::int64_t tokens = std::min(end - first, kTileElements);
  return tokens + tokens % 2;
}

/// Scores of the 64 tokens from `token` on, in token order, for columns of q [columns][head_dim].
void score_block(const Tile64Data& keys, const TileProduct& product, std::int64_t batch, std::int64_t token,
                 const float* q, std::int64_t num_columns, float* scores, float* expanded,
                 tile64::OutsideTile& outside) {
  std::fill_n(scores, num_columns * kTileElements, 0.0f);
  const std::int64_t first = token / kTileElements * keys.head_dim;
  for (std::int64_t channel = 0; channel < keys.head_dim; channel += kTileElements) {
    product.multiply(keys, batch, first + channel, kTileElements, {q + channel, keys.head_dim, scores, kTileElements},
                     num_columns, expanded, product.rounding, outside);
  }
  for (std::int64_t n = 0; n < num_columns; ++n) product.order(scores + n * kTileElements);
}

/// sums [columns][head_dim] += weights [columns][64] * values of the tokens [token, end), in the order of the tiles' lanes.
void add_block(const Tile64Data& values, const TileProduct& product, std::int64_t batch, std::int64_t token,
               std::int64_t end, const float* weights, std::int64_t num_columns, float* sums, float* expanded,
               tile64::OutsideTile& outside) {
  const std::int64_t first = token / kTileElements * values.head_dim;
  for (std::int64_t channel = 0; channel < values.head_dim; channel += kTileElements) {
    product.multiply(values, batch, first + channel, even_tokens(token, end),
                     {weights, kTileElements, sums + channel, values.head_dim}, num_columns, expanded, product.rounding,
                     outside);
  }
}

void order_sums(const TileProduct& product, float* sums, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += kTileElements) product.order(sums + i);
}

void multiply_keys(const MultiplyTile64Problem& problem, tile64::OutsideTile& outside) {
  const Tile64Data& keys = problem.tiles;
  // Tasks write scores as they go; the other operations hold their sums back until every tile was read.
  tile64::require_inside(keys, "keys");
  const std::int64_t columns = problem.group * problem.rows;
  const Splits splits(keys.batches, columns, keys.tokens, 0);
  const TileProduct product = product_of(keys, problem.dtype);
  auto multiply_share = [&](std::int64_t task) {
    const Share share = splits.share(task);
    const std::int64_t width = share.num_columns;
    float* expanded = thread_scratch(kExpandedFloats + width * (kTileElements + keys.head_dim));
    float* scores = expanded + kExpandedFloats;
    float* q = scores + width * kTileElements;
    const std::int64_t first_row = share.batch * columns + share.first_column;
    load_columns(problem.x, problem.dtype, first_row * keys.head_dim, keys.head_dim, keys.head_dim, width, 1.0f, q,
                 keys.head_dim);
    for (std::int64_t token = share.first_token; token < share.end_token; token += kTileElements) {
      score_block(keys, product, share.batch, token, q, width, scores, expanded, outside);
      const std::int64_t tokens = std::min(kTileElements, share.end_token - token);
      for (std::int64_t n = 0; n < width; ++n) {
        store_row(scores + n * kTileElements, tokens, problem.out, problem.dtype,
                  (first_row + n) * keys.tokens + token);
      }
    }
  };
  parallel_for(splits.tasks(), multiply_share);
}

void multiply_values(const MultiplyTile64Problem& problem, tile64::OutsideTile& outside) {
  const Tile64Data& values = problem.tiles;
  const std::int64_t columns = problem.group * problem.rows;
  const std::int64_t head_dim = values.head_dim;
  const Splits splits(values.batches, columns, values.tokens, 0);
  const TileProduct product = product_of(values, problem.dtype);
  float* partials = thread_scratch(splits.partials() * head_dim, Scratch::kCall);
  auto multiply_share = [&](std::int64_t task) {
    const Share share = splits.share(task);
    const std::int64_t width = share.num_columns;
    float* expanded = thread_scratch(kExpandedFloats + width * kTileElements);
    float* weights = expanded + kExpandedFloats;
    float* sums = partials + splits.partial(share.batch, share.split, share.first_column) * head_dim;
    std::fill_n(sums, width * head_dim, 0.0f);
    const std::int64_t first_row = share.batch * columns + share.first_column;
    for (std::int64_t token = share.first_token; token < share.end_token; token += kTileElements) {
      const std::int64_t tokens = std::min(kTileElements, share.end_token - token);
      load_columns(problem.x, problem.dtype, first_row * values.tokens + token, values.tokens, tokens, width, 1.0f,
                   weights, kTileElements);
      add_block(values, product, share.batch, token, share.end_token, weights, width, sums, expanded, outside);
    }
    order_sums(product, sums, width * head_dim);
  };
  parallel_for(splits.tasks(), multiply_share);
  outside.require_none(values, "values");
  auto add_splits = [&](std::int64_t row) {
    float* sums = thread_scratch(head_dim);
    std::fill_n(sums, head_dim, 0.0f);
    for (std::int64_t split = 0; split < splits.splits(); ++split) {
      const float* part = partials + splits.partial(row / columns, split, row % columns) * head_dim;
      for (std::int64_t i = 0; i < head_dim; i += kLanes) store(sums + i, add(load(sums + i), load(part + i)));
    }
    store_row(sums, head_dim, problem.out, problem.dtype, row * head_dim);
  };
  parallel_for(values.batches * columns, add_splits);
}

/// Working memory of one task of attend_tile64.
struct TaskMemory {
  TaskMemory(std::int64_t num_columns, std::int64_t head_dim)
      : expanded(thread_scratch(kExpandedFloats + num_columns * (kTileElements + head_dim))),
        scores(expanded + kExpandedFloats),
        q(scores + num_columns * kTileElements) {}
  float* expanded;  // [64][64]
  float* scores;    // [columns][64]
  float* q;         // [columns][head_dim]
};

/// Recent tokens that a row sees.
std::int64_t visible_tokens(const AttendTile64Problem& problem, std::int64_t column) {
  if (problem.masking == Masking::kNone) return problem.recent_tokens;
  return problem.recent_tokens - problem.rows + 1 + column % problem.rows;
}

float dot(const float* a, const float* b, std::int64_t count) {
  F32 sum = set1(0.0f);
  for (std::int64_t i = 0; i < count; i += kLanes) sum = multiply_add(load(a + i), load(b + i), sum);
  return reduce_add(sum);
}

/// One block of the dense window: as compressed ones, but a token's row is read as it is.
void attend_recent_block(const AttendTile64Problem& problem, const Share& share, std::int64_t token,
                         const TaskMemory& memory, ColumnState* states, float* sums) {
  const std::int64_t head_dim = problem.keys.head_dim;
  const std::int64_t tokens = std::min(kTileElements, share.end_token - token);
  const DenseMatrices& keys = problem.recent_keys;
  const DenseMatrices& values = problem.recent_values;
  for (std::int64_t t = 0; t < tokens; ++t) {
    load_columns(keys.data, keys.dtype, keys.row_start(share.batch, token + t), 0, head_dim, 1, 1.0f, memory.expanded,
                 0);
    for (std::int64_t n = 0; n < share.num_columns; ++n) {
      memory.scores[n * kTileElements + t] = dot(memory.q + n * head_dim, memory.expanded, head_dim);
    }
  }
  for (std::int64_t n = 0; n < share.num_columns; ++n) {
    const std::int64_t visible = std::min(tokens, visible_tokens(problem, share.first_column + n) - token);
    weigh_block(memory.scores + n * kTileElements, visible, problem.softcap, states[n], sums + n * head_dim, head_dim);
  }
  const std::int64_t count = tokens + tokens % 2;
  for (std::int64_t channel = 0; channel < head_dim; channel += kTileElements) {
    if (count != tokens) std::fill_n(memory.expanded + tokens * kTileElements, kTileElements, 0.0f);
    load_columns(values.data, values.dtype, values.row_start(share.batch, token) + channel, values.token_stride,
                 kTileElements, tokens, 1.0f, memory.expanded, kTileElements);
    multiply_tiles(memory.expanded, count, {memory.scores, kTileElements, sums + channel, head_dim}, share.num_columns);
  }
}

/// Puts the splits of one column together, writes out and lse.
void combine_splits(const AttendTile64Problem& problem, const Splits& splits, const float* partials,
                    const ColumnState* states, std::int64_t row) {
  const std::int64_t head_dim = problem.keys.head_dim;
  const std::int64_t columns = problem.group * problem.rows;
  float* sums = thread_scratch(head_dim);
  std::fill_n(sums, head_dim, 0.0f);
  float largest = kMinusInfinity;
  for (std::int64_t split = 0; split < splits.splits(); ++split) {
    largest = std::max(largest, states[splits.partial(row / columns, split, row % columns)].largest);
  }
  float total = 0.0f;
  for (std::int64_t split = 0; split < splits.splits(); ++split) {
    const std::int64_t partial = splits.partial(row / columns, split, row % columns);
    const ColumnState& state = states[partial];
    if (state.total == 0.0f) continue;  // saw nothing
    const float factor = std::exp(state.largest - largest);
    total += state.total * factor;
    const float* part = partials + partial * head_dim;
    for (std::int64_t i = 0; i < head_dim; i += kLanes) {
      store(sums + i, multiply_add(load(part + i), set1(factor), load(sums + i)));
    }
  }
  if (total != 0.0f) scale_sums(sums, head_dim, 1.0f / total);
  store_row(sums, head_dim, problem.out, problem.dtype, row * head_dim);
  if (problem.lse != nullptr) problem.lse[row] = total == 0.0f ? kMinusInfinity : largest + std::log(total);
}

}  // namespace

void multiply_tile64(const MultiplyTile64Problem& problem) {
  tile64::OutsideTile outside;
  if (problem.tiles.kind == CacheKind::kKey) return multiply_keys(problem, outside);
  multiply_values(problem, outside);
}

void attend_tile64(const AttendTile64Problem& problem) {
  const std::int64_t head_dim = problem.keys.head_dim;
  const std::int64_t columns = problem.group * problem.rows;
  const Splits splits(problem.keys.batches, columns, problem.keys.tokens, problem.recent_tokens);
  const TileProduct key_product = product_of(problem.keys, problem.dtype);
  const TileProduct value_product = product_of(problem.values, problem.dtype);
  tile64::OutsideTile outside_keys;
  tile64::OutsideTile outside_values;
  static_assert(sizeof(ColumnState) == 2 * sizeof(float));
  float* partials = thread_scratch(splits.partials() * (head_dim + 2), Scratch::kCall);
  auto* all_states = reinterpret_cast<ColumnState*>(partials + splits.partials() * head_dim);
  auto attend_share = [&](std::int64_t task) {
    const Share share = splits.share(task);
    const TaskMemory memory(share.num_columns, head_dim);
    const std::int64_t partial = splits.partial(share.batch, share.split, share.first_column);
    float* sums = partials + partial * head_dim;
    ColumnState* states = all_states + partial;
    std::fill_n(sums, share.num_columns * head_dim, 0.0f);
    std::fill_n(states, share.num_columns, ColumnState{});
    load_columns(problem.q, problem.dtype, (share.batch * columns + share.first_column) * head_dim, head_dim, head_dim,
                 share.num_columns, problem.scale, memory.q, head_dim);
    for (std::int64_t token = share.first_token; token < share.end_token; token += kTileElements) {
      if (share.is_recent) {
        attend_recent_block(problem, share, token, memory, states, sums);
        continue;
      }
      score_block(problem.keys, key_product, share.batch, token, memory.q, share.num_columns, memory.scores,
                  memory.expanded, outside_keys);
      for (std::int64_t n = 0; n < share.num_columns; ++n) {
        weigh_block(memory.scores + n * kTileElements, share.end_token - token, problem.softcap, states[n],
                    sums + n * head_dim, head_dim);
      }
      add_block(problem.values, value_product, share.batch, token, share.end_token, memory.scores, share.num_columns,
                sums, memory.expanded, outside_values);
    }
    if (!share.is_recent) order_sums(value_product, sums, share.num_columns * head_dim);
  };
  parallel_for(splits.tasks(), attend_share);
  outside_keys.require_none(problem.keys, "keys");
  outside_values.require_none(problem.values, "values");
  auto combine = [&](std::int64_t row) { combine_splits(problem, splits, partials, all_states, row); };
  parallel_for(problem.keys.batches * columns, combine);
}

}  // namespace kvpack::KVPACK_ISA
