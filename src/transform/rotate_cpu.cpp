// Compiles rotate_cpu.h once per instruction set.
#include <cmath>
#include <cstdint>

#include "core/half.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/with_type.h"
#include "transform/implementations.h"

#define KVPACK_SIMD_SOURCE "transform/rotate_cpu.h"
#include "isa/for_each_isa.h"
