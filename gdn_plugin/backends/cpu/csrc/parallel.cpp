// The thread pool. Work runs on torch's own thread pool, so torch.set_num_threads, vLLM's binding of
// threads to cores and nested parallel regions mean here what they mean for torch's operators.
#include <ATen/Parallel.h>

#include "arguments.h"

extern "C" int64_t gdn_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

extern "C" void gdn_on_workers(int64_t tasks, void (*fn)(void*, int64_t), void* context) {
  const int64_t threads = gdn_threads(), workers = tasks < threads ? tasks : threads;
  if (workers <= 1) {
    if (tasks > 0) fn(context, 0);
    return;
  }
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) fn(context, i);
  });
}
