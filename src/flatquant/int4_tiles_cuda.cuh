// Tiles of int4 rows in shared memory as bytes, for products of bytes on tensor cores.
#pragma once

#include <cstdint>

#include "cuda/shared_store.cuh"
#include "flatquant/codes.h"
#include "flatquant/implementations.h"

namespace kvpack::cuda {

inline constexpr int kTileRows = 128;
inline constexpr int kTileCodes = 64;   // of a row: 64 bytes in shared memory
inline constexpr int kPieceCodes = 32;  // that a thread brings
inline constexpr int kTileBytes = kTileRows * kTileCodes;

/// Where 16 codes of a tile's row lie. Two rows share the 128 bytes that all banks have, so chunks are XORed with half the row:
/// eight rows of one chunk, which ldmatrix reads, lie in eight different places.
__device__ inline std::uint32_t code_chunk_offset(int row, int chunk) {
  return static_cast<std::uint32_t>(row * kTileCodes + (chunk ^ (row / 2 % 4)) * 16);
}

/// 32 codes of one row on their way from global to shared memory.
struct CodePiece {
  uint4 words[2];  // packed: one, of nibbles; int8: two, of bytes
};

/// One side of the product: rows, of which a thread always brings the same.
struct CodeRows {
  const std::byte* row;  // null behind the last row
  std::int64_t columns;
  CodeForm form;
  CodeEncoding encoding;
  std::uint32_t zero;  // in each byte: what is subtracted from a code
  bool is_aligned;     // pieces may be read 16 bytes at a time

  __device__ static CodeRows of(const Int4Data& rows, std::int64_t row, bool is_aligned) {
    const bool exists = row < rows.rows;
    const float zero = exists && rows.zeros != nullptr ? rows.zeros[row] : 0.0f;
    const std::byte* bytes =
        static_cast<const std::byte*>(rows.codes) + row * row_bytes_of_codes(rows.form, rows.columns);
    return {exists ? bytes : nullptr,
            rows.columns,
            rows.form,
            rows.encoding,
            static_cast<std::uint32_t>(static_cast<int>(zero) & 0xff) * 0x01010101u,
            is_aligned};
  }

  /// Codes first .. first+31; those that do not exist are as the zero, so that they count nothing.
  __device__ CodePiece load(std::int64_t first) const {
    CodePiece piece;
    if (row != nullptr && is_aligned && first + kPieceCodes <= columns) {
      const auto* words = reinterpret_cast<const uint4*>(row + (form == CodeForm::kInt8 ? first : first / 2));
      piece.words[0] = words[0];
      piece.words[1] = form == CodeForm::kInt8 ? words[1] : words[0];
      return piece;
    }
    std::uint32_t bytes[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) bytes[i] = zero;
    if (row != nullptr) {
      for (int i = 0; i < kPieceCodes && first + i < columns; ++i) {
        const auto code = static_cast<std::uint32_t>(read_code(row, first + i, form, encoding)) & 0xffu;
#pragma unroll
        for (int w = 0; w < 8; ++w) {
          if (w == i / 4) bytes[w] = (bytes[w] & ~(0xffu << (8 * (i % 4)))) | code << (8 * (i % 4));
        }
      }
    }
    piece.words[0] = make_uint4(bytes[0], bytes[1], bytes[2], bytes[3]);
    piece.words[1] = make_uint4(bytes[4], bytes[5], bytes[6], bytes[7]);
    return piece;
  }

  /// True where load() read nibbles: elsewhere a piece is bytes.
  __device__ bool is_packed(std::int64_t first) const {
    return form != CodeForm::kInt8 && row != nullptr && is_aligned && first + kPieceCodes <= columns;
  }

  /// Four codes minus the zero. Nibbles as q + 8 lie in bytes of 0 .. 15, and so does what is subtracted: a bit above both keeps
  /// bytes from borrowing of one another.
  __device__ std::uint32_t from_offsets(std::uint32_t offsets) const {
    constexpr std::uint32_t kGuard = 0x80808080u;
    const std::uint32_t subtracted = ((zero & 0x0f0f0f0fu) + 0x08080808u) & 0x0f0f0f0fu;
    return ((offsets | kGuard) - subtracted) ^ kGuard;
  }

  /// Writes a piece into a tile, as bytes minus the zero.
  __device__ void store(const CodePiece& piece, std::uint32_t tile, int tile_row, int half, bool packed) const {
    std::uint32_t out[8];
    const std::uint32_t words[8] = {piece.words[0].x, piece.words[0].y, piece.words[0].z, piece.words[0].w,
                                    piece.words[1].x, piece.words[1].y, piece.words[1].z, piece.words[1].w};
    if (packed) {
      const std::uint32_t flip = encoding == CodeEncoding::kOffset ? 0u : 0x88888888u;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const std::uint32_t nibbles = words[w] ^ flip;
        const std::uint32_t even = from_offsets(nibbles & 0x0f0f0f0fu);
        const std::uint32_t odd = from_offsets(nibbles >> 4 & 0x0f0f0f0fu);
        out[2 * w] = __byte_perm(even, odd, 0x5140);
        out[2 * w + 1] = __byte_perm(even, odd, 0x7362);
      }
    } else {
#pragma unroll
      for (int w = 0; w < 8; ++w) out[w] = __vsub4(words[w], zero);
    }
    const std::uint32_t first = tile + code_chunk_offset(tile_row, 2 * half);
    const std::uint32_t second = tile + code_chunk_offset(tile_row, 2 * half + 1);
    store_shared_chunk(first, make_uint4(out[0], out[1], out[2], out[3]));
    store_shared_chunk(second, make_uint4(out[4], out[5], out[6], out[7]));
  }
};

}  // namespace kvpack::cuda
