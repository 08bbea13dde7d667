// Compiles decode_cpu.h once per instruction set.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "attend/implementations.h"
#include "attend/splits.h"
#include "attend/survivors.h"
#include "core/half.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/with_type.h"
#include "formats/tile64/bounds.h"

#define KVPACK_SIMD_VBMI2
#define KVPACK_SIMD_SOURCE "attend/decode_cpu.h"
#include "isa/for_each_isa.h"
