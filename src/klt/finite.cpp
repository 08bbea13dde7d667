// Search for numbers that are not finite, at the speed of memory: most of the time there are none.
#include "klt/finite.h"

#include <atomic>
#include <bit>
#include <cmath>
#include <limits>

#include "core/divide_up.h"
#include "core/half.h"
#include "core/parallel.h"
#include "core/with_type.h"

namespace kvpack::klt {

namespace {

// All ones in the exponent; the compiler makes vectors of these.
bool is_nonfinite(Half value) { return (value.bits & 0x7c00u) == 0x7c00u; }
bool is_nonfinite(BFloat16 value) { return (value.bits & 0x7f80u) == 0x7f80u; }
bool is_nonfinite(float value) { return (std::bit_cast<std::uint32_t>(value) & 0x7f800000u) == 0x7f800000u; }
bool is_nonfinite(double value) { return is_nonfinite(to_float(value)); }

template <typename T>
bool has_nonfinite(const T* row, std::int64_t channels, std::int64_t stride) {
  int found = 0;
  if (stride == 1) {
    for (std::int64_t c = 0; c < channels; ++c) found |= is_nonfinite(row[c]) ? 1 : 0;
  } else {
    for (std::int64_t c = 0; c < channels; ++c) found |= is_nonfinite(row[c * stride]) ? 1 : 0;
  }
  return found != 0;
}

}  // namespace

KltPlace find_nonfinite(const KltMatrix& x, std::int64_t sequences, std::int64_t tokens, std::int64_t channels,
                        std::int64_t first_token) {
  constexpr std::int64_t kTaskElements = 1 << 18;  // worth handing to another thread
  const std::int64_t looked_at = tokens - first_token;
  if (looked_at <= 0 || sequences == 0 || channels == 0) return {};
  const std::int64_t block = 1 + kTaskElements / channels;
  const std::int64_t blocks = divide_up(looked_at, block);
  return with_float_type(x.dtype, [&]<typename T>() {
    const auto row_of = [&](std::int64_t s, std::int64_t t) {
      return static_cast<const T*>(x.data) + s * x.sequence_stride + t * x.token_stride;
    };
    std::atomic<std::int64_t> first_row{std::numeric_limits<std::int64_t>::max()};
    auto task = [&](std::int64_t index) {
      const std::int64_t s = index / blocks;
      const std::int64_t begin = first_token + index % blocks * block;
      for (std::int64_t t = begin; t < tokens && t < begin + block; ++t) {
        if (!has_nonfinite(row_of(s, t), channels, x.channel_stride)) continue;
        const std::int64_t row = s * tokens + t;
        std::int64_t seen = first_row.load();
        while (row < seen && !first_row.compare_exchange_weak(seen, row)) {
        }
        return;
      }
    };
    parallel_for(sequences * blocks, task);
    const std::int64_t row = first_row.load();
    if (row == std::numeric_limits<std::int64_t>::max()) return KltPlace{};
    KltPlace place{row / tokens, row % tokens, 0};
    while (!is_nonfinite(row_of(place.sequence, place.token)[place.channel * x.channel_stride])) ++place.channel;
    return place;
  });
}

}  // namespace kvpack::klt
