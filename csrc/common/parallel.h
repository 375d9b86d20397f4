// parallel_for on the OpenMP runtime that is already in the process (torch's), so that there is one pool of threads.
#pragma once
#include <cstdint>

namespace pymathrl {

using RangeFn = void (*)(void* context, int64_t begin, int64_t end);

// Calls fn on [0,n) cut into blocks of `grain`. Which thread takes a block has no influence on results: ops make each
// block independent, and any sum over blocks is added up afterwards in block order.
void parallel_range(int64_t n, int64_t grain, RangeFn fn, void* context);

// The runtime in use: "torch's libgomp (path)" or "none: serial".
const char* parallel_runtime();

template <class F>
void parallel_for(int64_t n, int64_t grain, F&& fn) {
  auto call = [](void* context, int64_t begin, int64_t end) { (*static_cast<F*>(context))(begin, end); };
  parallel_range(n, grain, call, &fn);
}

}  // namespace pymathrl
