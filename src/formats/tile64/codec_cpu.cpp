// Compiles codec_cpu.h and what it stands on once per instruction set.
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "core/half.h"
#include "core/scratch.h"
#include "formats/tile64/blocks.h"
#include "formats/tile64/bounds.h"
#include "formats/tile64/implementations.h"
#include "formats/tile64_f16/layout.h"
#include "formats/tile64_q/layout.h"

namespace kvpack {
namespace {
constexpr std::int64_t kLargestHeadDim = 256;
}
}  // namespace kvpack

#define KVPACK_SIMD_VBMI2
#define KVPACK_SIMD_TILES
#define KVPACK_SIMD_SOURCE "formats/tile64/codec_cpu.h"
#include "isa/for_each_isa.h"
