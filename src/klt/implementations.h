// What every implementation of transform-coded rows receives, and the list of them.
#pragma once

#include <cstdint>

#include "core/portable.h"
#include "formats/klt_rows/layout.h"
#include "kvpack/klt.h"

namespace kvpack {

/// A table after all checks, as plain pointers on the device of x. Trivially copyable; also handed to the CUDA library.
struct KltData {
  std::int32_t channels = 0;
  std::int32_t coefficients = 0;           // columns of analysis; the first layout.coded of them are stored
  std::int32_t scale_count = 0;            // CPU: how many are in the scale; a GPU counts them itself
  const float* mean = nullptr;             // [channels]
  const float* analysis = nullptr;         // [channels, coefficients]
  const float* synthesis = nullptr;        // [coded, channels]
  const std::int32_t* in_scale = nullptr;  // [coefficients]
  const float* centroids = nullptr;        // those of coefficient 0, of coefficient 1, ...
  klt_rows::RowLayout layout;
};

/// The dense side of all sequences: element (s, t, c) lies at s * sequence_stride + t * token_stride + c * channel_stride.
struct KltMatrix {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t sequence_stride = 0;  // elements
  std::int64_t token_stride = 0;
  std::int64_t channel_stride = 1;
};

/// Rows of all sequences: those of one sequence without gaps.
struct KltRowsData {
  std::uint8_t* data = nullptr;
  std::int64_t sequence_stride = 0;  // bytes
};

struct SimulateKltProblem {
  KltData table;
  KltMatrix x;
  KltMatrix out;  // may be x
  std::int64_t sequences = 0;
  std::int64_t tokens = 0;
  std::int64_t protected_tokens = 0;  // left alone on the CPU, where the entry copies them; a GPU copies them
  void* stream = nullptr;
};

struct CompressKltProblem {
  KltData table;
  KltMatrix x;
  KltRowsData rows;
  std::int64_t sequences = 0;
  std::int64_t tokens = 0;
  void* stream = nullptr;
};

/// Rotation of keys; width 0: none.
struct KltRopeData {
  std::int32_t head_dim = 0;
  std::int32_t width = 0;
  const float* cos = nullptr;  // [tokens, width]
  const float* sin = nullptr;
};

struct UnpackKltProblem {
  KltData table;
  KltRowsData rows;
  KltRopeData rope;
  KltMatrix out;
  std::int64_t sequences = 0;
  std::int64_t tokens = 0;
  void* stream = nullptr;
};

/// Where x holds a number that is not finite in float32; sequence -1: nowhere. Tokens before `first_token` are not looked at.
struct KltPlace {
  std::int64_t sequence = -1;
  std::int64_t token = 0;
  std::int64_t channel = 0;
};

using SimulateKltFunction = void (*)(const SimulateKltProblem&);
using CompressKltFunction = void (*)(const CompressKltProblem&);
using UnpackKltFunction = void (*)(const UnpackKltProblem&);

#define KVPACK_DECLARE_KLT                      \
  void simulate_klt(const SimulateKltProblem&); \
  void compress_klt(const CompressKltProblem&); \
  void unpack_klt(const UnpackKltProblem&);
namespace reference {
KVPACK_DECLARE_KLT
}
namespace scalar {
KVPACK_DECLARE_KLT
}
namespace avx2 {
KVPACK_DECLARE_KLT
}
namespace avx512 {
KVPACK_DECLARE_KLT
}
namespace cuda {  // in libkvpack_cuda
KVPACK_DECLARE_KLT
namespace mma {  // tensor cores without Hopper's own instructions
KVPACK_DECLARE_KLT
}
namespace chains {  // the CPU's bits, without tensor cores
KVPACK_DECLARE_KLT
}
}  // namespace cuda
#undef KVPACK_DECLARE_KLT

}  // namespace kvpack
