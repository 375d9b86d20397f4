#include "mamba_step.h"

#include "common/row_softmax.cuh"
#include "common/tensor.h"

namespace pymathrl {
namespace {

constexpr int kMaxThreads = 512;

// One block per group of x and row; where a run starts it takes the whole run, else nothing. One thread per channel that
// copies the group, so that all readers of a window of conv_state stand before the same barrier. N: the states as a
// constant, or 0.
template <class T, int W, int N> __global__ void step_kernel(MambaStepParams p) {
  extern __shared__ float shared[];  // b [N], c [channels of the block] of a token
  const int64_t first = blockIdx.x, group = blockIdx.y, states = N ? N : p.states, slot = p.row[first];
  if (!run_starts(p.row, first)) return;
  const int64_t last = run_end(p.row, p.rows, first);
  const int64_t channel = group * blockDim.x + threadIdx.x, lane = threadIdx.x % states, s = group * states + lane;
  T* out = static_cast<T*>(p.out) + channel;
  if (slot < 0) {
    for (int64_t i = first; i < last; ++i) out[i * p.channels] = from_f32<T>(0.0f);
    return;
  }
  const bool fresh = p.position[first] == 0;
  float* inputs = p.conv_state + slot * (W - 1) * p.sources + s;
  float* state = p.ssm_state + slot * states * p.channels + channel;
  const auto taps = load_taps<W>(p.weight, p.bias, channel);
  ConvWindow<float, W> window;
  for (int k = 0; k < W; ++k) window.x[k] = k == 0 || fresh ? 0.0f : inputs[(k - 1) * p.sources];
  float a[N ? N : kMaxStates], h[N ? N : kMaxStates];
  UNROLL
  for (int64_t n = 0; n < states; ++n) {
    a[n] = decay_rate(p.a_log[channel * states + n]);
    h[n] = fresh ? 0.0f : state[n * p.channels];
  }
  const float d = p.d[channel], dt_bias = p.dt_bias[channel];
  float *b = shared, *c = shared + states;
  for (int64_t i = first; i < last; ++i) {
    const T* z = static_cast<const T*>(p.proj) + i * p.proj_stride;
    const T *x = z + p.channels, *b_row = x + p.sources, *c_row = b_row + p.sources;
    __syncthreads();  // windows are read, and so are b and c of the token before
    if (threadIdx.x < states) b[threadIdx.x] = to_f32(b_row[s]);
    c[threadIdx.x] = to_f32(c_row[channel]);
    __syncthreads();
    push(&window, to_f32(x[s]));
    const float u = to_f32(from_f32<T>(silu(conv_sum(taps, window))));  // rounded as between the two ops
    const float delta = softplus(to_f32(static_cast<const T*>(p.dt)[i * p.dt_stride + channel]) + dt_bias);
    const float y = scan_token(h, a, b, c + threadIdx.x - lane, states, u, delta, d);
    out[i * p.channels] = from_f32<T>(y * silu(to_f32(z[channel])));
  }
  UNROLL
  for (int64_t n = 0; n < states; ++n) state[n * p.channels] = h[n];
  if (threadIdx.x < states)
    for (int k = 1; k < W; ++k) inputs[(k - 1) * p.sources] = window.x[k];
}

}  // namespace

void mamba_step_cuda(const MambaStepParams& p, int device, void* stream) {
  const int64_t threads = p.channels / p.sources * p.states;
  if (threads > kMaxThreads)
    fail("mamba_step: on a GPU N D/X, the channels that read one group of b, must be at most ", kMaxThreads, ", got ",
         threads);
  if (p.rows == 0) return;
  DeviceGuard guard(device, "mamba_step");
  const dim3 grid(static_cast<unsigned>(p.rows), static_cast<unsigned>(p.sources / p.states));
  const size_t shared = (p.states + threads) * sizeof(float);
  with_activations(p.dtype, [&](auto element) {
    with_width(p.width, [&](auto width) {
      using T = decltype(element);
      constexpr int W = decltype(width)::value;
      auto queue = static_cast<cudaStream_t>(stream);
      if (p.states == 16)
        step_kernel<T, W, 16><<<grid, static_cast<unsigned>(threads), shared, queue>>>(p);
      else
        step_kernel<T, W, 0><<<grid, static_cast<unsigned>(threads), shared, queue>>>(p);
    });
  });
  check_cuda(cudaGetLastError(), "mamba_step");
}

}  // namespace pymathrl
