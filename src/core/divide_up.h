// Whole numbers rounded up, for everything that is cut into blocks; shared by the CPU and the CUDA side.
#pragma once

#include <cstdint>

#include "core/portable.h"

namespace kvpack {

/// Blocks of `size` that `count` elements take, the last of them maybe not full.
KVPACK_HOST_DEVICE constexpr std::int64_t divide_up(std::int64_t count, std::int64_t size) {
  return (count + size - 1) / size;
}

/// The smallest multiple of `size` that is at least `count`.
KVPACK_HOST_DEVICE constexpr std::int64_t round_up(std::int64_t count, std::int64_t size) {
  return divide_up(count, size) * size;
}

}  // namespace kvpack
