// The cases of FlatQuant's operations: shapes with a reason each, tensors of one call, and a judge in float64 of its own.
#pragma once

#include <array>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "kvpack/kvpack.h"
#include "support/matrix.h"

namespace kvpack::test {

struct KronCase {
  const char* why;
  std::int64_t rows;     // M
  std::int64_t columns;  // N
  bool has_left = true;
  bool has_right = true;
};

inline const std::vector<KronCase>& kron_cases() {
  static const std::vector<KronCase> cases{
      {"one element", 1, 1},
      {"odd sides, no whole word", 7, 9},
      {"one word", 2, 4},
      {"below, at and above a vector of 16", 15, 16},
      {"a side of 17", 17, 24},
      {"896", 28, 32},
      {"4096", 64, 64},
      {"5120", 64, 80},
      {"8192", 64, 128},
      {"11008", 86, 128},
      {"14336", 112, 128},
      {"13824", 108, 128},
      {"28672", 128, 224},
      {"largest side of the fast kernels, and one above", 256, 8},
      {"a long side", 8, 264},
      {"left alone", 48, 24, true, false},
      {"right alone", 24, 40, false, true},
      {"no transform at all", 1, 200, false, false},
  };
  return cases;
}

inline std::int64_t codes_in(DType form) { return form == DType::kInt32 ? 8 : (form == DType::kUInt8 ? 2 : 1); }

/// Bytes with guards around them, for outputs that are no floating point.
class Buffer {
 public:
  Buffer(DType dtype, std::int64_t rows, std::int64_t columns) : bytes_(rows * columns * element_bytes(dtype)) {
    memory_.assign(static_cast<std::size_t>(bytes_) + 2 * kGuard, std::byte{0xA5});
    view_ = make_view(memory_.data() + kGuard, dtype, {rows, columns});
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  [[nodiscard]] const TensorView& view() const { return view_; }
  template <typename T>
  [[nodiscard]] T* as() const {
    return static_cast<T*>(view_.data);
  }
  [[nodiscard]] bool guards_are_intact() const {
    for (std::size_t i = 0; i < kGuard; ++i) {
      if (memory_[i] != std::byte{0xA5} || memory_[memory_.size() - 1 - i] != std::byte{0xA5}) return false;
    }
    return true;
  }
  [[nodiscard]] bool same_bytes(const Buffer& other) const { return memory_ == other.memory_; }

 private:
  static constexpr std::size_t kGuard = 64;
  std::int64_t bytes_;
  std::vector<std::byte> memory_;
  TensorView view_;
};

/// The tensors that one output writes.
struct OutputBuffers {
  OutputBuffers(DType form, std::int64_t tokens, std::int64_t n, bool is_affine,
                CodeEncoding code_encoding = CodeEncoding::kTwosComplement)
      : codes(form, tokens, n / codes_in(form)),
        scales(DType::kFloat32, tokens, 1),
        zeros(DType::kFloat32, tokens, 1),
        encoding(code_encoding),
        has_zeros(is_affine) {}
  [[nodiscard]] Int4Rows rows() const {
    return {codes.view(), scales.view(), has_zeros ? zeros.view() : TensorView{}, encoding};
  }
  [[nodiscard]] bool guards_are_intact() const {
    return codes.guards_are_intact() && scales.guards_are_intact() && zeros.guards_are_intact();
  }
  /// Code of one element, by plain arithmetic that shares nothing with the library.
  [[nodiscard]] int code(std::int64_t token, std::int64_t i, std::int64_t n) const {
    if (codes.view().dtype == DType::kInt8) return codes.as<std::int8_t>()[token * n + i];
    unsigned nibble = 0;
    if (codes.view().dtype == DType::kInt32) {
      nibble = codes.as<std::uint32_t>()[token * (n / 8) + i / 8] >> (4 * (i % 8)) & 15u;
    } else {
      nibble = codes.as<std::uint8_t>()[token * (n / 2) + i / 2] >> (4 * (i % 2)) & 15u;
    }
    if (encoding == CodeEncoding::kOffset) return static_cast<int>(nibble) - 8;
    return nibble < 8 ? static_cast<int>(nibble) : static_cast<int>(nibble) - 16;
  }
  Buffer codes;
  Buffer scales;
  Buffer zeros;
  CodeEncoding encoding;
  bool has_zeros;
};

/// Matrices of a case: orthogonal-like random ones, so that values keep their size.
struct CaseMatrices {
  CaseMatrices(const KronCase& shape, DType dtype, bool with_diagonal, std::uint32_t seed)
      : left(shape.rows, shape.rows, dtype),
        right(shape.columns, shape.columns, dtype),
        diagonal(1, shape.rows * shape.columns, dtype) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (Matrix* matrix : {&left, &right}) {
      const double size = 1.0 / std::sqrt(static_cast<double>(matrix->channels()));
      for (std::int64_t i = 0; i < matrix->tokens(); ++i) {
        for (std::int64_t j = 0; j < matrix->channels(); ++j) matrix->set(i, j, normal(random) * size);
      }
    }
    for (std::int64_t i = 0; i < diagonal.channels(); ++i) diagonal.set(0, i, 0.5 + std::fabs(normal(random)));
    if (shape.has_left) transform.left = left.view();
    if (shape.has_right) transform.right = right.view();
    if (!with_diagonal) return;
    transform.diagonal = diagonal.view();
    transform.diagonal.rank = 1;
    transform.diagonal.shape = {diagonal.channels(), 0, 0, 0};
    transform.diagonal.strides = {1, 0, 0, 0};
  }
  Matrix left;
  Matrix right;
  Matrix diagonal;
  KronTransform transform;
};

/// Y of one row in float64.
inline std::vector<double> exact_transform(const KronCase& shape, const CaseMatrices& matrices,
                                           const std::vector<double>& x) {
  const auto at = [&](std::int64_t i, std::int64_t j) { return static_cast<std::size_t>(i * shape.columns + j); };
  std::vector<double> half(x.size(), 0.0);
  std::vector<double> y(x.size(), 0.0);
  for (std::int64_t i = 0; i < shape.rows; ++i) {
    for (std::int64_t j = 0; j < shape.columns; ++j) {
      if (!shape.has_left) half[at(i, j)] = x[at(i, j)];
      for (std::int64_t k = 0; shape.has_left && k < shape.rows; ++k) {
        half[at(i, j)] += matrices.left.get(k, i) * x[at(k, j)];
      }
    }
  }
  for (std::int64_t i = 0; i < shape.rows; ++i) {
    for (std::int64_t j = 0; j < shape.columns; ++j) {
      if (!shape.has_right) y[at(i, j)] = half[at(i, j)];
      for (std::int64_t k = 0; shape.has_right && k < shape.columns; ++k) {
        y[at(i, j)] += half[at(i, k)] * matrices.right.get(k, j);
      }
    }
  }
  return y;
}

/// x with channels of different size and a few outliers, as activations are.
inline void fill_activations(Matrix& x, std::uint32_t seed) {
  x.fill(Fill::kNormal, seed);
  for (std::int64_t t = 0; t < x.tokens(); ++t)
    x.set(t, (t * 13) % x.channels(), x.get(t, (t * 13) % x.channels()) * 20);
}

}  // namespace kvpack::test
