#include "common/parallel.h"

#include <dlfcn.h>

#include <atomic>
#include <exception>
#include <mutex>
#include <string>

namespace pymathrl {
namespace {

// The module links no OpenMP library: linking the system's libgomp beside torch's would give two pools whose idle
// threads spin against each other. Both GNU's and Intel's runtime export the GOMP_parallel entry used here.
struct Runtime {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*max_threads)() = nullptr;
  int (*in_parallel)() = nullptr;
  std::string name = "none: serial (import torch first)";
};

const Runtime& runtime() {
  static Runtime found;
  static std::mutex guard;
  static std::atomic<bool> ready{false};
  if (ready.load(std::memory_order_acquire)) return found;
  std::lock_guard<std::mutex> lock(guard);
  if (!found.parallel) {  // looked up again until found: torch may be imported after this module
    auto parallel = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    auto max_threads = dlsym(RTLD_DEFAULT, "omp_get_max_threads");
    auto in_parallel = dlsym(RTLD_DEFAULT, "omp_in_parallel");
    if (parallel && max_threads && in_parallel) {
      Dl_info info{};
      dladdr(parallel, &info);
      found.name = info.dli_fname ? info.dli_fname : "an OpenMP runtime";
      found.max_threads = reinterpret_cast<int (*)()>(max_threads);
      found.in_parallel = reinterpret_cast<int (*)()>(in_parallel);
      found.parallel = reinterpret_cast<void (*)(void (*)(void*), void*, unsigned, unsigned)>(parallel);
      ready.store(true, std::memory_order_release);
    }
  }
  return found;
}

struct Job {
  int64_t n, grain;
  RangeFn fn;
  void* context;
  std::atomic<int64_t> next{0};
  std::mutex guard;
  std::exception_ptr error;

  void work() {
    try {
      for (int64_t begin; (begin = next.fetch_add(grain, std::memory_order_relaxed)) < n;)
        fn(context, begin, begin + grain < n ? begin + grain : n);
    } catch (...) {
      std::lock_guard<std::mutex> lock(guard);
      error = std::current_exception();
    }
  }
};

}  // namespace

void parallel_range(int64_t n, int64_t grain, RangeFn fn, void* context) {
  if (n <= 0) return;
  const Runtime& omp = runtime();
  int64_t blocks = (n + grain - 1) / grain;
  int64_t threads = omp.parallel && !omp.in_parallel() ? omp.max_threads() : 1;
  if (threads > blocks) threads = blocks;
  Job job{n, grain, fn, context, {}, {}, {}};
  if (threads <= 1)
    job.work();
  else
    omp.parallel([](void* p) { static_cast<Job*>(p)->work(); }, &job, static_cast<unsigned>(threads), 0);
  if (job.error) std::rethrow_exception(job.error);
}

const char* parallel_runtime() { return runtime().name.c_str(); }

}  // namespace pymathrl
