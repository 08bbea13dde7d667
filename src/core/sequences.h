// Tensors as lists of sequences: splitting a batch, and packing layouts whose channels are not adjacent.
#pragma once

#include <cstddef>
#include <vector>

#include "kvpack/tensor.h"

namespace kvpack {

/// Number of sequences in [tokens, channels] (one) or [batch, tokens, channels].
std::int64_t num_sequences(const TensorView& view);

/// Sequence `index` as a view [tokens, channels].
TensorView sequence(const TensorView& view, std::int64_t index);

/// A dense copy of one CPU sequence [tokens, channels], for implementations that need adjacent channels. Off the hot
/// path: only layouts with another channel stride pay for it.
class PackedSequence {
 public:
  explicit PackedSequence(const TensorView& source);
  [[nodiscard]] const TensorView& view() const noexcept { return view_; }
  /// Copies the packed elements to a view of the same shape and type.
  void unpack_to(const TensorView& target) const;

 private:
  std::vector<std::byte> memory_;
  TensorView view_;
};

/// Copies element bits from source to target [tokens, channels], same shape and type; the two may be the same view.
void copy_sequence(const TensorView& source, const TensorView& target);

}  // namespace kvpack
