// From a type known at run time to one known at compile time.
#pragma once

#include "core/half.h"
#include "kvpack/error.h"
#include "kvpack/tensor.h"

namespace kvpack {

/// Calls body.template operator()<T>() with T = Half, BFloat16, float or double for a floating dtype.
template <typename Body>
auto with_float_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat16:
      return body.template operator()<Half>();
    case DType::kBFloat16:
      return body.template operator()<BFloat16>();
    case DType::kFloat32:
      return body.template operator()<float>();
    case DType::kFloat64:
      return body.template operator()<double>();
    case DType::kInt64:
    case DType::kInt32:
    case DType::kInt8:
    case DType::kUInt8:
      break;
  }
  throw InternalError("with_float_type was given a type that is not floating point");
}

}  // namespace kvpack
