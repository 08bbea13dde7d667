// Compiles logits_cpu.h once per instruction set.
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/half.h"
#include "core/parallel.h"
#include "core/with_type.h"
#include "evaluate/implementations.h"

#define KVPACK_SIMD_SOURCE "evaluate/logits_cpu.h"
#include "isa/for_each_isa.h"
