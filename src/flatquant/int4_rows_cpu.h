// dequantize_int4 and linear_w4a4 in the instruction set at hand. Compiled once per instruction set by int4_rows_cpu.cpp.
//
// The linear layer multiplies unsigned bytes with signed ones: weights become q + 8 (which is their offset encoding), activations
// q - zero, and 8 * sum(q - zero) is taken off again. Packed weights are never put in order: a vector of bytes is
// split into low and high nibbles, the even and the odd codes of a block, and the activations, which are prepared once a
// call, lie in that order.
//
//   weights of a block    byte i: code 2i | code 2i+1 << 4       ->  vector of even codes, vector of odd codes
//   activations           [even codes of the block][odd codes of the block][next block ...
#include "flatquant/codes_cpu.h"
#include "flatquant/dots_cpu.h"
#include "flatquant/int4_order_cpu.h"

namespace kvpack::KVPACK_ISA {
namespace {

inline constexpr int kTileTokens = 4;
inline constexpr int kTileOutputs = KVPACK_ISA_LANES == 16 ? 4 : 2;

/// Activations of all tokens as signed bytes in the order of the weights, zeros behind n.
struct Activations {
  std::int8_t* codes = nullptr;         // [tokens, stride]
  std::int32_t* corrections = nullptr;  // [tokens]: 8 * sum of a row
  std::int64_t stride = 0;
};

/// Prepares one token.
inline void prepare_token(const Int4Data& x, std::int64_t token, bool is_split, const Activations& prepared) {
  std::int8_t* codes = prepared.codes + token * prepared.stride;
  prepare_codes(x, token, is_split, codes, prepared.stride);
  std::int32_t sum = 0;
  for (std::int64_t i = 0; i < prepared.stride; ++i) sum += codes[i];
  prepared.corrections[token] = 8 * sum;
}

/// A block of weights as unsigned bytes q + 8, in the order of the activations.
struct WeightVectors {
  Bytes first;
  Bytes second;
};

template <CodeForm kForm>
inline WeightVectors load_weights(const std::byte* block, Bytes flip) {
  if constexpr (kForm == CodeForm::kInt8) {
    const Bytes origin = set_bytes(8);
    return {add_bytes(load_vector(block), origin), add_bytes(load_vector(block + kVectorBytes), origin)};
  } else {
    const Bytes packed = flip_bits(load_vector(block), flip);
    return {low_nibbles(packed), high_nibbles(packed)};
  }
}

/// The sums of kTokens tokens and kOutputs rows of weights.
template <CodeForm kForm, int kTokens, int kOutputs>
void multiply_codes(const Int4Data& weight, std::int64_t output, const Activations& x, std::int64_t token,
                    std::int32_t* sums) {
  // Two's complement becomes offset by flipping the sign bits of both nibbles.
  const Bytes flip = set_bytes(static_cast<int>((flip_of(weight.encoding) ^ 8u) * 17u));
  const std::int64_t block_bytes = row_bytes_of_codes(kForm, kDotBlock);
  const std::int64_t row_bytes = row_bytes_of_codes(kForm, weight.columns);
  const std::byte* row = row_of(weight, output);
  const std::int8_t* codes = x.codes + token * x.stride;
  Sums partial[kTokens][kOutputs];
  for (auto& of_token : partial) {
    for (Sums& sum : of_token) sum = no_sums();
  }
  const auto add_block = [&](const std::byte* block, std::int64_t stride,
                             std::int64_t c) __attribute__((always_inline)) {
    WeightVectors weights[kOutputs];
#pragma GCC unroll 4
    for (int o = 0; o < kOutputs; ++o) weights[o] = load_weights<kForm>(block + o * stride, flip);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      const Bytes first = load_vector(codes + t * x.stride + c);
      const Bytes second = load_vector(codes + t * x.stride + c + kVectorBytes);
#pragma GCC unroll 4
      for (int o = 0; o < kOutputs; ++o) {
        partial[t][o] = add_dots(add_dots(partial[t][o], weights[o].first, first), weights[o].second, second);
      }
    }
  };
  std::int64_t c = 0;
  for (; c + kDotBlock <= weight.columns; c += kDotBlock) add_block(row + c / kDotBlock * block_bytes, row_bytes, c);
  if (c < weight.columns) {
    // The last block ends with its row: what is behind it is another row's, or nobody's.
    std::byte last[kOutputs][2 * kVectorBytes] = {};
    const std::int64_t done = c / kDotBlock * block_bytes;
    for (int o = 0; o < kOutputs; ++o) {
      std::memcpy(last[o], row + o * row_bytes + done, static_cast<std::size_t>(row_bytes - done));
    }
    add_block(last[0], 2 * kVectorBytes, c);
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int o = 0; o < kOutputs; ++o) sums[t * kOutputs + o] = total(partial[t][o]) - x.corrections[token + t];
  }
}

template <typename T>
inline void write_value(const LinearW4A4Problem& problem, std::int64_t token, std::int64_t output, std::int32_t sum) {
  float value = linear_value(sum, problem.x.scales[token], problem.weight.scales[output]);
  if (problem.bias != nullptr) value += to_float(static_cast<const T*>(problem.bias)[output]);
  from_float(value, static_cast<T*>(problem.out)[token * problem.weight.rows + output]);
}

