#include "common/row_softmax.cuh"
#include "token_logprob.h"

namespace pymathrl {
namespace {

template <class T, int kTeam> __global__ void __launch_bounds__(team_threads<kTeam>())
forward_kernel(TokenLogprobParams p, bool aligned) {
  __shared__ float shared[3 * 32];
  const int thread = team_thread<kTeam>();
  const float inverse_t = static_cast<float>(1.0 / p.temperature), scale = inverse_t * kLog2E;
  for (int64_t row = team_first_row<kTeam>(); row < p.rows; row += team_rows_step<kTeam>()) {
    const T* z = static_cast<const T*>(p.logits) + row * p.row_stride;
    RowSums sums = team_row_sums<T, kTeam>(z, p.width, aligned, inverse_t, thread, shared);
    if (p.proxy_logp) {  // a second sweep, mostly from L2: the threshold needs the final maximum
      const float threshold = min_p_threshold(p.min_p);
      float kept[1] = {0.0f};
      for (int64_t j = static_cast<int64_t>(thread) * kVec; j < p.width; j += static_cast<int64_t>(kTeam) * kVec) {
        float x[kVec];
        load_vec(z + j, vec_count(j, p.width), aligned, -kInf, x);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          float e = row_exp2(x[i], sums.max, scale);
          kept[0] += e >= threshold ? e : 0.0f;
        }
      }
      team_reduce(kept, 0.0f, shared, Add(), kTeam);
      sums.kept = kept[0];
    }
    if (thread == 0) {
      int64_t y = p.ids[row];
      float z_y = y >= 0 && y < p.width ? to_f32(z[y]) : __int_as_float(0x7fc00000);
      token_logprob_finish(p, row, sums, z_y, row_exp2(z_y, sums.max, scale));
    }
  }
}

// blockDim: x threads share a row, y rows per block. No thread needs another's result.
template <class T, bool kEntropy> __global__ void __launch_bounds__(kLargeTeam)
backward_kernel(TokenLogprobGradParams p, bool aligned) {
  const int64_t step = static_cast<int64_t>(blockDim.x) * kVec, first_row = static_cast<int64_t>(blockIdx.x) * blockDim.y;
  for (int64_t row = first_row + threadIdx.y; row < p.rows; row += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const T* z = static_cast<const T*>(p.logits) + row * p.row_stride;
    T* dz = static_cast<T*>(p.dlogits) + row * p.grad_stride;  // may be z: each element is read and written by one thread
    TokenGrad g = token_grad(p, row);
    const int64_t y = p.ids[row];
    const bool zero = g.weight == 0.0f && g.entropy_weight == 0.0f;
    if (y < 0 || y >= p.width) g.weight = __int_as_float(0x7fc00000);
    const float scale = g.inverse_t * kLog2E, rest = g.rest * kLog2E;
    for (int64_t j = static_cast<int64_t>(threadIdx.x) * kVec; j < p.width; j += kUnroll * step) {
      float x[kUnroll][kVec];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (!zero)
          load_vec(z + j + u * step, vec_count(j + u * step, p.width), aligned, 0.0f, x[u]);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t first = j + u * step;
        const bool has_own = !zero && y >= first && y < first + kVec;
        float z_y = 0.0f;
        if (has_own)
#pragma unroll
          for (int i = 0; i < kVec; ++i) z_y = first + i == y ? x[u][i] : z_y;
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          float logp2 = row_distance(x[u][i], g.anchor, scale) - rest;
          float probability = exp2_fast(logp2);
          float value = kEntropy ? token_grad_other(g, logp2 * static_cast<float>(kLn2), probability)
                                 : -probability * g.weight;
          x[u][i] = zero ? 0.0f : value;
        }
        if (has_own) {
          const float own = token_grad_own(g, g.logp(z_y));
#pragma unroll
          for (int i = 0; i < kVec; ++i) x[u][i] = first + i == y ? own : x[u][i];
        }
        store_vec(dz + first, vec_count(first, p.width), aligned, x[u]);
      }
    }
  }
}

}  // namespace

void token_logprob_cuda(const TokenLogprobParams& p, int device, void* stream) {
  if (p.rows == 0) return;
  DeviceGuard guard(device, "token_logprob");
  bool aligned = rows_aligned(p.logits, p.row_stride, p.dtype);
  with_logits(p.dtype, [&](auto element) {
    with_team(p.width, [&](auto team) {
      constexpr int kTeam = decltype(team)::value;
      forward_kernel<decltype(element), kTeam>
          <<<team_grid<kTeam>(p.rows), team_threads<kTeam>(), 0, static_cast<cudaStream_t>(stream)>>>(p, aligned);
    });
  });
  check_cuda(cudaGetLastError(), "token_logprob");
}

void token_logprob_backward_cuda(const TokenLogprobGradParams& p, int device, void* stream) {
  if (p.rows == 0) return;
  DeviceGuard guard(device, "token_logprob_backward");
  bool aligned = rows_aligned(p.logits, p.row_stride, p.dtype) && rows_aligned(p.dlogits, p.grad_stride, p.dtype);
  with_logits(p.dtype, [&](auto element) {
    auto kernel = p.grad_entropy ? backward_kernel<decltype(element), true> : backward_kernel<decltype(element), false>;
    with_team(p.width, [&](auto team) {
      constexpr int kTeam = decltype(team)::value;
      dim3 block(kTeam, team_threads<kTeam>() / kTeam);
      kernel<<<team_grid<kTeam>(p.rows), block, 0, static_cast<cudaStream_t>(stream)>>>(p, aligned);
    });
  });
  check_cuda(cudaGetLastError(), "token_logprob_backward");
}

}  // namespace pymathrl
