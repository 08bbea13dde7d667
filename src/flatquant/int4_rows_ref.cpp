// Reference of what reads codes: dequantising and the linear layer, one code at a time. Plain and slow.
#include "core/half.h"
#include "core/with_type.h"
#include "flatquant/codes.h"
#include "flatquant/implementations.h"

namespace kvpack::reference {

namespace {

int code_at(const Int4Data& rows, std::int64_t row, std::int64_t column) {
  const auto* bytes = static_cast<const std::byte*>(rows.codes) + row * row_bytes_of_codes(rows.form, rows.columns);
  return read_code(bytes, column, rows.form, rows.encoding);
}

float zero_at(const Int4Data& rows, std::int64_t row) { return rows.zeros == nullptr ? 0.0f : rows.zeros[row]; }

}  // namespace

void dequantize_int4(const DequantizeInt4Problem& problem) {
  const Int4Data& rows = problem.rows;
  with_float_type(problem.dtype, [&]<typename T>() {
    for (std::int64_t t = 0; t < rows.rows; ++t) {
      for (std::int64_t c = 0; c < rows.columns; ++c) {
        const float value = (static_cast<float>(code_at(rows, t, c)) - zero_at(rows, t)) * rows.scales[t];
        from_float(value, static_cast<T*>(problem.out)[t * rows.columns + c]);
      }
    }
  });
}

void linear_w4a4(const LinearW4A4Problem& problem) {
  const std::int64_t out_features = problem.weight.rows;
  with_float_type(problem.dtype, [&]<typename T>() {
    for (std::int64_t t = 0; t < problem.x.rows; ++t) {
      const int zero = static_cast<int>(zero_at(problem.x, t));
      for (std::int64_t o = 0; o < out_features; ++o) {
        std::int32_t sum = 0;
        for (std::int64_t c = 0; c < problem.x.columns; ++c) {
          sum += (code_at(problem.x, t, c) - zero) * code_at(problem.weight, o, c);
        }
        float value = linear_value(sum, problem.x.scales[t], problem.weight.scales[o]);
        if (problem.bias != nullptr) value += to_float(static_cast<const T*>(problem.bias)[o]);
        from_float(value, static_cast<T*>(problem.out)[t * out_features + o]);
      }
    }
  });
}

}  // namespace kvpack::reference
