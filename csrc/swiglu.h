// swiglu: out = silu(gate) up, silu(x) = x s(x), s(x) = 1 / (1 + e^-x), [gate | up] = gate_up   (arXiv 2002.05202)
//   dup = dout silu(gate), dgate = dout up s (1 + gate (1 - s)): s is computed again, so that only gate_up is kept.
// N rows, F width. Bytes in fp32 (bf16: half): forward 12NF, backward 20NF. 25 flops per element, 2 per byte:
// memory-bound on a GPU; on a CPU outside its caches.
#pragma once
#include "common/activations.h"

namespace pymathrl {

struct SwigluParams {
  DType dtype;          // T: fp32; on a GPU also bf16, with the arithmetic in fp32
  const void* gate_up;  // [N,2F] T
  void* out;            // [N,F] T out
  int64_t rows, width;
};

struct SwigluGradParams {
  DType dtype;          // T
  const void* gate_up;  // [N,2F] T
  const void* dout;     // [N,F] T
  void* dgate_up;       // [N,2F] T out
  int64_t rows, width;
};

void swiglu_cpu(const SwigluParams& p);
void swiglu_cuda(const SwigluParams& p, int device, void* stream);
void swiglu_backward_cpu(const SwigluGradParams& p);
void swiglu_backward_cuda(const SwigluGradParams& p, int device, void* stream);

template <class F> HD F swiglu_value(F gate, F up) { return silu(gate) * up; }

template <class F> struct SwigluGrad {
  F gate, up;
};
template <class F> HD SwigluGrad<F> swiglu_grad(F gate, F up, F dout) {
  const Sigmoid<F> sigma = sigmoid(gate);
  return {dout * up * sigma.s * (gate * sigma.rest + 1.0f), dout * gate * sigma.s};
}

}  // namespace pymathrl
