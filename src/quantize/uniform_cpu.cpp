// Compiles uniform_cpu.h once per instruction set.
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "core/divide_up.h"
#include "core/half.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/with_type.h"
#include "kvpack/dispatch.h"
#include "quantize/codebook.h"
#include "quantize/implementations.h"
#include "quantize/outliers_cpu.h"
#include "quantize/uniform.h"

#define KVPACK_SIMD_SOURCE "quantize/uniform_cpu.h"
#include "isa/for_each_isa.h"
