#include "common/row_softmax.cuh"
#include "common/sum_blocks.cuh"
#include "rotary.h"

namespace pymathrl {
namespace {

constexpr int kWarps = 8;

// One block per row, one warp per head.
template <class T> __global__ void forward_kernel(RotaryParams p) {
  const int64_t all = p.heads + 2 * p.kv_heads, row = blockIdx.x;
  const float* rope = p.rope + p.position[row] * p.head_dim;
  for (int64_t index = threadIdx.y; index < all; index += kWarps) {
    const HeadKind kind = head_kind(p, index);
    const T* x = static_cast<const T*>(p.qkv) + (row * all + index) * p.head_dim;
    T* out = static_cast<T*>(p.out) + (row * all + index) * p.head_dim;
    if (kind.turned)
      prepare_head(static_cast<int>(threadIdx.x), x, kind.norm, rope, p.head_dim, p.eps, kind.scale,
                   [out](int64_t e, float value) { out[e] = from_f32<T>(value); });
    else
      for (int64_t e = threadIdx.x; e < p.head_dim; e += 32) out[e] = x[e];
  }
}

__device__ float warp_sum(float x) {
  for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// One head by a warp: dx, and added to dw where it has a norm. A lane owns pairs, so nobody else adds to its dw.
template <class T>
__device__ void head_back(const HeadKind& kind, const T* x, const T* dout, const float* rope, int64_t head_dim,
                          float eps, T* dx, float* dw) {
  const int64_t half = head_dim / 2;
  const auto dy_of = [&](int64_t j) {
    return turn_back({to_f32(dout[j]), to_f32(dout[j + half])}, rope[j], rope[j + half], kind.scale);
  };
  float squares = 0.0f, products = 0.0f;
  if (kind.norm) {
    for (int64_t j = threadIdx.x; j < half; j += 32) {
      const HeadPair value = {to_f32(x[j]), to_f32(x[j + half])}, dy = dy_of(j);
      squares += value.low * value.low + value.high * value.high;
      products += dy.low * kind.norm[j] * value.low + dy.high * kind.norm[j + half] * value.high;
    }
    squares = warp_sum(squares);
    products = warp_sum(products);
  }
  const float rstd = rms_norm_rstd(squares, head_dim, eps), mean = products / static_cast<float>(head_dim);
  for (int64_t j = threadIdx.x; j < half; j += 32) {
    HeadPair d = dy_of(j);
    if (kind.norm) {
      const HeadPair value = {to_f32(x[j]), to_f32(x[j + half])};
      dw[j] += d.low * value.low * rstd;
      dw[j + half] += d.high * value.high * rstd;
      d = {rms_norm_grad(value.low, d.low * kind.norm[j], rstd, mean),
           rms_norm_grad(value.high, d.high * kind.norm[j + half], rstd, mean)};
    }
    dx[j] = from_f32<T>(d.low);
    dx[j + half] = from_f32<T>(d.high);
  }
}

// One block per kRotaryRows rows; warp w takes every kWarps-th head, from w on, and their dw adds up in that order.
template <class T> __global__ void backward_kernel(RotaryGradParams gradient) {
  extern __shared__ float partial[];  // [kWarps,2E] where there are norms
  const RotaryParams& p = gradient.forward;
  const int64_t all = p.heads + 2 * p.kv_heads, norms = 2 * p.head_dim, first = blockIdx.x * kRotaryRows;
  float* dw = partial + threadIdx.y * norms;
  if (gradient.dw)
    for (int64_t j = threadIdx.x; j < norms; j += 32) dw[j] = 0.0f;
  __syncwarp();  // a lane zeroes other elements than it adds to
  const int64_t rows = first + kRotaryRows < p.rows ? kRotaryRows : p.rows - first;
  for (int64_t head = threadIdx.y; head < rows * all; head += kWarps) {
    const int64_t index = head % all, start = (first * all + head) * p.head_dim;
    const HeadKind kind = head_kind(p, index);
    const T *x = static_cast<const T*>(p.qkv) + start, *dout = static_cast<const T*>(gradient.dout) + start;
    T* dx = static_cast<T*>(gradient.dqkv) + start;
    if (kind.turned)
      head_back(kind, x, dout, p.rope + p.position[first + head / all] * p.head_dim, p.head_dim, p.eps, dx,
                index < p.heads ? dw : dw + p.head_dim);
    else
      for (int64_t e = threadIdx.x; e < p.head_dim; e += 32) dx[e] = dout[e];
  }
  if (!gradient.dw) return;
  __syncthreads();
  for (int64_t j = threadIdx.y * 32 + threadIdx.x; j < norms; j += kWarps * 32) {
    float sum = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) sum += partial[warp * norms + j];
    gradient.dw[(1 + blockIdx.x) * norms + j] = sum;
  }
}

}  // namespace

void rotary_cuda(const RotaryParams& p, int device, void* stream) {
  if (p.rows == 0) return;
  DeviceGuard guard(device, "rotary");
  with_activations(p.dtype, [&](auto element) {
    forward_kernel<decltype(element)>
        <<<static_cast<unsigned>(p.rows), dim3(32, kWarps), 0, static_cast<cudaStream_t>(stream)>>>(p);
  });
  check_cuda(cudaGetLastError(), "rotary");
}

void rotary_backward_cuda(const RotaryGradParams& p, int device, void* stream) {
  DeviceGuard guard(device, "rotary_backward");
  auto queue = static_cast<cudaStream_t>(stream);
  const int64_t blocks = rotary_blocks(p.forward.rows), norms = 2 * p.forward.head_dim;
  const size_t shared = p.dw ? kWarps * norms * sizeof(float) : 0;
  if (blocks)
    with_activations(p.forward.dtype, [&](auto element) {
      backward_kernel<decltype(element)>
          <<<static_cast<unsigned>(blocks), dim3(32, kWarps), shared, queue>>>(p);
    });
  if (p.dw) sum_blocks_cuda(p.dw, blocks, norms, queue);
  check_cuda(cudaGetLastError(), "rotary_backward");
}

}  // namespace pymathrl
