// Reads tiles whose bytes are not to be trusted, in every way there is; shared by the test of hostile bytes and the fuzzer.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "kvpack/kvpack.h"

namespace kvpack::test {

/// What an attacker chooses.
struct HostileInput {
  std::array<std::uint8_t, 8> choices{};  // kind, bits, tokens, payload type, capacity, dense type, head_dim, columns
  std::vector<std::uint8_t> noise;        // pairs that overwrite bytes of valid parts, or, from 64 on, all bytes
};

/// Memory of exactly `bytes`, so that AddressSanitizer sees the first byte beyond.
class ExactMemory {
 public:
  explicit ExactMemory(std::int64_t bytes)
      : memory_(new std::uint8_t[static_cast<std::size_t>(bytes)]()), size_(static_cast<std::size_t>(bytes)) {}
  [[nodiscard]] std::uint8_t* data() const { return memory_.get(); }
  [[nodiscard]] std::size_t size() const { return size_; }

 private:
  std::unique_ptr<std::uint8_t[]> memory_;
  std::size_t size_;
};

/// Makes a call whose only output is `out`. Returns 1 if it refused the bytes and 0 if it took them; -1000 if it had written
/// something before it refused.
template <typename Call>
int refuses(const ExactMemory& out, Call&& call) {
  std::fill_n(out.data(), out.size(), std::uint8_t{0xA5});
  try {
    call();
    return 0;
  } catch (const InvalidArgument&) {
    return std::all_of(out.data(), out.data() + out.size(), [](std::uint8_t byte) { return byte == 0xA5; }) ? 1 : -1000;
  }
}

/// Returns how many of the calls refused the bytes; less than 0 if one had written something before.
inline int run_hostile(const HostileInput& input) {
  constexpr std::int32_t kBits[] = {1, 2, 4, 8, 16};
  constexpr DType kTypes[] = {DType::kFloat16, DType::kBFloat16, DType::kFloat32};
  constexpr std::int64_t kBatches = 2;
  const std::int64_t head_dim = 64 << input.choices[6] % 3;
  const std::int64_t columns = 1 + input.choices[7] % 9;
  const CacheKind kind = input.choices[0] % 2 == 0 ? CacheKind::kKey : CacheKind::kValue;
  const std::int32_t bits = kBits[input.choices[1] % 5];
  const std::int64_t tokens = 1 + input.choices[2] % 130;
  const DType type = kTypes[input.choices[5] % 3];
  const DType half = input.choices[3] % 2 == 0 ? DType::kFloat16 : DType::kBFloat16;
  const bool is_f16 = bits == kUnquantizedBits;
  const std::int64_t num_tiles = tile64_tiles(tokens, head_dim);

  // A valid cache of x, which the noise then spoils.
  const DType x_type = is_f16 ? half : DType::kFloat32;
  const ExactMemory x(kBatches * tokens * head_dim * 4);
  for (std::int64_t i = 0; i < kBatches * tokens * head_dim; ++i) {
    const auto value = static_cast<std::uint16_t>(0x3c00 + i * 7 % 512);
    if (is_f16) {
      reinterpret_cast<std::uint16_t*>(x.data())[i] = value;
    } else {
      reinterpret_cast<float*>(x.data())[i] = static_cast<float>(value);
    }
  }
  const std::int64_t capacity =
      tile64_payload_bound(bits, kBatches, tokens, head_dim, head_dim / 2) + input.choices[4] % 5;
  const ExactMemory bitmaps(8 * kBatches * num_tiles);
  const ExactMemory offsets(4 * kBatches * (num_tiles + (is_f16 ? 1 : 0)));
  const ExactMemory payload(capacity * (is_f16 ? 2 : 4));
  const ExactMemory starts(4 * kBatches);
  const ExactMemory scales(4 * kBatches * num_tiles);
  const ExactMemory zeros(4 * kBatches * num_tiles);
  Tile64 tiles;
  tiles.kind = kind;
  tiles.bits = bits;
  tiles.tokens = tokens;
  tiles.head_dim = head_dim;
  tiles.bitmaps = make_view(bitmaps.data(), DType::kInt64, {kBatches, num_tiles});
  tiles.offsets = make_view(offsets.data(), DType::kInt32, {kBatches, num_tiles + (is_f16 ? 1 : 0)});
  tiles.payload = make_view(payload.data(), is_f16 ? half : DType::kInt32, {capacity});
  if (is_f16) {
    tiles.starts = make_view(starts.data(), DType::kInt32, {kBatches});
  } else {
    tiles.scales = make_view(scales.data(), DType::kFloat32, {kBatches, num_tiles});
    tiles.zeros = make_view(zeros.data(), DType::kFloat32, {kBatches, num_tiles});
  }
  Tile64Options options;
  options.sparsity = 0.5;
  compress_tile64(make_view(x.data(), x_type, {kBatches, tokens, head_dim}), options, tiles, {}, {});

  const ExactMemory* parts[] = {&bitmaps, &offsets, &payload, &starts, &scales, &zeros};
  if (input.noise.size() >= 64) {
    std::size_t at = 0;
    for (const ExactMemory* part : parts) {
      for (std::size_t i = 0; i < part->size(); ++i) part->data()[i] = input.noise[at++ % input.noise.size()];
    }
  } else {
    for (std::size_t i = 0; i + 3 < input.noise.size(); i += 4) {
      const ExactMemory& part = *parts[input.noise[i] % 6];
      const std::size_t place = input.noise[i + 1] * std::size_t{256} + input.noise[i + 2];
      if (part.size() > 0) part.data()[place % part.size()] = input.noise[i + 3];
    }
  }

  const std::int64_t size = element_bytes(type);
  const ExactMemory dense(kBatches * tokens * head_dim * size);
  const ExactMemory channels(kBatches * columns * head_dim * size);
  const ExactMemory per_token(kBatches * columns * tokens * size);
  const ExactMemory nothing(0);
  const TensorView dense_view = make_view(dense.data(), type, {kBatches, tokens, head_dim});
  const TensorView channels_view = make_view(channels.data(), type, {kBatches, columns, head_dim});
  const TensorView per_token_view = make_view(per_token.data(), type, {kBatches, columns, tokens});
  int refused = refuses(nothing, [&] { check_tile64(tiles); });
  refused += refuses(dense, [&] { unpack_tile64(tiles, dense_view); });
  refused += kind == CacheKind::kKey
                 ? refuses(per_token, [&] { multiply_keys(tiles, channels_view, per_token_view, {}); })
                 : refuses(channels, [&] { multiply_values(tiles, per_token_view, channels_view, {}); });
  // The same bytes as both sides of a cache.
  Tile64 keys = tiles;
  Tile64 values = tiles;
  keys.kind = CacheKind::kKey;
  values.kind = CacheKind::kValue;
  const ExactMemory out(kBatches * columns * head_dim * size);
  const std::initializer_list<std::int64_t> shape = {kBatches, 1, columns, head_dim};
  const TensorView recent = make_view(dense.data(), type, {kBatches, 1, tokens, head_dim});
  refused += refuses(out, [&] {
    attend_tile64(keys, values, make_view(channels.data(), type, shape), recent, recent, {},
                  make_view(out.data(), type, shape), {}, {});
  });
  return refused;
}

}  // namespace kvpack::test
