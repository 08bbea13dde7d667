// Everything of kvpack's C++ interface, in the order of the pipeline.
#pragma once

// clang-format off: the order of the pipeline, not of the alphabet
#include "kvpack/version.h"
#include "kvpack/error.h"
#include "kvpack/tensor.h"
#include "kvpack/dispatch.h"
#include "kvpack/prune.h"
#include "kvpack/transform.h"
#include "kvpack/quantize.h"
#include "kvpack/codebook.h"
#include "kvpack/tile64.h"
#include "kvpack/klt.h"
#include "kvpack/attend.h"
#include "kvpack/kron.h"
#include "kvpack/evaluate.h"
// clang-format on
