// Compiles the file named by KVPACK_SIMD_SOURCE once per instruction set, each in its own namespace.
// Include it after every standard header the source needs, so that no shared inline function is compiled inside a
// `#pragma GCC target` region: per-file -m flags would leak AVX code into such functions.
// Within the source, KVPACK_ISA is the namespace, scalar, avx2 or avx512, and KVPACK_ISA_LANES its floats a vector, for
// the rare piece that the vocabulary does not cover. A source that defines KVPACK_SIMD_VBMI2 gets AVX-512 with VBMI and
// VBMI2 (Ice Lake, Zen 4); its registry row must ask for kFeatureAvx512Vbmi2. One that defines KVPACK_SIMD_VNNI gets VNNI
// (Cascade Lake, Zen 4), for kFeatureAvx512Vnni. With KVPACK_SIMD_TILES beside it, the
// vocabulary holds the words of isa/tiles_*.h too.

#include "isa/scalar.h"
#if defined(KVPACK_SIMD_TILES)
#include "isa/tiles_scalar.h"
#endif

#define KVPACK_ISA scalar
#define KVPACK_ISA_LANES 1
#include KVPACK_SIMD_SOURCE
#undef KVPACK_ISA_LANES
#undef KVPACK_ISA

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 in its own header (bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"        // the same one
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "isa/compress_table.h"
#include "isa/tile_tables.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")
#include "isa/avx2.h"
#define KVPACK_ISA avx2
#if defined(KVPACK_SIMD_TILES)
#include "isa/tiles_avx2.h"
#include "isa/tiles_bmi2.h"
#endif
#define KVPACK_ISA_LANES 8
#include KVPACK_SIMD_SOURCE
#undef KVPACK_ISA_LANES
#undef KVPACK_ISA
#pragma GCC pop_options

#pragma GCC push_options
#if defined(KVPACK_SIMD_VBMI2)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")
#elif defined(KVPACK_SIMD_VNNI)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#include "isa/avx512.h"
#define KVPACK_ISA avx512
#if defined(KVPACK_SIMD_TILES)
#include "isa/tiles_avx512.h"
#include "isa/tiles_bmi2.h"
#endif
#define KVPACK_ISA_LANES 16
#include KVPACK_SIMD_SOURCE
#undef KVPACK_ISA_LANES
#undef KVPACK_ISA
#pragma GCC pop_options
#endif