/// Outputs [first, end) of tokens [token, token_end).
template <typename T, CodeForm kForm>
void multiply_part(const LinearW4A4Problem& problem, const Activations& x, std::int64_t token, std::int64_t token_end,
                   std::int64_t first, std::int64_t end) {
  const auto tile = [&]<int kTokens, int kOutputs>(std::int64_t t, std::int64_t o) {
    std::int32_t sums[kTokens * kOutputs];
    multiply_codes<kForm, kTokens, kOutputs>(problem.weight, o, x, t, sums);
    for (int i = 0; i < kTokens; ++i) {
      for (int j = 0; j < kOutputs; ++j) write_value<T>(problem, t + i, o + j, sums[i * kOutputs + j]);
    }
  };
  const auto outputs = [&]<int kTokens>(std::int64_t t) {
    std::int64_t o = first;
    for (; o + kTileOutputs <= end; o += kTileOutputs) tile.template operator()<kTokens, kTileOutputs>(t, o);
    for (; o < end; ++o) tile.template operator()<kTokens, 1>(t, o);
  };
  std::int64_t t = token;
  for (; t + kTileTokens <= token_end; t += kTileTokens) outputs.template operator()<kTileTokens>(t);
  for (; t < token_end; ++t) outputs.template operator()<1>(t);
}

inline Activations prepare(const LinearW4A4Problem& problem) {
  Activations x;
  const std::int64_t tokens = problem.x.rows;
  x.stride = round_up(problem.x.columns, kDotBlock);
  const std::int64_t corrections = round_up(tokens, 16);  // codes start on a cache line
  float* memory = thread_scratch(corrections + divide_up(tokens * x.stride, 4), Scratch::kCall);
  x.corrections = reinterpret_cast<std::int32_t*>(memory);
  x.codes = reinterpret_cast<std::int8_t*>(memory + corrections);
  constexpr std::int64_t kTogether = 16;
  const bool is_split = problem.weight.form != CodeForm::kInt8;
  auto task = [&](std::int64_t index) {
    const std::int64_t end = std::min(tokens, (index + 1) * kTogether);
    for (std::int64_t t = index * kTogether; t < end; ++t) prepare_token(problem.x, t, is_split, x);
  };
  parallel_for(divide_up(tokens, kTogether), task);
  return x;
}

}  // namespace

void linear_w4a4(const LinearW4A4Problem& problem) {
  // Parts whose codes stay in the second-level cache: 64 tokens, 32 rows of weights.
  constexpr std::int64_t kPartTokens = 64;
  constexpr std::int64_t kPartOutputs = 32;
  const Activations x = prepare(problem);
  const std::int64_t outputs = problem.weight.rows;
  const std::int64_t token_parts = divide_up(problem.x.rows, kPartTokens);
  with_float_type(problem.dtype, [&]<typename T>() {
    auto task = [&](std::int64_t index) {
      const std::int64_t token = index % token_parts * kPartTokens;
      const std::int64_t output = index / token_parts * kPartOutputs;
      const std::int64_t token_end = std::min(problem.x.rows, token + kPartTokens);
      const std::int64_t end = std::min(outputs, output + kPartOutputs);
      if (problem.weight.form == CodeForm::kInt8) {
        multiply_part<T, CodeForm::kInt8>(problem, x, token, token_end, output, end);
      } else {
        multiply_part<T, CodeForm::kPairs>(problem, x, token, token_end, output, end);
      }
    };
    parallel_for(token_parts * divide_up(outputs, kPartOutputs), task);
  });
}

void dequantize_int4(const DequantizeInt4Problem& problem) {
  constexpr std::int64_t kTaskCodes = 1 << 16;
  const Int4Data& rows = problem.rows;
  const std::int64_t together = std::max<std::int64_t>(1, kTaskCodes / rows.columns);
  with_float_type(problem.dtype, [&]<typename T>() {
    const auto write_row = [&](std::int64_t t) {
      const std::byte* codes = row_of(rows, t);
      const float zero = rows.zeros == nullptr ? 0.0f : rows.zeros[t];
      T* out = static_cast<T*>(problem.out) + t * rows.columns;
      std::int64_t i = 0;
#if KVPACK_ISA_LANES > 1
      const F32 zeros = set1(zero);
      const F32 scales = set1(rows.scales[t]);
      const unsigned flip = flip_of(rows.encoding);
      const bool is_plain = rows.form == CodeForm::kInt8;
      for (; i + kLanes <= rows.columns; i += kLanes) {
        const F32 q = is_plain ? load_bytes(codes + i) : load_pairs(codes + i / 2, flip);
        store(out + i, mul(sub(q, zeros), scales));
      }
#endif
      for (; i < rows.columns; ++i) {
        const auto q = static_cast<float>(read_code(codes, i, rows.form, rows.encoding));
        from_float((q - zero) * rows.scales[t], out[i]);
      }
    };
    auto task = [&](std::int64_t index) {
      const std::int64_t end = std::min(rows.rows, (index + 1) * together);
      for (std::int64_t t = index * together; t < end; ++t) write_row(t);
    };
    parallel_for(divide_up(rows.rows, together), task);
  });
}

}  // namespace kvpack::KVPACK_ISA
