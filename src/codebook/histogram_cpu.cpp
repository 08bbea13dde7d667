// Compiles histogram_cpu.h once per instruction set.
#include <cstdint>

#include "codebook/implementations.h"
#include "core/half.h"
#include "core/scratch.h"
#include "core/with_type.h"

#define KVPACK_SIMD_SOURCE "codebook/histogram_cpu.h"
#include "isa/for_each_isa.h"
