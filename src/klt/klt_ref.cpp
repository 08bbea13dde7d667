// Reference of transform-coded rows: one token, one coefficient, one bit field at a time.
#include <cmath>
#include <vector>

#include "core/half.h"
#include "core/with_type.h"
#include "formats/klt_rows/codec_ref.h"
#include "klt/implementations.h"
#include "klt/rules.h"
#include "quantize/codebook.h"

namespace kvpack::reference {

namespace {

static_assert(kKltStrands == kStrands, "join_strands joins the strands of the scale");

/// One token as floats.
std::vector<float> read_token(const KltMatrix& x, std::int64_t sequence, std::int64_t token, std::int32_t channels) {
  std::vector<float> values(static_cast<std::size_t>(channels));
  with_float_type(x.dtype, [&]<typename T>() {
    const T* row = static_cast<const T*>(x.data) + sequence * x.sequence_stride + token * x.token_stride;
    for (std::int32_t c = 0; c < channels; ++c)
      values[static_cast<std::size_t>(c)] = to_float(row[c * x.channel_stride]);
  });
  return values;
}

void write_token(const std::vector<float>& values, const KltMatrix& out, std::int64_t sequence, std::int64_t token) {
  with_float_type(out.dtype, [&]<typename T>() {
    T* row = static_cast<T*>(out.data) + sequence * out.sequence_stride + token * out.token_stride;
    for (std::size_t c = 0; c < values.size(); ++c) {
      from_float(values[c], row[static_cast<std::int64_t>(c) * out.channel_stride]);
    }
  });
}

/// Numbers of levels of the coded coefficients.
std::vector<std::int32_t> levels_of(const klt_rows::RowLayout& layout) {
  std::vector<std::int32_t> levels;
  for (std::int32_t i = 0; i < kNumKltLevels; ++i)
    levels.insert(levels.end(), static_cast<std::size_t>(layout.counts[i]), kKltLevels[i]);
  return levels;
}

/// Coefficients of one token: each a chain of fused multiply-adds over the channels in order.
std::vector<float> analyse(const KltData& table, const std::vector<float>& x) {
  std::vector<float> z(static_cast<std::size_t>(table.coefficients), 0.0f);
  for (std::int32_t c = 0; c < table.channels; ++c) {
    const float centred = x[static_cast<std::size_t>(c)] - table.mean[c];
    const float* row = table.analysis + static_cast<std::int64_t>(c) * table.coefficients;
    for (std::size_t k = 0; k < z.size(); ++k) z[k] = std::fma(centred, row[k], z[k]);
  }
  return z;
}

klt_rows::TokenCodes quantize(const KltData& table, const std::vector<float>& z) {
  float strands[kKltStrands] = {};
  for (std::int32_t k = 0; k < table.coefficients; ++k) {
    const float square = z[static_cast<std::size_t>(k)] * z[static_cast<std::size_t>(k)];
    if (table.in_scale[k] != 0) strands[k % kKltStrands] = strands[k % kKltStrands] + square;
  }
  klt_rows::TokenCodes token;
  from_float(klt_rms(join_strands(strands), table.scale_count), token.scale);
  token.scale.bits = static_cast<std::uint16_t>(klt_scale_bits(klt_scale_code(token.scale.bits)));
  const float inverse = klt_inverse_scale(to_float(token.scale));
  const float* centroids = table.centroids;
  std::size_t k = 0;
  for (const std::int32_t levels : levels_of(table.layout)) {
    token.codes.push_back(klt_code(z[k++] * inverse, centroids, levels));
    centroids += levels;
  }
  return token;
}

/// Channels of one token: a chain over the coefficients in order, then r and the mean.
std::vector<float> synthesise(const KltData& table, const klt_rows::TokenCodes& token) {
  std::vector<float> sums(static_cast<std::size_t>(table.channels), 0.0f);
  const float* centroids = table.centroids;
  const float* row = table.synthesis;
  std::size_t k = 0;
  for (const std::int32_t levels : levels_of(table.layout)) {
    const float value = centroids[token.codes[k++]];
    for (std::size_t c = 0; c < sums.size(); ++c) sums[c] = std::fma(value, row[c], sums[c]);
    centroids += levels;
    row += table.channels;
  }
  const float scale = to_float(token.scale);
  for (std::size_t c = 0; c < sums.size(); ++c) sums[c] = std::fma(scale, sums[c], table.mean[c]);
  return sums;
}

void rotate_keys(const KltRopeData& rope, std::int64_t token, std::vector<float>& x) {
  const std::int32_t half = rope.width / 2;
  const float* cos = rope.cos + token * rope.width;
  const float* sin = rope.sin + token * rope.width;
  for (std::size_t head = 0; rope.width > 0 && head < x.size(); head += static_cast<std::size_t>(rope.head_dim)) {
    for (std::int32_t i = 0; i < half; ++i) {
      float& low = x[head + static_cast<std::size_t>(i)];
      float& high = x[head + static_cast<std::size_t>(i + half)];
      const float rotated_low = low * cos[i] + -high * sin[i];
      high = high * cos[i + half] + low * sin[i + half];
      low = rotated_low;
    }
  }
}

}  // namespace

void simulate_klt(const SimulateKltProblem& problem) {
  for (std::int64_t s = 0; s < problem.sequences; ++s) {
    for (std::int64_t t = problem.protected_tokens; t < problem.tokens; ++t) {
      const std::vector<float> x = read_token(problem.x, s, t, problem.table.channels);
      const klt_rows::TokenCodes token = quantize(problem.table, analyse(problem.table, x));
      write_token(synthesise(problem.table, token), problem.out, s, t);
    }
  }
}

void compress_klt(const CompressKltProblem& problem) {
  const klt_rows::RowLayout& layout = problem.table.layout;
  if (layout.coded == 0) return;
  for (std::int64_t s = 0; s < problem.sequences; ++s) {
    for (std::int64_t t = 0; t < problem.tokens; ++t) {
      const std::vector<float> x = read_token(problem.x, s, t, problem.table.channels);
      klt_rows::write_row(layout, quantize(problem.table, analyse(problem.table, x)),
                          problem.rows.data + s * problem.rows.sequence_stride + t * layout.row_bytes);
    }
  }
}

void unpack_klt(const UnpackKltProblem& problem) {
  const klt_rows::RowLayout& layout = problem.table.layout;
  for (std::int64_t s = 0; s < problem.sequences; ++s) {
    for (std::int64_t t = 0; t < problem.tokens; ++t) {
      const std::uint8_t* row = problem.rows.data + s * problem.rows.sequence_stride + t * layout.row_bytes;
      std::vector<float> x = synthesise(problem.table, klt_rows::read_row(layout, row));
      rotate_keys(problem.rope, t, x);
      write_token(x, problem.out, s, t);
    }
  }
}

}  // namespace kvpack::reference
