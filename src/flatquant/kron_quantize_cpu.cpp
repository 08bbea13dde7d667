// Compiles kron_quantize_cpu.h once per instruction set.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "core/divide_up.h"
#include "core/half.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/with_type.h"
#include "flatquant/codes.h"
#include "flatquant/implementations.h"
#include "flatquant/rules.h"
#include "kvpack/dispatch.h"

#define KVPACK_SIMD_SOURCE "flatquant/kron_quantize_cpu.h"
#include "isa/for_each_isa.h"
