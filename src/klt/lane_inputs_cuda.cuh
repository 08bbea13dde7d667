// What a lane of product_wgmma_cuda.cuh has of its rows: 4 neighbouring inputs of 16, from memory to fragments of A.
#pragma once

#include <type_traits>

#include "cuda/element.cuh"
#include "cuda/split_float.cuh"
#include "klt/tokens_cuda.cuh"

namespace kvpack::cuda {

namespace wgmma {

constexpr int kDepth = 64;  // inputs of a step: 128 bytes of bfloat16
constexpr int kQuads = 4;   // instructions of 16 inputs in a step; a lane has 4 neighbouring inputs of each

/// Four neighbouring inputs of a row as they lie in memory; doubles are rounded at once.
template <typename T>
struct Quad {
  float4 values;
  __device__ void clear() { values = make_float4(0.0f, 0.0f, 0.0f, 0.0f); }
  __device__ void load(const T* source) {
    if constexpr (sizeof(T) == 4) {
      values = *reinterpret_cast<const float4*>(source);
    } else {
      values = make_float4(element_value(source[0]), element_value(source[1]), element_value(source[2]),
                           element_value(source[3]));
    }
  }
  __device__ void set(const float (&elements)[4]) {
    values = make_float4(elements[0], elements[1], elements[2], elements[3]);
  }
  [[nodiscard]] __device__ float4 floats() const { return values; }
  static __device__ float raw(T element) { return element_value(element); }
};

/// Of 16-bit types the bits, so that four of them wait in two registers.
template <typename T>
struct HalfQuad {
  uint2 words;
  __device__ void clear() { words = make_uint2(0u, 0u); }
  __device__ void load(const T* source) { words = *reinterpret_cast<const uint2*>(source); }
  __device__ void set(const std::uint32_t (&bits)[4]) {
    words = make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16);
  }
  [[nodiscard]] __device__ float4 floats() const {
    return make_float4(value(words.x & 0xffffu), value(words.x >> 16), value(words.y & 0xffffu), value(words.y >> 16));
  }
  static __device__ float value(std::uint32_t bits) { return element_value(T{static_cast<std::uint16_t>(bits)}); }
  static __device__ std::uint32_t raw(T element) { return element.bits; }
};
template <>
struct Quad<Half> : HalfQuad<Half> {};
template <>
struct Quad<BFloat16> : HalfQuad<BFloat16> {};
/// Split already, by whoever wrote it.
template <>
struct Quad<SplitFloat> {
  uint4 words;
  __device__ void clear() { words = make_uint4(0u, 0u, 0u, 0u); }
  __device__ void load(const SplitFloat* source) { words = *reinterpret_cast<const uint4*>(source); }
};

/// The first and the last two numbers of a quad, less the mean, split; `mean` is that of the quad's first input.
template <typename T>
__device__ inline void split_quad(const Quad<T>& quad, const float* mean, SplitPair& lower, SplitPair& upper) {
  const float4 m = *reinterpret_cast<const float4*>(mean);
  const float4 x = quad.floats();
  lower = split_pair(x.x - m.x, x.y - m.y);
  upper = split_pair(x.z - m.z, x.w - m.w);
}
__device__ inline void split_quad(const Quad<SplitFloat>& quad, const float*, SplitPair& lower, SplitPair& upper) {
  lower = pair_of({quad.words.x}, {quad.words.y});
  upper = pair_of({quad.words.z}, {quad.words.w});
}

/// What a lane has of a step of its two rows, fetched while the step before is multiplied.
template <typename T>
struct LaneInputs {
  Quad<T> quads[2][kQuads];

  /// `sources` are tokens, null beyond the last row; `first` the lane's first input of the step.
  __device__ void fetch(const T* const (&sources)[2], std::int64_t stride, std::int32_t first, std::int32_t inputs,
                        bool is_plain) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int j = 0; j < kQuads; ++j) {
        const std::int32_t input = first + 16 * j;
        if (sources[r] == nullptr || input >= inputs) {
          quads[r][j].clear();
        } else if (is_plain) {
          quads[r][j].load(sources[r] + input);
        } else if constexpr (!std::is_same_v<T, SplitFloat>) {  // those are always plain
          decltype(Quad<T>::raw(T{})) elements[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            elements[i] = input + i < inputs ? Quad<T>::raw(sources[r][(input + i) * stride]) : Quad<T>::raw(T{});
          }
          quads[r][j].set(elements);
        }
      }
    }
  }

  /// Centres and splits into fragments of A; `mean` points to the mean of the lane's first input. What is split has none.
  __device__ void split(const float* mean, std::uint32_t (&high)[kQuads][4], std::uint32_t (&low)[kQuads][4]) const {
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        SplitPair lower;
        SplitPair upper;
        split_quad(quads[r][j], mean + 16 * j, lower, upper);
        high[j][r] = lower.high;
        high[j][r + 2] = upper.high;
        low[j][r] = lower.low;
        low[j][r + 2] = upper.low;
      }
    }
  }
};

}  // namespace wgmma

}  // namespace kvpack::cuda
