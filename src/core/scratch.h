// Working memory of a thread that grows and stays: hot paths allocate only the first time.
#pragma once

#include <cstdint>

namespace kvpack {

/// At least `count` floats of this thread, with undefined contents. A later call on the same thread gives the same
/// memory again, so one caller at a time may use it.
float* thread_scratch(std::int64_t count);

}  // namespace kvpack
