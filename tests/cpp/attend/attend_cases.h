// The inputs of every test of attention on tiles and of its products.
#pragma once

#include <vector>

#include "kvpack/kvpack.h"

namespace kvpack::test {

struct AttendCase {
  const char* name;  // why it is here
  std::int64_t batch;
  std::int64_t kv_heads;
  std::int64_t group;
  std::int64_t rows;
  std::int64_t tokens;
  std::int64_t recent;
  std::int64_t head_dim;
  std::int32_t key_bits = 16;
  std::int32_t value_bits = 16;
  DType dtype = DType::kFloat16;
  double sparsity = 0.7;
  double softcap = 0.0;
  Masking masking = Masking::kNone;
  double scale = 0.0;
  bool recent_heads_inside = false;  // the recent window as a model's projection lays it out
};

inline const std::vector<AttendCase>& attend_cases() {
  constexpr DType kF16 = DType::kFloat16;
  static const std::vector<AttendCase> cases{
      {"one token", 1, 1, 1, 1, 1, 0, 64},
      {"one below a block", 2, 1, 3, 1, 63, 1, 64},
      {"one block", 1, 2, 4, 1, 64, 0, 128},
      {"one above a block", 2, 2, 1, 2, 65, 33, 128},
      {"three blocks, head 256", 1, 2, 3, 1, 192, 32, 256},
      {"2 bits", 2, 2, 4, 1, 300, 33, 128, 2, 2},
      {"mixed widths", 1, 3, 8, 1, 257, 31, 128, 4, 2},
      {"keys in halves, values in 8 bits", 1, 2, 3, 2, 130, 0, 64, 16, 8},
      {"1 bit", 1, 2, 1, 1, 130, 7, 64, 1, 1},
      {"one row too many for a register of 8", 1, 1, 1, 9, 130, 9, 64, 4, 4},
      {"seven rows", 1, 1, 3, 7, 130, 9, 128},
      {"eight rows", 1, 1, 1, 8, 200, 8, 128, 2, 4},
      {"sixteen rows, large groups", 1, 2, 8, 16, 130, 16, 64, 2, 2},
      {"float32", 2, 2, 3, 2, 200, 17, 128, 4, 4, DType::kFloat32},
      {"float32, halves", 2, 2, 3, 1, 200, 17, 128, 16, 16, DType::kFloat32},
      {"bfloat16", 2, 2, 4, 1, 200, 17, 128, 16, 16, DType::kBFloat16},
      {"bfloat16, 2 bits", 2, 2, 4, 2, 200, 17, 128, 2, 2, DType::kBFloat16},
      {"all kept", 1, 2, 3, 1, 130, 5, 64, 16, 16, kF16, 0.0},
      {"softcap", 1, 2, 3, 2, 130, 5, 64, 4, 4, kF16, 0.5, 2.0},
      {"causal, window as long as the rows", 1, 2, 3, 4, 130, 4, 64, 4, 4, kF16, 0.7, 0.0, Masking::kCausal},
      {"causal, longer window", 2, 2, 1, 7, 70, 40, 128, 16, 16, kF16, 0.7, 0.0, Masking::kCausal},
      {"causal without tiles", 1, 2, 2, 5, 0, 5, 64, 16, 16, kF16, 0.7, 0.0, Masking::kCausal},
      {"a scale of its own", 1, 2, 2, 1, 130, 5, 64, 16, 16, kF16, 0.7, 0.0, Masking::kNone, 0.5},
      {"recent window alone", 2, 2, 2, 1, 0, 33, 64},
      {"no tokens at all", 2, 2, 2, 1, 0, 0, 64},
      {"window with heads inside", 2, 3, 2, 1, 70, 33, 64, 4, 4, kF16, 0.7, 0.0, Masking::kNone, 0.0, true},
      {"long", 1, 1, 4, 1, 2100, 32, 128, 2, 2},
  };
  return cases;
}

}  // namespace kvpack::test
