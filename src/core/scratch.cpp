// Working memory of a thread.
#include "core/scratch.h"

#include <array>
#include <cstddef>
#include <memory>
#include <new>

namespace kvpack {

namespace {

constexpr std::align_val_t kCacheLine{64};

struct AlignedDelete {
  void operator()(float* memory) const { ::operator delete[](memory, kCacheLine); }
};

struct Memory {
  std::unique_ptr<float[], AlignedDelete> floats;
  std::int64_t count = 0;
};

}  // namespace

float* thread_scratch(std::int64_t count, Scratch use) {
  thread_local std::array<Memory, 2> memories;
  Memory& memory = memories[static_cast<std::size_t>(use)];
  if (memory.count < count) {
    memory.count = 0;
    memory.floats.reset();
    const auto bytes = static_cast<std::size_t>(count) * sizeof(float);
    memory.floats.reset(static_cast<float*>(::operator new[](bytes, kCacheLine)));
    memory.count = count;
  }
  return memory.floats.get();
}

}  // namespace kvpack
