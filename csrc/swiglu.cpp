#include "swiglu.h"

#include "common/parallel.h"
#include "common/simd.h"

namespace pymathrl {
inline namespace PYMATHRL_LEVEL {
namespace {

constexpr int64_t kGrainElements = 8192;  // about 10 us of work

void forward_row(const SwigluParams& p, int64_t row) {
  const float *gate = static_cast<const float*>(p.gate_up) + 2 * row * p.width, *up = gate + p.width;
  float* out = static_cast<float*>(p.out) + row * p.width;
  for_parts(p.width, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
    store_some(out + j, count, swiglu_value(load_some(gate + j, count), load_some(up + j, count)));
  });
}

void backward_row(const SwigluGradParams& p, int64_t row) {
  const float *gate = static_cast<const float*>(p.gate_up) + 2 * row * p.width, *up = gate + p.width;
  const float* dout = static_cast<const float*>(p.dout) + row * p.width;
  float *dgate = static_cast<float*>(p.dgate_up) + 2 * row * p.width, *dup = dgate + p.width;
  for_parts(p.width, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
    auto gradient = swiglu_grad(load_some(gate + j, count), load_some(up + j, count), load_some(dout + j, count));
    store_some(dgate + j, count, gradient.gate);
    store_some(dup + j, count, gradient.up);
  });
}

}  // namespace

void swiglu_cpu(const SwigluParams& p) {
  parallel_for(p.rows, 1 + kGrainElements / (p.width + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) forward_row(p, row);
  });
}

void swiglu_backward_cpu(const SwigluGradParams& p) {
  parallel_for(p.rows, 1 + kGrainElements / (p.width + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) backward_row(p, row);
  });
}

}  // namespace PYMATHRL_LEVEL
}  // namespace pymathrl
