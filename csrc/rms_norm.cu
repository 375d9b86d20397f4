#include "common/cuda.cuh"
#include "rms_norm.h"

namespace pymathrl {
namespace {

constexpr int kThreads = 256;

// One block per row.
__global__ void forward_kernel(RmsNormParams p) {
  __shared__ float shared[33];
  const int64_t start = blockIdx.x * p.width;
  const float* h = p.x + start;
  float squares = 0.0f;
  for (int64_t j = threadIdx.x; j < p.width; j += kThreads) {
    float value = h[j];
    if (p.residual) p.sum[start + j] = value += p.residual[start + j];
    squares += value * value;
  }
  squares = block_reduce(squares, 0.0f, shared, Add());
  const float rstd = rms_norm_rstd(squares, p.width, p.eps);
  if (threadIdx.x == 0 && p.rstd) p.rstd[blockIdx.x] = rstd;
  if (p.residual) h = p.sum + start;  // each thread reads back what it wrote
  for (int64_t j = threadIdx.x; j < p.width; j += kThreads) p.y[start + j] = h[j] * rstd * p.weight[j];
}

// One block per kNormRows rows: a thread owns its columns of dw, so their sum needs no atomics.
__global__ void backward_kernel(RmsNormGradParams p) {
  __shared__ float shared[33];
  float* dw = p.dw + (1 + blockIdx.x) * p.width;
  for (int64_t j = threadIdx.x; j < p.width; j += kThreads) dw[j] = 0.0f;
  const int64_t first = blockIdx.x * kNormRows, last = first + kNormRows < p.rows ? first + kNormRows : p.rows;
  for (int64_t row = first; row < last; ++row) {
    const float *h = p.h + row * p.width, *dy = p.dy + row * p.width;
    const float rstd = p.rstd[row];
    float products = 0.0f;
    for (int64_t j = threadIdx.x; j < p.width; j += kThreads) {
      products += dy[j] * p.weight[j] * h[j];
      dw[j] += dy[j] * h[j] * rstd;
    }
    const float mean = block_reduce(products, 0.0f, shared, Add()) / static_cast<float>(p.width);
    for (int64_t j = threadIdx.x; j < p.width; j += kThreads) {
      float gradient = rms_norm_grad(h[j], dy[j] * p.weight[j], rstd, mean);
      p.dh[row * p.width + j] = p.dh_out ? gradient + p.dh_out[row * p.width + j] : gradient;
    }
  }
}

__global__ void sum_blocks_kernel(RmsNormGradParams p, int64_t blocks) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= p.width) return;
  double sum = 0;
  for (int64_t block = 1; block <= blocks; ++block) sum += p.dw[block * p.width + j];
  p.dw[j] = static_cast<float>(sum);
}

}  // namespace

void rms_norm_cuda(const RmsNormParams& p, int device, void* stream) {
  if (p.rows == 0) return;
  DeviceGuard guard(device, "rms_norm");
  forward_kernel<<<static_cast<unsigned>(p.rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  check_cuda(cudaGetLastError(), "rms_norm");
}

void rms_norm_backward_cuda(const RmsNormGradParams& p, int device, void* stream) {
  DeviceGuard guard(device, "rms_norm_backward");
  auto queue = static_cast<cudaStream_t>(stream);
  const int64_t blocks = rms_norm_blocks(p.rows);
  if (blocks) backward_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, queue>>>(p);
  sum_blocks_kernel<<<static_cast<unsigned>((p.width + kThreads - 1) / kThreads), kThreads, 0, queue>>>(p, blocks);
  check_cuda(cudaGetLastError(), "rms_norm_backward");
}

}  // namespace pymathrl
