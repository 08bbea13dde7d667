// A row's elements as vectors where a row may end within one. Compiled once per instruction set; without an include guard.

namespace kvpack::KVPACK_ISA {
namespace {

/// `count` elements as a vector, the other lanes 0. The usual case reads a whole vector.
template <typename T>
inline F32 load_some(const T* source, std::int64_t count) {
  if (count >= kLanes) return load(source);
  T padded[kLanes]{};
  for (std::int64_t i = 0; i < count; ++i) padded[i] = source[i];
  return load(padded);
}

/// Rounds to the type T and back.
template <typename T>
inline F32 round_to(F32 value) {
  if constexpr (std::is_same_v<T, float>) return value;
  T rounded[kLanes];
  store(rounded, value);
  return load(rounded);
}

}  // namespace
}  // namespace kvpack::KVPACK_ISA
