// Compressed tiles with guard bytes around every part, matrices seen as batches, and the comparison of two such tiles.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "kvpack/kvpack.h"
#include "support/compare.h"

namespace kvpack::test {

/// Memory of one part of a format: 0xFF everywhere at first, with guards on both sides.
class Part {
 public:
  Part() = default;
  Part(DType dtype, std::initializer_list<std::int64_t> shape) {
    std::int64_t elements = 1;
    for (const std::int64_t extent : shape) elements *= extent;
    bytes_ = static_cast<std::size_t>(elements * element_bytes(dtype));
    memory_.assign(bytes_ + 2 * kGuard, std::byte{0xFF});
    view_ = make_view(memory_.data() + kGuard, dtype, shape);
  }
  Part(const Part&) = delete;  // the view points into the memory
  Part& operator=(const Part&) = delete;
  Part(Part&&) = default;
  Part& operator=(Part&&) = default;

  [[nodiscard]] const TensorView& view() const { return view_; }
  [[nodiscard]] std::size_t bytes() const { return bytes_; }
  [[nodiscard]] std::byte* data() { return static_cast<std::byte*>(view_.data); }
  [[nodiscard]] const std::byte* data() const { return static_cast<const std::byte*>(view_.data); }
  template <typename T>
  [[nodiscard]] T* as() {
    return static_cast<T*>(view_.data);
  }
  [[nodiscard]] bool guards_are_intact() const {
    const auto is_guard = [](std::byte byte) { return byte == std::byte{0xFF}; };
    return std::all_of(memory_.begin(), memory_.begin() + static_cast<std::ptrdiff_t>(memory_.empty() ? 0 : kGuard),
                       is_guard) &&
           std::all_of(memory_.end() - static_cast<std::ptrdiff_t>(memory_.empty() ? 0 : kGuard), memory_.end(),
                       is_guard);
  }

 private:
  static constexpr std::size_t kGuard = 64;
  std::size_t bytes_ = 0;
  std::vector<std::byte> memory_;
  TensorView view_;
};

/// The memory of one Tile64.
class Tiles {
 public:
  Tiles(CacheKind kind, std::int32_t bits, std::int64_t batches, std::int64_t tokens, std::int64_t head_dim,
        DType dtype, std::int64_t capacity = -1) {
    const std::int64_t tiles = tile64_tiles(tokens, head_dim);
    const bool is_f16 = bits == kUnquantizedBits;
    if (capacity < 0) capacity = tile64_payload_bound(bits, batches, tokens, head_dim, head_dim);
    bitmaps = Part(DType::kInt64, {batches, tiles});
    offsets = Part(DType::kInt32, {batches, is_f16 ? tiles + 1 : tiles});
    const DType half = dtype == DType::kBFloat16 ? DType::kBFloat16 : DType::kFloat16;
    payload = Part(is_f16 ? half : DType::kInt32, {capacity});
    if (is_f16) {
      starts = Part(DType::kInt32, {batches});
    } else {
      scales = Part(DType::kFloat32, {batches, tiles});
      zeros = Part(DType::kFloat32, {batches, tiles});
    }
    meta_.kind = kind;
    meta_.bits = bits;
    meta_.tokens = tokens;
    meta_.head_dim = head_dim;
  }

  [[nodiscard]] Tile64 view() const {
    Tile64 result = meta_;
    result.bitmaps = bitmaps.view();
    result.offsets = offsets.view();
    result.payload = payload.view();
    result.starts = starts.view();
    result.scales = scales.view();
    result.zeros = zeros.view();
    return result;
  }
  [[nodiscard]] bool guards_are_intact() const {
    return bitmaps.guards_are_intact() && offsets.guards_are_intact() && payload.guards_are_intact() &&
           starts.guards_are_intact() && scales.guards_are_intact() && zeros.guards_are_intact();
  }

  Part bitmaps, offsets, payload, starts, scales, zeros;
  std::int64_t used = -1;  // as compress_tile64 says

 private:
  Tile64 meta_;
};

/// The rows of a matrix as batches of [tokens, head_dim].
inline TensorView as_batches(const Matrix& matrix, std::int64_t batches) {
  TensorView view = matrix.view();
  const std::int64_t row = view.strides[0];
  const std::int64_t tokens = matrix.tokens() / batches;
  view.rank = 3;
  view.shape = {batches, tokens, matrix.channels(), 0};
  view.strides = {tokens * row, row, 1, 0};
  return view;
}

/// A matrix [batch * tokens, heads * head_dim] as [batch, heads, tokens, head_dim]: what a model's projection puts out.
inline TensorView as_heads(const Matrix& matrix, std::int64_t batch, std::int64_t heads) {
  TensorView view = matrix.view();
  const std::int64_t row = view.strides[0];
  const std::int64_t tokens = matrix.tokens() / batch;
  const std::int64_t head_dim = matrix.channels() / heads;
  view.rank = 4;
  view.shape = {batch, heads, tokens, head_dim};
  view.strides = {tokens * row, head_dim, row, 1};
  return view;
}

/// Compresses into `tiles` and notes what they take.
inline void compress(const TensorView& x, const Tile64Options& options, Tiles& tiles) {
  Part used(DType::kInt64, {1});
  compress_tile64(x, options, tiles.view(), {}, used.view());
  tiles.used = *used.as<std::int64_t>();
}

/// Passes when all parts have the same bytes, the payload as far as it is used.
inline ::testing::AssertionResult same_tiles(const Tiles& expected, const Tiles& actual) {
  if (expected.used != actual.used) {
    return ::testing::AssertionFailure() << "expected " << expected.used << " payload elements, got " << actual.used;
  }
  const struct {
    const char* name;
    const Part& expected;
    const Part& actual;
  } parts[] = {{"bitmaps", expected.bitmaps, actual.bitmaps}, {"offsets", expected.offsets, actual.offsets},
               {"starts", expected.starts, actual.starts},    {"scales", expected.scales, actual.scales},
               {"zeros", expected.zeros, actual.zeros},       {"payload", expected.payload, actual.payload}};
  for (const auto& part : parts) {
    const std::int64_t size = element_bytes(part.expected.view().dtype);
    const bool is_payload = std::string(part.name) == "payload";
    const std::int64_t elements = is_payload ? expected.used : static_cast<std::int64_t>(part.expected.bytes()) / size;
    for (std::int64_t i = 0; i < elements; ++i) {
      std::uint64_t wanted = 0;
      std::uint64_t got = 0;
      std::memcpy(&wanted, part.expected.data() + i * size, static_cast<std::size_t>(size));
      std::memcpy(&got, part.actual.data() + i * size, static_cast<std::size_t>(size));
      if (wanted == got) continue;
      return ::testing::AssertionFailure() << part.name << "[" << i << "] of " << elements << ": expected 0x"
                                           << std::hex << wanted << ", got 0x" << got << ", seed " << std::dec << kSeed;
    }
  }
  return ::testing::AssertionSuccess();
}

/// The message of the InvalidArgument that a call throws, or "accepted".
template <typename Call>
std::string refusal(Call&& call) {
  try {
    call();
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "accepted";
}

}  // namespace kvpack::test
