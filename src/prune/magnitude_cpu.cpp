// Compiles magnitude_cpu.h once per instruction set.
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "core/divide_up.h"
#include "core/half.h"
#include "core/parallel.h"
#include "core/with_type.h"
#include "prune/implementations.h"

#define KVPACK_SIMD_SOURCE "prune/magnitude_cpu.h"
#include "isa/for_each_isa.h"
