// The three kinds of error of this library. Every message shows the value given and the value allowed.
#pragma once

#include <stdexcept>
#include <string>

namespace [[gnu::visibility("default")]] kvpack {

/// Base of every error that kvpack throws on purpose.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The caller's mistake: a shape, a number or a value out of its range. Python: ValueError.
class InvalidArgument : public Error {
 public:
  using Error::Error;
};

/// A combination that does not exist (yet); the message lists what does. Python: NotImplementedError.
class Unsupported : public Error {
 public:
  using Error::Error;
};

/// A broken promise inside kvpack: please report it. Python: RuntimeError.
class InternalError : public Error {
 public:
  using Error::Error;
};

}  // namespace kvpack
