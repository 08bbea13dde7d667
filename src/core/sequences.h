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

/// Whether an implementation, which on the CPU needs adjacent channels, can only be given packed copies of a pair.
bool needs_packing(const TensorView& x, const TensorView& out);

/// Calls run(source, target) with a pair of sequences, or in place with a packed copy that is put into `out` afterwards.
template <typename Run>
void run_packed(const TensorView& x, const TensorView& out, Run run) {
  if (!needs_packing(x, out)) {
    run(x, out);
    return;
  }
  const PackedSequence packed(x);
  run(packed.view(), packed.view());
  packed.unpack_to(out);
}

/// Fills in where a pair of sequences lies: the fields that the problems of all operations on such pairs have.
template <typename Problem>
void set_sequences(Problem& problem, const TensorView& x, const TensorView& out) {
  problem.x = x.data;
  problem.out = out.data;
  problem.dtype = x.dtype;
  problem.tokens = x.shape[0];
  problem.channels = x.shape[1];
  problem.x_token_stride = x.strides[0];
  problem.x_channel_stride = x.strides[1];
  problem.out_token_stride = out.strides[0];
  problem.out_channel_stride = out.strides[1];
}

/// Copies element bits from source to target [tokens, channels], same shape and type; the two may be the same view.
void copy_sequence(const TensorView& source, const TensorView& target);

}  // namespace kvpack
