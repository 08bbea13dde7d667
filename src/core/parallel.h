// Parallel loops over independent tasks, on OpenMP's threads.
#pragma once

#include <cstdint>

#include "core/divide_up.h"

namespace kvpack {

/// Runs task(context, i) for every i in [0, num_tasks), on up to num_threads() threads, in no order.
///   A task must not throw. With one task or one thread no other thread is woken.
void run_tasks(std::int64_t num_tasks, void (*task)(void* context, std::int64_t index), void* context);

/// The same for any callable. The callable stays in the caller's translation unit, so code compiled for one
/// instruction set never becomes a shared inline function.
template <typename Callable>
void parallel_for(std::int64_t num_tasks, Callable& callable) {
  run_tasks(num_tasks, [](void* context, std::int64_t index) { (*static_cast<Callable*>(context))(index); }, &callable);
}

/// Runs callable(first, end) for [begin, limit) cut into blocks of `block` indices, the last one maybe shorter.
template <typename Callable>
void parallel_for_blocks(std::int64_t begin, std::int64_t limit, std::int64_t block, Callable& callable) {
  auto run_block = [&](std::int64_t index) {
    const std::int64_t first = begin + index * block;
    callable(first, first + block < limit ? first + block : limit);
  };
  parallel_for(divide_up(limit - begin, block), run_block);
}

}  // namespace kvpack
