// Parallel loops. The number of threads is one atomic; OpenMP keeps the threads. PyTorch ships its OpenMP runtime under the
// same name, so a process that holds both has one pool of threads, not two that fight for the cores.
#include "core/parallel.h"

#include <omp.h>

#include <algorithm>
#include <atomic>

#include "core/check.h"
#include "kvpack/dispatch.h"

namespace kvpack {

namespace {
std::atomic<int> forced_threads{0};
}

void set_num_threads(int num_threads) {
  require(num_threads >= 0, "num_threads is ", num_threads, "; it must be at least 0");
  forced_threads.store(num_threads);
}

int num_threads() {
  const int forced = forced_threads.load();
  return forced > 0 ? forced : std::max(1, omp_get_num_procs());
}

void run_tasks(std::int64_t num_tasks, void (*task)(void* context, std::int64_t index), void* context) {
  const int threads = static_cast<int>(std::min<std::int64_t>(num_tasks, num_threads()));
  if (threads <= 1 || omp_in_parallel()) {
    for (std::int64_t i = 0; i < num_tasks; ++i) task(context, i);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (std::int64_t i = 0; i < num_tasks; ++i) task(context, i);
}

}  // namespace kvpack
