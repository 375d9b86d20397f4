#include "common/row_softmax.cuh"
#include "common/sum_blocks.cuh"
#include "rms_norm.h"

namespace pymathrl {
namespace {

constexpr int kMaxThreads = 256;

// The threads of a block, each with vectors of kVec columns: from the width alone, as the order of a sum must be.
unsigned block_threads(int64_t width) {
  const int64_t threads = (width + 32 * kVec - 1) / (32 * kVec) * 32;
  return static_cast<unsigned>(threads < kMaxThreads ? threads : kMaxThreads);
}

// One block per row.
template <class T> __global__ void forward_kernel(RmsNormParams p, bool aligned) {
  __shared__ float shared[33];
  const int64_t start = blockIdx.x * p.width, step = blockDim.x * kVec;
  const T *x = static_cast<const T*>(p.x) + start, *residual = static_cast<const T*>(p.residual);
  const T* weight = static_cast<const T*>(p.weight);
  T *sum = static_cast<T*>(p.sum), *y = static_cast<T*>(p.y) + start;
  float squares = 0.0f, h[kVec], other[kVec];
  for (int64_t j = threadIdx.x * kVec; j < p.width; j += step) {
    const int count = vec_count(j, p.width);
    load_vec(x + j, count, aligned, 0.0f, h);
    if (residual) {
      load_vec(residual + start + j, count, aligned, 0.0f, other);
      for (int i = 0; i < kVec; ++i) h[i] = to_f32(from_f32<T>(h[i] + other[i]));
      store_vec(sum + start + j, count, aligned, h);
    }
    for (int i = 0; i < kVec; ++i) squares += h[i] * h[i];
  }
  squares = block_reduce(squares, 0.0f, shared, Add());
  const float rstd = rms_norm_rstd(squares, p.width, p.eps);
  if (threadIdx.x == 0 && p.rstd) p.rstd[blockIdx.x] = rstd;
  if (residual) x = sum + start;  // each thread reads back what it wrote
  for (int64_t j = threadIdx.x * kVec; j < p.width; j += step) {
    const int count = vec_count(j, p.width);
    load_vec(x + j, count, aligned, 0.0f, h);
    load_vec(weight + j, count, aligned, 0.0f, other);
    for (int i = 0; i < kVec; ++i) h[i] = h[i] * rstd * other[i];
    store_vec(y + j, count, aligned, h);
  }
}

// One block per kNormRows rows: a thread owns its columns of dw, so their sum needs no atomics.
template <class T> __global__ void backward_kernel(RmsNormGradParams p, bool aligned) {
  __shared__ float shared[33];
  const int64_t step = blockDim.x * kVec;
  const T *weight = static_cast<const T*>(p.weight), *dh_out = static_cast<const T*>(p.dh_out);
  float *sum = p.dw + (1 + blockIdx.x) * p.width, h[kVec], dy[kVec], w[kVec], more[kVec], dw[kVec];
  const int64_t first = blockIdx.x * kNormRows, last = first + kNormRows < p.rows ? first + kNormRows : p.rows;
  for (int64_t row = first; row < last; ++row) {
    const int64_t start = row * p.width;
    const T *h_row = static_cast<const T*>(p.h) + start, *dy_row = static_cast<const T*>(p.dy) + start;
    const float rstd = p.rstd[row];
    float products = 0.0f;
    for (int64_t j = threadIdx.x * kVec; j < p.width; j += step) {
      const int count = vec_count(j, p.width);
      load_vec(h_row + j, count, aligned, 0.0f, h);
      load_vec(dy_row + j, count, aligned, 0.0f, dy);
      load_vec(weight + j, count, aligned, 0.0f, w);
      load_vec(sum + j, row == first ? 0 : count, aligned, 0.0f, dw);
      for (int i = 0; i < kVec; ++i) {
        products += dy[i] * w[i] * h[i];
        dw[i] += dy[i] * h[i] * rstd;
      }
      store_vec(sum + j, count, aligned, dw);
    }
    const float mean = block_reduce(products, 0.0f, shared, Add()) / static_cast<float>(p.width);
    for (int64_t j = threadIdx.x * kVec; j < p.width; j += step) {
      const int count = vec_count(j, p.width);
      load_vec(h_row + j, count, aligned, 0.0f, h);
      load_vec(dy_row + j, count, aligned, 0.0f, dy);
      load_vec(weight + j, count, aligned, 0.0f, w);
      load_vec(dh_out + start + j, dh_out ? count : 0, aligned, 0.0f, more);
      for (int i = 0; i < kVec; ++i) h[i] = rms_norm_grad(h[i], dy[i] * w[i], rstd, mean) + more[i];
      store_vec(static_cast<T*>(p.dh) + start + j, count, aligned, h);
    }
  }
}

}  // namespace

void rms_norm_cuda(const RmsNormParams& p, int device, void* stream) {
  if (p.rows == 0 || p.width == 0) return;
  DeviceGuard guard(device, "rms_norm");
  const void* tensors[] = {p.x, p.residual, p.weight, p.sum, p.y};
  bool aligned = true;
  for (const void* data : tensors) aligned = aligned && rows_aligned(data, p.width, p.dtype);
  with_activations(p.dtype, [&](auto element) {
    forward_kernel<decltype(element)>
        <<<static_cast<unsigned>(p.rows), block_threads(p.width), 0, static_cast<cudaStream_t>(stream)>>>(p, aligned);
  });
  check_cuda(cudaGetLastError(), "rms_norm");
}

void rms_norm_backward_cuda(const RmsNormGradParams& p, int device, void* stream) {
  if (p.width == 0) return;
  DeviceGuard guard(device, "rms_norm_backward");
  auto queue = static_cast<cudaStream_t>(stream);
  const int64_t blocks = rms_norm_blocks(p.rows);
  const void* tensors[] = {p.h, p.weight, p.dy, p.dh_out, p.dh};
  bool aligned = rows_aligned(p.dw, p.width, DType::f32);
  for (const void* data : tensors) aligned = aligned && rows_aligned(data, p.width, p.dtype);
  if (blocks)
    with_activations(p.dtype, [&](auto element) {
      backward_kernel<decltype(element)>
          <<<static_cast<unsigned>(blocks), block_threads(p.width), 0, queue>>>(p, aligned);
    });
  sum_blocks_cuda(p.dw, blocks, p.width, queue);
  check_cuda(cudaGetLastError(), "rms_norm_backward");
}

}  // namespace pymathrl
