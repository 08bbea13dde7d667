// How attention on the CPU is cut into tasks: by sizes alone, so that results do not depend on the number of threads.
// Compiled for no special instruction set.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/divide_up.h"
#include "kvpack/tile64.h"

namespace kvpack {

/// Tokens of a task. Its partial result costs a few microseconds; 64 cores find work from 8 heads of 4096 tokens on.
inline constexpr std::int64_t kSplitTokens = 512;

/// Columns (query heads of one KV head times rows) of a task: their sums stay in the second-level cache.
inline constexpr std::int64_t kTaskColumns = 64;

/// The part of a problem that one task computes.
struct Share {
  std::int64_t batch;
  std::int64_t split;
  bool is_recent;  // tokens are those of the dense window
  std::int64_t first_token;
  std::int64_t end_token;
  std::int64_t first_column;
  std::int64_t num_columns;
};

/// All tasks of a call: batches times splits of tokens times parts of columns.
class Splits {
 public:
  Splits(std::int64_t batches, std::int64_t columns, std::int64_t tokens, std::int64_t recent_tokens)
      : batches_(batches), columns_(columns), tokens_(tokens), recent_tokens_(recent_tokens) {
    parts_ = divide_up(columns, kTaskColumns);
    // Partial results grow with splits times columns; many columns make long splits, so that they stay few bytes.
    split_tokens_ = kSplitTokens * parts_;
    compressed_ = divide_up(tokens, split_tokens_);
    splits_ = compressed_ + divide_up(recent_tokens, split_tokens_);
  }

  /// Splits of one batch, those of the dense window last.
  [[nodiscard]] std::int64_t splits() const { return splits_; }
  [[nodiscard]] std::int64_t tasks() const { return batches_ * splits_ * parts_; }

  [[nodiscard]] Share share(std::int64_t task) const {
    const std::int64_t part = task % parts_;
    const std::int64_t split = task / parts_ % splits_;
    const bool is_recent = split >= compressed_;
    const std::int64_t first = (is_recent ? split - compressed_ : split) * split_tokens_;
    const std::int64_t tokens = is_recent ? recent_tokens_ : tokens_;
    const std::int64_t first_column = part * kTaskColumns;
    return {task / parts_ / splits_,
            split,
            is_recent,
            first,
            std::min(first + split_tokens_, tokens),
            first_column,
            std::min(kTaskColumns, columns_ - first_column)};
  }

  /// Which partial result a column of a split writes.
  [[nodiscard]] std::int64_t partial(std::int64_t batch, std::int64_t split, std::int64_t column) const {
    return (batch * splits_ + split) * columns_ + column;
  }
  [[nodiscard]] std::int64_t partials() const { return batches_ * splits_ * columns_; }

 private:
  std::int64_t batches_;
  std::int64_t columns_;
  std::int64_t tokens_;
  std::int64_t recent_tokens_;
  std::int64_t parts_ = 0;
  std::int64_t split_tokens_ = 0;
  std::int64_t compressed_ = 0;
  std::int64_t splits_ = 0;
};

}  // namespace kvpack
