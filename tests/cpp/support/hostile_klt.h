// Rows whose bytes are not to be trusted, made from bytes: shared by the bounded test and the fuzzer.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "kvpack/kvpack.h"
#include "support/klt_tables.h"

namespace kvpack::test {

/// Unpacks and checks rows made of `data`: its first bytes choose levels, the others are the rows. Memory has exactly the
/// size of the views, so that AddressSanitizer sees every read and write beyond them. Returns whether the rows are refused.
inline bool run_hostile_klt(const std::uint8_t* data, std::size_t size) {
  constexpr std::size_t kChoices = kNumKltLevels + 2;
  if (size < kChoices) return false;
  std::vector<std::int32_t> levels;
  for (std::int32_t i = 0; i < kNumKltLevels; ++i) {
    levels.insert(levels.end(), static_cast<std::size_t>(data[i] % 24), kKltLevels[i]);
  }
  const std::int64_t channels = 1 + data[kNumKltLevels] % 70;
  const std::int64_t alignment = std::int64_t{2} << data[kNumKltLevels + 1] % 4;
  OwnedKltTable table(channels, levels, 1, alignment);
  const std::int64_t row_bytes = table.row_bytes();
  if (row_bytes == 0) return false;
  const std::size_t left = size - kChoices;
  const std::int64_t tokens = std::max<std::int64_t>(1, static_cast<std::int64_t>(left) / row_bytes);
  const auto bytes = static_cast<std::size_t>(tokens * row_bytes);
  const auto rows = std::make_unique<std::uint8_t[]>(bytes);
  std::copy_n(data + kChoices, std::min(left, bytes), rows.get());
  const auto out = std::make_unique<float[]>(static_cast<std::size_t>(tokens * channels));
  const TensorView view = make_view(rows.get(), DType::kUInt8, {tokens, row_bytes});
  unpack_klt(view, table.view(), {}, make_view(out.get(), DType::kFloat32, {tokens, channels}));
  try {
    check_klt(view, table.view());
  } catch (const InvalidArgument&) {
    return true;
  }
  return false;
}

}  // namespace kvpack::test
