// One tile of tile64_q in the SIMD vocabulary: 64 elements to a grid and codes, and back. Included by
// formats/tile64/codec_cpu.h's source once per instruction set; bytes and rule are layout.h's.

namespace kvpack::KVPACK_ISA {
namespace {

/// The grid over the survivors of a tile that has some, all among the first kElements.
template <int kElements, typename T>
inline tile64_q::Grid grid_of_tile(const T* x, std::uint64_t mask, int bits_per_code) {
  F32 low = set1(std::numeric_limits<float>::infinity());
  F32 high = set1(-std::numeric_limits<float>::infinity());
  std::uint32_t nonfinite = 0;
  for (int i = 0; i < kElements; i += kLanes) {
    const auto lanes = static_cast<std::uint32_t>(mask >> i);
    const Mask kept = mask_from_bits(lanes);
    const F32 value = load(x + i);
    nonfinite |= bits(is_nonfinite(value)) & lanes;
    // Lanes that do not survive keep the bound they have.
    low = min(blend(kept, value, low), low);
    high = max(blend(kept, value, high), high);
  }
  if (nonfinite != 0) return {std::numeric_limits<float>::quiet_NaN(), 0.0f};
  return tile64_q::grid_of(reduce_min(low), reduce_max(high), bits_per_code);
}

/// Divides every one of the first kElements, survivor or not, and picks out the codes of the survivors.
template <int kBits, int kElements, typename T>
inline tile64_q::Grid write_codes_of(const T* x, std::uint64_t mask, std::uint8_t* target) {
  const tile64_q::Grid grid = grid_of_tile<kElements>(x, mask, kBits);
  const F32 scale = set1(grid.scale);
  const F32 zero = set1(grid.zero);
  const F32 largest = set1(tile64_q::largest_code(kBits));
  alignas(64) std::uint8_t codes[kElements];
  for (int i = 0; i < kElements; i += kLanes) {
    const F32 code = add(floor(add(div(load(x + i), scale), set1(0.5f))), zero);
    store_codes(codes + i, min(max(code, set1(0.0f)), largest));  // max makes NaN 0
  }
  pack_codes<kBits, kElements>(codes, mask, target);
  return grid;
}

/// Writes the codes of a tile's survivors, at least one, zeros to the end of the last word, and perhaps a word more.
template <int kBits, typename T>
inline tile64_q::Grid write_codes(const T* x, std::uint64_t mask, std::uint8_t* target) {
  constexpr int kHalf = kTileElements / 2;
  if constexpr (kCompressIsCheap && sizeof(T) == 2) {
    // Half the divisions for tiles of at most 32 survivors, which are nearly all of them at 70 %.
    alignas(64) T kept[kTileRoom];
    const int count = compress64(&x->bits, mask, &kept[0].bits);
    const std::uint64_t first = ~std::uint64_t{0} >> (kTileElements - count);
    if (count <= kHalf) return write_codes_of<kBits, kHalf>(kept, first, target);
    return write_codes_of<kBits, kTileElements>(kept, first, target);
  } else {
    return write_codes_of<kBits, kTileElements>(x, mask, target);
  }
}

/// Writes 64 dense elements from a tile's codes, zeros between them. Of `source` `available` bytes may be read, enough
/// for the codes.
template <int kBits, typename T>
inline void read_codes(const std::uint8_t* source, std::int64_t available, std::uint64_t mask, tile64_q::Grid grid,
                       T* target) {
  std::uint8_t inside[kTileRoom];
  if (available < kTileRoom) {
    std::memset(inside, 0, sizeof(inside));
    std::memcpy(inside, source, static_cast<std::size_t>(available));
    source = inside;
  }
  alignas(64) std::uint8_t codes[kTileElements];
  unpack_codes<kBits>(source, mask, codes);
  const F32 scale = set1(grid.scale);
  const F32 zero = set1(grid.zero);
  for (int i = 0; i < kTileElements; i += kLanes) {
    const F32 value = mul(sub(load_codes(codes + i), zero), scale);
    store(target + i, blend(mask_from_bits(static_cast<std::uint32_t>(mask >> i)), value, set1(0.0f)));
  }
}

}  // namespace
}  // namespace kvpack::KVPACK_ISA
