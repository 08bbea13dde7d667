// Compiles int4_rows_cpu.h once per instruction set.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/divide_up.h"
#include "core/half.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/with_type.h"
#include "flatquant/codes.h"
#include "flatquant/implementations.h"
#include "flatquant/rules.h"

#define KVPACK_SIMD_VNNI
#define KVPACK_SIMD_SOURCE "flatquant/int4_rows_cpu.h"
#include "isa/for_each_isa.h"
