// Working memory of a thread that grows and stays: hot paths allocate only the first time.
#pragma once

#include <cstdint>

namespace kvpack {

/// Who uses the memory. A thread that calls an operation also runs tasks of it, so the two have memory of their own.
enum class Scratch : std::int32_t {
  kTask,  ///< one task of a parallel loop, until it returns
  kCall,  ///< one public call, across its parallel loops
};

/// At least `count` floats of this thread, with undefined contents, on a cache line. A later call on the same thread
/// with the same use gives the same memory again, so one caller at a time may use it.
float* thread_scratch(std::int64_t count, Scratch use = Scratch::kTask);

}  // namespace kvpack
