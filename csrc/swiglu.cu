#include "common/row_softmax.cuh"
#include "swiglu.h"

namespace pymathrl {
namespace {

constexpr int kThreads = 256;

// One block per kThreads vectors of a row.
dim3 grid_of(int64_t rows, int64_t width) {
  const int64_t columns = kThreads * kVec;
  return dim3(static_cast<unsigned>(rows), static_cast<unsigned>((width + columns - 1) / columns));
}

template <class T> __global__ void forward_kernel(SwigluParams p, bool aligned) {
  const int64_t j = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kVec;
  const int count = vec_count(j, p.width);
  if (count == 0) return;
  const T* gate_up = static_cast<const T*>(p.gate_up) + 2 * blockIdx.x * p.width + j;
  float gate[kVec], up[kVec];
  load_vec(gate_up, count, aligned, 0.0f, gate);
  load_vec(gate_up + p.width, count, aligned, 0.0f, up);
  for (int i = 0; i < kVec; ++i) gate[i] = swiglu_value(gate[i], up[i]);
  store_vec(static_cast<T*>(p.out) + blockIdx.x * p.width + j, count, aligned, gate);
}

template <class T> __global__ void backward_kernel(SwigluGradParams p, bool aligned) {
  const int64_t j = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kVec;
  const int count = vec_count(j, p.width);
  if (count == 0) return;
  const int64_t start = 2 * blockIdx.x * p.width + j;
  const T* gate_up = static_cast<const T*>(p.gate_up) + start;
  T* dgate_up = static_cast<T*>(p.dgate_up) + start;
  float gate[kVec], up[kVec], dout[kVec];
  load_vec(gate_up, count, aligned, 0.0f, gate);
  load_vec(gate_up + p.width, count, aligned, 0.0f, up);
  load_vec(static_cast<const T*>(p.dout) + blockIdx.x * p.width + j, count, aligned, 0.0f, dout);
  for (int i = 0; i < kVec; ++i) {
    const SwigluGrad<float> gradient = swiglu_grad(gate[i], up[i], dout[i]);
    gate[i] = gradient.gate, up[i] = gradient.up;
  }
  store_vec(dgate_up, count, aligned, gate);
  store_vec(dgate_up + p.width, count, aligned, up);
}

}  // namespace

void swiglu_cuda(const SwigluParams& p, int device, void* stream) {
  if (p.rows == 0 || p.width == 0) return;
  DeviceGuard guard(device, "swiglu");
  const bool aligned = rows_aligned(p.gate_up, p.width, p.dtype) && rows_aligned(p.out, p.width, p.dtype);
  with_activations(p.dtype, [&](auto element) {
    forward_kernel<decltype(element)>
        <<<grid_of(p.rows, p.width), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, aligned);
  });
  check_cuda(cudaGetLastError(), "swiglu");
}

void swiglu_backward_cuda(const SwigluGradParams& p, int device, void* stream) {
  if (p.rows == 0 || p.width == 0) return;
  DeviceGuard guard(device, "swiglu_backward");
  const bool aligned = rows_aligned(p.gate_up, p.width, p.dtype) && rows_aligned(p.dout, p.width, p.dtype) &&
                       rows_aligned(p.dgate_up, p.width, p.dtype);
  with_activations(p.dtype, [&](auto element) {
    backward_kernel<decltype(element)>
        <<<grid_of(p.rows, p.width), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, aligned);
  });
  check_cuda(cudaGetLastError(), "swiglu_backward");
}

}  // namespace pymathrl
