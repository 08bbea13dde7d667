// One tile of tile64_f16 in the SIMD vocabulary: 64 elements to halves under a bitmap, and back. Included by
// formats/tile64/codec_cpu.h's source once per instruction set; the bytes are layout.h's.

namespace kvpack::KVPACK_ISA {
namespace {

/// Writes a tile's survivors and the zeros behind them; room for kTileRoom halves. Returns the halves that it takes.
template <typename T>
inline std::int64_t write_halves(const T* x, std::uint64_t mask, std::uint16_t* target) {
  if constexpr (std::is_same_v<T, float>) {
    Half rounded[kTileElements];
    for (int i = 0; i < kTileElements; i += kLanes) store(rounded + i, load(x + i));
    return tile64_f16::tile_halves(compress64(&rounded[0].bits, mask, target));
  } else {
    return tile64_f16::tile_halves(compress64(&x->bits, mask, target));
  }
}

/// Writes 64 dense elements of T from halves of type P; `source` has at least as many readable halves as the mask has
/// bits, `available` in all.
template <typename P, typename T>
inline void read_halves(const P* source, std::int64_t available, std::uint64_t mask, T* target) {
  P inside[kTileRoom];
  if (available < kTileRoom) {
    // The words of the vocabulary read further than a tile's end, which here is the end of the payload.
    std::memset(inside, 0, sizeof(inside));
    std::memcpy(inside, source, static_cast<std::size_t>(std::popcount(mask)) * sizeof(P));
    source = inside;
  }
  if constexpr (std::is_same_v<P, T>) {
    expand64(&source->bits, mask, &target->bits);
  } else {
    P dense[kTileElements];
    expand64(&source->bits, mask, &dense[0].bits);
    for (int i = 0; i < kTileElements; i += kLanes) {
      const F32 values = load(dense + i);
      store(target + i, values);
      // Vector conversions make signalling NaNs quiet; widening is exact.
      if constexpr (std::is_same_v<T, float>) {
        if (bits(is_nonfinite(values)) == 0) continue;
        for (int lane = i; lane < i + kLanes; ++lane) target[lane] = to_float(dense[lane]);
      }
    }
  }
}

}  // namespace
}  // namespace kvpack::KVPACK_ISA
