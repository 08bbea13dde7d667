// The one comparison of matrices: says case, coordinate, both values and bit patterns, and the seed.
#pragma once

#include <gtest/gtest.h>

#include <iomanip>
#include <string>

#include "support/matrix.h"

namespace kvpack::test {

/// The seed of every random test: printed with each failure, so that `--gtest_filter` reruns the same numbers.
inline constexpr std::uint32_t kSeed = 20261121;

/// Passes when every element of `actual` has the bits of `expected`.
inline ::testing::AssertionResult same_bits(const Matrix& expected, const Matrix& actual) {
  for (std::int64_t t = 0; t < expected.tokens(); ++t) {
    for (std::int64_t c = 0; c < expected.channels(); ++c) {
      if (expected.bits(t, c) == actual.bits(t, c)) continue;
      return ::testing::AssertionFailure()
             << "token " << t << ", channel " << c << " of [" << expected.tokens() << ", " << expected.channels()
             << "]: expected " << std::setprecision(9) << expected.get(t, c) << " (0x" << std::hex
             << expected.bits(t, c) << "), got " << actual.get(t, c) << " (0x" << actual.bits(t, c) << "), seed "
             << std::dec << kSeed;
    }
  }
  return ::testing::AssertionSuccess();
}

}  // namespace kvpack::test
