// Splitting a batch into sequences, and packing layouts whose channels are not adjacent.
#include "core/sequences.h"

#include <cstring>

#include "core/check.h"
#include "core/parallel.h"

namespace kvpack {

namespace {

template <typename Word>
void copy_words(const TensorView& source, const TensorView& target, std::int64_t token) {
  const auto* from = static_cast<const Word*>(source.data) + token * source.strides[0];
  auto* to = static_cast<Word*>(target.data) + token * target.strides[0];
  for (std::int64_t c = 0; c < source.shape[1]; ++c) to[c * target.strides[1]] = from[c * source.strides[1]];
}

}  // namespace

std::int64_t num_sequences(const TensorView& view) { return view.rank == 3 ? view.shape[0] : 1; }

TensorView sequence(const TensorView& view, std::int64_t index) {
  if (view.rank == 2) return view;
  TensorView result = view;
  result.rank = 2;
  result.data = static_cast<char*>(view.data) + index * view.strides[0] * element_bytes(view.dtype);
  result.shape = {view.shape[1], view.shape[2], 0, 0};
  result.strides = {view.strides[1], view.strides[2], 0, 0};
  return result;
}

void copy_sequence(const TensorView& source, const TensorView& target) {
  if (source.num_elements() == 0 || is_same_view(source, target)) return;
  const std::int64_t bytes = element_bytes(source.dtype);
  const bool rows_adjacent = source.strides[1] == 1 && target.strides[1] == 1;
  // Rows in blocks, so that a thread's share is worth waking it.
  constexpr std::int64_t kBlockTokens = 256;
  auto copy_block = [&](std::int64_t first, std::int64_t end) {
    for (std::int64_t token = first; token < end; ++token) {
      if (rows_adjacent) {
        std::memcpy(static_cast<char*>(target.data) + token * target.strides[0] * bytes,
                    static_cast<const char*>(source.data) + token * source.strides[0] * bytes,
                    static_cast<std::size_t>(source.shape[1] * bytes));
      } else if (bytes == 2) {
        copy_words<std::uint16_t>(source, target, token);
      } else if (bytes == 4) {
        copy_words<std::uint32_t>(source, target, token);
      } else {
        copy_words<std::uint64_t>(source, target, token);
      }
    }
  };
  parallel_for_blocks(0, source.shape[0], kBlockTokens, copy_block);
}

bool needs_packing(const TensorView& x, const TensorView& out) {
  return x.device.kind == DeviceKind::kCpu && (x.strides[1] != 1 || out.strides[1] != 1);
}

PackedSequence::PackedSequence(const TensorView& source)
    : memory_(static_cast<std::size_t>(source.num_elements() * element_bytes(source.dtype))),
      view_(make_view(memory_.data(), source.dtype, {source.shape[0], source.shape[1]})) {
  copy_sequence(source, view_);
}

void PackedSequence::unpack_to(const TensorView& target) const { copy_sequence(view_, target); }

}  // namespace kvpack
