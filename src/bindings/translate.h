// What every function of the C interface does first and last: exceptions to numbers, structures to views.
#pragma once

#include <exception>
#include <string>

#include "kvpack/c_abi.h"
#include "kvpack/error.h"
#include "kvpack/tensor.h"

namespace kvpack::bindings {

/// Text of this thread's last error.
std::string& last_error();

/// Runs a call and turns what it throws into an error number.
template <typename Call>
std::int32_t guarded(Call&& call) noexcept {
  try {
    call();
    return KVPACK_OK;
  } catch (const InvalidArgument& error) {
    last_error() = error.what();
    return KVPACK_INVALID_ARGUMENT;
  } catch (const Unsupported& error) {
    last_error() = error.what();
    return KVPACK_UNSUPPORTED;
  } catch (const std::exception& error) {
    last_error() = error.what();
    return KVPACK_INTERNAL_ERROR;
  } catch (...) {
    last_error() = "an exception of an unknown type";
    return KVPACK_INTERNAL_ERROR;
  }
}

/// A view of a structure that must be there.
TensorView view_of(const kvpack_tensor* tensor, const char* name);

/// A view that may be left out: null stands for none.
inline TensorView optional_view(const kvpack_tensor* tensor, const char* name) {
  return tensor == nullptr ? TensorView{} : view_of(tensor, name);
}

}  // namespace kvpack::bindings
