// Compiles klt_cpu.h and what it stands on once per instruction set.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/divide_up.h"
#include "core/half.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/with_type.h"
#include "formats/klt_rows/layout.h"
#include "klt/implementations.h"
#include "klt/rules.h"
#include "quantize/codebook.h"

#define KVPACK_SIMD_SOURCE "klt/klt_cpu.h"
#include "isa/for_each_isa.h"
