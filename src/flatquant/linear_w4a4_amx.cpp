// linear_w4a4 on AMX for many tokens: signed bytes, exact sums of 32 bits. Few tokens go to AVX-512, where the weights' bytes
// decide and nothing is spread over tiles.
//
//   A   16 outputs x 64 codes   weights as signed bytes, made once for up to 256 tokens
//   B   64 codes x 16 tokens    four codes of one token beside each other, made once a call
//   C   16 outputs x 16 tokens  transposed in registers on the way out, since a token's outputs are neighbours
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/divide_up.h"
#include "core/half.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/with_type.h"
#include "flatquant/codes.h"
#include "flatquant/implementations.h"
#include "flatquant/rules.h"

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 in its own header (bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"        // the same one
#include <immintrin.h>
#pragma GCC diagnostic pop

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8")
// clang-format off: the vocabulary first
#include "isa/avx512.h"
namespace kvpack::amx {
namespace {
using namespace avx512;  // NOLINT: this file is compiled behind that vocabulary
}
}  // namespace kvpack::amx
#define KVPACK_ISA amx
#define KVPACK_ISA_LANES 16
#include "flatquant/codes_cpu.h"
#include "flatquant/dots_cpu.h"
#include "flatquant/elements_cpu.h"
#include "flatquant/int4_order_cpu.h"
#include "flatquant/tiles_amx.h"
// clang-format on

namespace kvpack::amx {
namespace {

inline constexpr std::int64_t kTileBytes = 1024;
inline constexpr std::int64_t kSide = 32;         // outputs and tokens of a block of 2 x 2 result tiles
inline constexpr std::int64_t kPartTokens = 256;  // tokens that meet weights as bytes before those are made anew
inline constexpr std::int64_t kFewTokens = 12;    // up to here AVX-512 is faster

/// 16 rows of a token's codes [16, stride] as tiles of B: dword [k/4][token].
void pack_tokens(const std::int8_t* rows, std::int64_t stride, std::int8_t* tiles) {
  for (std::int64_t k = 0; k < stride; k += kRowBytes) {
    for (std::int64_t token = 0; token < 16; ++token) {
      for (std::int64_t quad = 0; quad < 16; ++quad) {
        std::memcpy(tiles + k * 16 + quad * kRowBytes + token * 4, rows + token * stride + k + quad * 4, 4);
      }
    }
  }
}

/// All tokens as tiles of B, [token / 16][k / 64], zeros up to a multiple of 32 tokens.
std::int8_t* pack_activations(const Int4Data& x, bool is_split, std::int64_t stride) {
  const std::int64_t groups = 2 * divide_up(x.rows, kSide);
  auto* tiles = reinterpret_cast<std::int8_t*>(thread_scratch(groups * 16 * stride / 4, Scratch::kCall));
  auto task = [&](std::int64_t group) {
    auto* rows = reinterpret_cast<std::int8_t*>(thread_scratch(16 * stride / 4));
    for (std::int64_t i = 0; i < 16; ++i) {
      const std::int64_t token = group * 16 + i;
      if (token < x.rows) {
        prepare_codes(x, token, is_split, rows + i * stride, stride);
      } else {
        std::fill_n(rows + i * stride, stride, std::int8_t{0});
      }
    }
    pack_tokens(rows, stride, tiles + group * 16 * stride);
  };
  parallel_for(groups, task);
  return tiles;
}

/// 32 rows of weights from `output` on as tiles of A, [k / 64][2], zeros behind the last row.
void unpack_weights(const Int4Data& weight, std::int64_t output, std::int64_t stride, std::int8_t* tiles,
                    std::int8_t* row) {
  for (std::int64_t i = 0; i < kSide; ++i) {
    if (output + i < weight.rows) {
      prepare_codes(weight, output + i, weight.form != CodeForm::kInt8, row, stride);
    } else {
      std::fill_n(row, stride, std::int8_t{0});
    }
    for (std::int64_t k = 0; k < stride; k += kRowBytes) {
      store_vector(tiles + (k / kRowBytes * 2 + i / 16) * kTileBytes + i % 16 * kRowBytes, load_vector(row + k));
    }
  }
}

/// Sums of 32 outputs and 32 tokens in tiles 0 to 3: tile 2*i + j holds outputs 16*i.. and tokens 16*j...
void multiply_block(const std::int8_t* weights, const std::int8_t* tokens, std::int64_t stride) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const std::int8_t* next_tokens = tokens + 16 * stride;
  for (std::int64_t k = 0; k < stride; k += kRowBytes) {
    const std::int8_t* pair = weights + k / kRowBytes * 2 * kTileBytes;
    _tile_loadd(4, pair, kRowBytes);
    _tile_loadd(6, tokens + k * 16, kRowBytes);
    _tile_loadd(7, next_tokens + k * 16, kRowBytes);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, pair + kTileBytes, kRowBytes);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
}

/// Turns 16 x 16 words around their diagonal.
inline void transpose(__m512i (&rows)[16]) {
  __m512i other[16];
  for (int i = 0; i < 16; i += 2) {
    other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(other[i], other[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(other[i], other[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(other[i + 1], other[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(other[i + 1], other[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    other[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    other[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    other[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    other[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0xdd);
  }
}

/// Writes one result tile: scales, bias and the last rounding, a token's 16 outputs at a time.
template <typename T>
void write_tile(const LinearW4A4Problem& problem, const std::int32_t* sums, std::int64_t output, std::int64_t token) {
  const std::int64_t outputs = problem.weight.rows;
  const std::int64_t count = std::min<std::int64_t>(16, outputs - output);
  const std::int64_t tokens = std::min<std::int64_t>(16, problem.x.rows - token);
  if (count <= 0 || tokens <= 0) return;
  __m512i rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(sums + i * 16);
  transpose(rows);
  const F32 weight_scales = load_some(problem.weight.scales + output, count);
  const T* bias = static_cast<const T*>(problem.bias);
  const F32 added = bias == nullptr ? set1(0.0f) : load_some(bias + output, count);
  for (std::int64_t t = 0; t < tokens; ++t) {
    F32 value = mul(_mm512_cvtepi32_ps(rows[t]), mul(set1(problem.x.scales[token + t]), weight_scales));
    if (bias != nullptr) value = add(value, added);
    T* out = static_cast<T*>(problem.out) + (token + t) * outputs + output;
    if (count == 16) {
      store(out, value);
    } else {
      T last[16];
      store(last, value);
      std::copy_n(last, count, out);
    }
  }
}

}  // namespace

void linear_w4a4(const LinearW4A4Problem& problem) {
  if (problem.x.rows <= kFewTokens) return avx512::linear_w4a4(problem);
  const std::int64_t stride = round_up(problem.x.columns, kDotBlock);
  const std::int8_t* tokens = pack_activations(problem.x, problem.weight.form != CodeForm::kInt8, stride);
  const std::int64_t token_parts = divide_up(problem.x.rows, kPartTokens);
  with_float_type(problem.dtype, [&]<typename T>() {
    auto task = [&](std::int64_t index) {
      const TileScope tiles;
      auto* weights = reinterpret_cast<std::int8_t*>(thread_scratch((kSide + 1) * stride / 4));
      alignas(64) std::int32_t sums[4][256];
      const std::int64_t output = index / token_parts * kSide;
      unpack_weights(problem.weight, output, stride, weights, weights + kSide * stride);
      const std::int64_t first = index % token_parts * kPartTokens;
      const std::int64_t end = std::min(problem.x.rows, first + kPartTokens);
      for (std::int64_t token = first; token < end; token += kSide) {
        multiply_block(weights, tokens + token * stride, stride);
        _tile_stored(0, sums[0], kRowBytes);
        _tile_stored(1, sums[1], kRowBytes);
        _tile_stored(2, sums[2], kRowBytes);
        _tile_stored(3, sums[3], kRowBytes);
        for (int i = 0; i < 4; ++i) write_tile<T>(problem, sums[i], output + i / 2 * 16, token + i % 2 * 16);
      }
    };
    parallel_for(token_parts * divide_up(problem.weight.rows, kSide), task);
  });
}

}  // namespace kvpack::amx
#pragma GCC pop_options
#endif
