// A test matrix [tokens, channels] with guard bytes around it, any type and layout, filled from a seed.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/half.h"
#include "core/with_type.h"
#include "kvpack/tensor.h"

namespace kvpack::test {

/// What the elements look like. Every kind is there for a branch that it reaches.
enum class Fill {
  kNormal,      // channels of different scale
  kConstant,    // every vector degenerate
  kTies,        // few distinct values: quantiles between equal neighbours
  kMostlyTies,  // one value nearly everywhere: the median is an outlier
  kPositive,    // one-signed channels far from zero
  kNegative,
  kDrift,     // a trend along tokens and channels: tails gather in few blocks
  kDenormal,  // grids whose scale overflows
  kZeros,     // +0 and -0 mixed
  kHuge,      // a range beyond float32's largest number
  kSpecial,   // NaN, infinities, zeros of both signs and denormals among normal values
  kNothing,   // zeros of both signs alone: nothing survives
  kLone,      // one element of 64 x 64 is not zero
};

/// How the elements lie.
struct Layout {
  std::int64_t channel_stride = 1;
  std::int64_t row_padding = 0;  // elements between rows
  std::int64_t first = 0;        // elements before the first one: unaligned starts
};

class Matrix {
 public:
  Matrix(std::int64_t tokens, std::int64_t channels, DType dtype, Layout layout = {})
      : layout_(layout), bytes_(element_bytes(dtype)) {
    const std::int64_t row = channels * layout.channel_stride + layout.row_padding;
    const std::int64_t elements = layout.first + tokens * row + 1;
    // 0xFF is a NaN in every floating type: an element that nobody wrote fails every comparison.
    memory_.assign(static_cast<std::size_t>(elements * bytes_) + 2 * kGuard, std::byte{0xFF});
    view_ = make_view(memory_.data() + kGuard + layout.first * bytes_, dtype, {tokens, channels});
    view_.strides = {row, layout.channel_stride, 0, 0};
  }
  // The view points into the memory, so a matrix stays where it is.
  Matrix(const Matrix&) = delete;
  Matrix& operator=(const Matrix&) = delete;

  [[nodiscard]] const TensorView& view() const { return view_; }
  [[nodiscard]] std::int64_t tokens() const { return view_.shape[0]; }
  [[nodiscard]] std::int64_t channels() const { return view_.shape[1]; }

  [[nodiscard]] double get(std::int64_t token, std::int64_t channel) const {
    return with_float_type(view_.dtype, [&]<typename T>() {
      if constexpr (std::is_same_v<T, double>) return *static_cast<const T*>(at(token, channel));
      return static_cast<double>(to_float(*static_cast<const T*>(at(token, channel))));
    });
  }
  void set(std::int64_t token, std::int64_t channel, double value) {
    with_float_type(view_.dtype, [&]<typename T>() {
      if constexpr (std::is_same_v<T, double>) {
        *static_cast<T*>(at(token, channel)) = value;
      } else {
        from_float(static_cast<float>(value), *static_cast<T*>(at(token, channel)));
      }
    });
  }
  /// The element's bits, for comparisons that tell zeros and NaNs apart.
  [[nodiscard]] std::uint64_t bits(std::int64_t token, std::int64_t channel) const {
    std::uint64_t result = 0;
    std::memcpy(&result, at(token, channel), static_cast<std::size_t>(bytes_));
    return result;
  }
  void copy_from(const Matrix& other) {
    for (std::int64_t t = 0; t < tokens(); ++t) {
      for (std::int64_t c = 0; c < channels(); ++c)
        std::memcpy(at(t, c), other.at(t, c), static_cast<std::size_t>(bytes_));
    }
  }
  /// True when no byte outside the elements was touched.
  [[nodiscard]] bool guards_are_intact() const {
    std::vector<std::byte> outside = memory_;
    for (std::int64_t t = 0; t < tokens(); ++t) {
      for (std::int64_t c = 0; c < channels(); ++c) {
        const auto place = static_cast<std::size_t>(static_cast<const std::byte*>(at(t, c)) - memory_.data());
        for (std::int64_t b = 0; b < bytes_; ++b) outside[place + static_cast<std::size_t>(b)] = std::byte{0xFF};
      }
    }
    for (const std::byte byte : outside) {
      if (byte != std::byte{0xFF}) return false;
    }
    return true;
  }
  void fill(Fill fill, std::uint32_t seed);

 private:
  static constexpr std::size_t kGuard = 64;
  [[nodiscard]] const void* at(std::int64_t token, std::int64_t channel) const {
    return static_cast<const std::byte*>(view_.data) + (token * view_.strides[0] + channel * view_.strides[1]) * bytes_;
  }
  [[nodiscard]] void* at(std::int64_t token, std::int64_t channel) {
    return const_cast<void*>(static_cast<const Matrix*>(this)->at(token, channel));
  }

  Layout layout_;
  std::int64_t bytes_;
  std::vector<std::byte> memory_;
  TensorView view_;
};

inline void Matrix::fill(Fill fill, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  for (std::int64_t t = 0; t < tokens(); ++t) {
    for (std::int64_t c = 0; c < channels(); ++c) {
      const float sample = normal(random);
      float value = sample * std::exp2(static_cast<float>(c % 7 - 3));
      switch (fill) {
        case Fill::kNormal:
          break;
        case Fill::kConstant:
          value = -1.25f;
          break;
        case Fill::kTies:
          value = std::round(sample * 2.0f) * 0.5f;
          break;
        case Fill::kMostlyTies:
          value = (t * 31 + c * 17) % 23 == 0 ? sample : 0.75f;
          break;
        case Fill::kPositive:
          value = 5.0f + std::fabs(sample);
          break;
        case Fill::kNegative:
          value = -7.0f - std::fabs(sample);
          break;
        case Fill::kDrift:
          value = sample * 0.01f + static_cast<float>(t) * 0.05f + static_cast<float>(c) * 0.03f;
          break;
        case Fill::kDenormal:
          value = sample * 1e-39f;
          break;
        case Fill::kZeros:
          value = sample > 0.5f ? -0.0f : (sample < -0.5f ? 0.0f : sample);
          break;
        case Fill::kHuge:
          value = sample > 0.0f ? 3e38f : -3e38f;
          break;
        case Fill::kSpecial: {
          constexpr float kSpecials[] = {NAN, INFINITY, -INFINITY, -0.0f, 0.0f, 6e-8f, -1e-40f};
          if ((t * 7 + c) % 61 < 7) value = kSpecials[(t * 7 + c) % 61];
          break;
        }
        case Fill::kNothing:
          value = sample > 0.0f ? 0.0f : -0.0f;
          break;
        case Fill::kLone:
          value = t % 64 == 37 && c % 64 == 21 ? sample : 0.0f;
          break;
      }
      set(t, c, static_cast<double>(value));
    }
  }
}

inline const char* name_of(Fill fill) {
  constexpr const char* kNames[] = {"normal",   "constant", "ties", "mostly_ties", "positive", "negative", "drift",
                                    "denormal", "zeros",    "huge", "special",     "nothing",  "lone"};
  return kNames[static_cast<int>(fill)];
}

}  // namespace kvpack::test
