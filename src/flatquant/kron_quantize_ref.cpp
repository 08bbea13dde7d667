// Reference of the transform and of its quantisation: products in float64, everything after them by rules.h. Plain and slow.
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/half.h"
#include "core/with_type.h"
#include "flatquant/codes.h"
#include "flatquant/implementations.h"

namespace kvpack::reference {

namespace {

template <typename T>
double value_at(const void* data, std::int64_t index) {
  return static_cast<double>(to_float(static_cast<const T*>(data)[index]));
}

/// What the transform receives: producer and diagonal, rounded once to the type of x.
template <typename T>
std::vector<double> read_row(const KronQuantizeProblem& problem, std::int64_t token) {
  const std::int64_t n = problem.matrices.rows * problem.matrices.columns;
  const std::int64_t first = token * problem.x_stride;
  double factor = 1.0;
  if (problem.producer == KronProducer::kRmsNorm) {
    double squares = 0.0;
    for (std::int64_t i = 0; i < n; ++i) squares += std::pow(value_at<T>(problem.x, first + i), 2);
    factor = 1.0 / std::sqrt(squares / static_cast<double>(n) + static_cast<double>(problem.epsilon));
  }
  std::vector<double> row;
  for (std::int64_t i = 0; i < n; ++i) {
    double value = value_at<T>(problem.x, first + i);
    if (problem.producer == KronProducer::kRmsNorm) value = value * factor * value_at<T>(problem.second, i);
    if (problem.producer == KronProducer::kSiluMul) {
      value = value / (1.0 + std::exp(-value)) * value_at<T>(problem.second, token * problem.second_stride + i);
    }
    if (problem.matrices.diagonal != nullptr) value *= value_at<T>(problem.matrices.diagonal, i);
    T rounded;
    from_float(static_cast<float>(value), rounded);
    row.push_back(static_cast<double>(to_float(rounded)));
  }
  return row;
}

/// left^T * X * right of one row; a matrix that is absent is the identity.
template <typename T>
std::vector<double> transform_row(const KronMatrices& matrices, const std::vector<double>& x) {
  const std::int64_t rows = matrices.rows;
  const std::int64_t columns = matrices.columns;
  const auto place = [columns](std::int64_t i, std::int64_t j) { return static_cast<std::size_t>(i * columns + j); };
  std::vector<double> half = x;
  if (matrices.left != nullptr) {
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < columns; ++j) {
        double sum = 0.0;
        for (std::int64_t k = 0; k < rows; ++k) sum += value_at<T>(matrices.left, k * rows + i) * x[place(k, j)];
        half[place(i, j)] = sum;
      }
    }
  }
  if (matrices.right == nullptr) return half;
  std::vector<double> y(x.size());
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) {
      double sum = 0.0;
      for (std::int64_t k = 0; k < columns; ++k) {
        sum += half[place(i, k)] * value_at<T>(matrices.right, k * columns + j);
      }
      y[place(i, j)] = sum;
    }
  }
  return y;
}

RowRange range_of(const std::vector<float>& y) {
  RowRange range;
  for (const float value : y) {
    if (!std::isfinite(value)) range.is_finite = false;
    range.highest = std::max(range.highest, value);
    range.lowest = std::min(range.lowest, value);
  }
  return range;
}

void write_codes(const std::vector<float>& y, const RowGrid& grid, const KronQuantizeProblem& problem, void* row) {
  const bool is_finite = std::isfinite(grid.scale);
  const auto code = [&](std::size_t i) { return is_finite ? code_of(y[i], grid) : 0; };
  for (std::size_t i = 0; i < y.size(); i += 2) {
    if (problem.form == CodeForm::kInt8) {
      static_cast<std::int8_t*>(row)[i] = static_cast<std::int8_t>(code(i));
      if (i + 1 < y.size()) static_cast<std::int8_t*>(row)[i + 1] = static_cast<std::int8_t>(code(i + 1));
    } else {
      write_pair(row, static_cast<std::int64_t>(i / 2), code(i), code(i + 1), problem.encoding);
    }
  }
}

}  // namespace

void kron_quantize(const KronQuantizeProblem& problem) {
  const std::int64_t n = problem.matrices.rows * problem.matrices.columns;
  const std::int64_t row_bytes = row_bytes_of_codes(problem.form, n);
  with_float_type(problem.dtype, [&]<typename T>() {
    for (std::int64_t t = 0; t < problem.tokens; ++t) {
      std::vector<float> y;
      for (const double value : transform_row<T>(problem.matrices, read_row<T>(problem, t))) {
        y.push_back(static_cast<float>(value));
      }
      const RowRange range = range_of(y);
      for (std::int32_t i = 0; i < problem.num_outputs; ++i) {
        const KronOutputData& output = problem.outputs[static_cast<std::size_t>(i)];
        const RowGrid grid = make_row_grid(range, output.clip_max, output.clip_min, problem.is_affine);
        write_codes(y, grid, problem, static_cast<std::byte*>(output.codes) + t * row_bytes);
        output.scales[t] = grid.scale;
        if (output.zeros != nullptr) output.zeros[t] = grid.zero;
      }
    }
  });
}

void undo_transform(const UndoTransformProblem& problem) {
  const std::int64_t n = problem.matrices.rows * problem.matrices.columns;
  with_float_type(problem.dtype, [&]<typename T>() {
    for (std::int64_t t = 0; t < problem.tokens; ++t) {
      std::vector<double> row;
      for (std::int64_t i = 0; i < n; ++i) row.push_back(value_at<T>(problem.y, t * problem.y_stride + i));
      row = transform_row<T>(problem.matrices, row);
      for (std::int64_t i = 0; i < n; ++i) {
        const double factor = problem.matrices.diagonal == nullptr ? 1.0 : value_at<T>(problem.matrices.diagonal, i);
        from_float(static_cast<float>(row[static_cast<std::size_t>(i)] * factor),
                   static_cast<T*>(problem.out)[t * problem.out_stride + i]);
      }
    }
  });
}

}  // namespace kvpack::reference
