// Working memory of a thread.
#include "core/scratch.h"

#include <vector>

namespace kvpack {

float* thread_scratch(std::int64_t count) {
  thread_local std::vector<float> memory;
  if (memory.size() < static_cast<std::size_t>(count)) memory.resize(static_cast<std::size_t>(count));
  return memory.data();
}

}  // namespace kvpack
