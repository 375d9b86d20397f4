#include "selective_scan.h"

#include "common/packed.cuh"
#include "common/row_softmax.cuh"
#include "common/sum_blocks.cuh"
#include "common/tensor.h"

namespace pymathrl {
namespace {

constexpr int kStage = 8;         // tokens whose b and c, or parts of db and dc, are in shared memory at a time
constexpr int kMaxThreads = 512;  // of a block: the channels that read one group of b

// One block per sequence and group of b, one thread per channel. N: the states as a constant, or 0.
template <int N> struct Channel {
  int64_t channel, start, end;
  float d, dt_bias;
  float a[N ? N : kMaxStates];

  __device__ explicit Channel(const SelectiveScanParams& p)
      : channel(static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x),
        start(p.offsets[blockIdx.x]),
        end(p.offsets[blockIdx.x + 1]),
        d(p.d[channel]),
        dt_bias(p.dt_bias[channel]) {
    const int64_t states = N ? N : p.states;
    UNROLL
    for (int64_t n = 0; n < states; ++n) a[n] = decay_rate(p.a_log[channel * states + n]);
  }
  __device__ int64_t state_at(const SelectiveScanParams& p, int64_t rows, int64_t n) const {
    return (rows * p.states + n) * p.channels + channel;
  }
};

template <class T> __device__ float load(const void* rows, int64_t stride, int64_t t, int64_t column) {
  return to_f32(static_cast<const T*>(rows)[t * stride + column]);
}

template <class T> __device__ void store(void* rows, int64_t stride, int64_t t, int64_t column, float value) {
  static_cast<T*>(rows)[t * stride + column] = from_f32<T>(value);
}

template <class T, int N> __global__ void forward_kernel(SelectiveScanParams p) {
  extern __shared__ float shared[];  // b [kStage,N], c [kStage, channels of the block]
  const Channel<N> own(p);
  const int64_t states = N ? N : p.states;
  const int64_t group = blockIdx.y, sequence = blockIdx.x, first_c = threadIdx.x / states * states;
  float *b = shared, *c = shared + kStage * states;
  float h[N ? N : kMaxStates];
  UNROLL
  for (int64_t n = 0; n < states; ++n) h[n] = p.initial ? p.initial[own.state_at(p, sequence, n)] : 0.0f;
  int64_t tile = first_tile(p.offsets, sequence, kScanTile);
  for (int64_t first = own.start; first < own.end; first += kStage) {
    if (p.checkpoint && (first - own.start) % kScanTile == 0) {
      UNROLL
      for (int64_t n = 0; n < states; ++n) p.checkpoint[own.state_at(p, tile, n)] = h[n];
      ++tile;
    }
    const int64_t size = own.end - first < kStage ? own.end - first : kStage;
    __syncthreads();  // the readers of the stage before are done
    for (int64_t i = threadIdx.x; i < size * states; i += blockDim.x)
      b[i] = load<T>(p.b, p.b_stride, first + i / states, group * states + i % states);
    for (int64_t i = 0; i < size; ++i) c[i * blockDim.x + threadIdx.x] = load<T>(p.c, p.c_stride, first + i, own.channel);
    __syncthreads();
    for (int64_t i = 0; i < size; ++i) {
      const int64_t t = first + i;
      const float delta = softplus(load<T>(p.dt, p.dt_stride, t, own.channel) + own.dt_bias);
      float y = scan_token(h, own.a, b + i * states, c + i * blockDim.x + first_c, states,
                           load<T>(p.u, p.u_stride, t, own.channel), delta, own.d);
      if (p.z) y = y * silu(load<T>(p.z, p.z_stride, t, own.channel));
      store<T>(p.y, p.channels, t, own.channel, y);
    }
  }
  if (p.final) {
    UNROLL
    for (int64_t n = 0; n < states; ++n) p.final[own.state_at(p, sequence, n)] = h[n];
  }
}

// As backward_tile of the CPU: state by state, the tokens of a tile in local memory. Then, kStage tokens at a time, the
// channels' parts of db and dc are added up by as many threads as there are sums.
template <class T, int N> __global__ void backward_kernel(SelectiveScanGradParams gradient) {
  extern __shared__ float shared[];  // parts of db, then of dc: [kStage, channels of the block] each
  const SelectiveScanParams& p = gradient.forward;
  const Channel<N> own(p);
  const int64_t states = N ? N : p.states;
  const int64_t group = blockIdx.y, sequence = blockIdx.x, threads = blockDim.x, copies = threads / states;
  const int64_t b_column = group * states, c_column = own.channel / states * states;
  float *b_part = shared, *c_part = shared + kStage * threads;
  float lambda[N ? N : kMaxStates], da[N ? N : kMaxStates], dd = 0.0f, ddt_bias = 0.0f;
  for (int64_t n = 0; n < states; ++n) {
    lambda[n] = gradient.dfinal ? gradient.dfinal[own.state_at(p, sequence, n)] : 0.0f;
    da[n] = 0.0f;
  }
  const int64_t tiles = (own.end - own.start + kScanTile - 1) / kScanTile;
  for (int64_t tile = tiles - 1; tile >= 0; --tile) {
    const int64_t first = own.start + tile * kScanTile, number = first_tile(p.offsets, sequence, kScanTile) + tile;
    const int64_t size = own.end - first < kScanTile ? own.end - first : kScanTile;
    float delta[kScanTile], added[kScanTile], g[kScanTile], y[kScanTile], du[kScanTile], ddelta[kScanTile];
    float abar[kScanTile], h[kScanTile + 1];
    for (int64_t i = 0; i < size; ++i) {
      const float u = load<T>(p.u, p.u_stride, first + i, own.channel);
      delta[i] = softplus(load<T>(p.dt, p.dt_stride, first + i, own.channel) + own.dt_bias);
      added[i] = delta[i] * u;
      y[i] = own.d * u;
      g[i] = load<T>(gradient.dy, p.channels, first + i, own.channel);
      if (p.z) g[i] = g[i] * silu(load<T>(p.z, p.z_stride, first + i, own.channel));
      du[i] = ddelta[i] = 0.0f;
    }
    for (int64_t n = 0; n < states; ++n) {
      h[0] = p.checkpoint[own.state_at(p, number, n)];
      for (int64_t i = 0; i < size; ++i) {
        abar[i] = exp_row(delta[i] * own.a[n]);
        h[i + 1] = next_state(h[i], abar[i], added[i], load<T>(p.b, p.b_stride, first + i, b_column + n));
        y[i] += h[i + 1] * load<T>(p.c, p.c_stride, first + i, c_column + n);
      }
      for (int64_t stage = (size - 1) / kStage * kStage; stage >= 0; stage -= kStage) {
        const int64_t stage_size = size - stage < kStage ? size - stage : kStage;
        float part = 0.0f;
        for (int64_t k = stage_size - 1; k >= 0; --k) {
          const int64_t i = stage + k;
          StateGrad<float> grad{0.0f, 0.0f, du[i], ddelta[i], part};
          state_back(&lambda[n], abar[i], h[i], h[i + 1], g[i], added[i], delta[i], own.a[n],
                     load<T>(p.b, p.b_stride, first + i, b_column + n),
                     load<T>(p.c, p.c_stride, first + i, c_column + n), &grad);
          du[i] = grad.du, ddelta[i] = grad.ddelta, part = grad.a;
          b_part[k * threads + threadIdx.x] = grad.b;
          c_part[k * threads + threadIdx.x] = grad.c;
        }
        da[n] += part;
        __syncthreads();
        for (int64_t sum = threadIdx.x; sum < stage_size * (1 + copies); sum += threads) {
          const int64_t k = sum / (1 + copies), copy = sum % (1 + copies) - 1;  // copy -1: db
          const float* parts = copy < 0 ? b_part + k * threads : c_part + k * threads + copy * states;
          float total = 0.0f;
          for (int64_t i = 0; i < (copy < 0 ? threads : states); ++i) total += parts[i];
          if (copy < 0)
            store<T>(gradient.db, p.sources, first + stage + k, b_column + n, total);
          else
            store<T>(gradient.dc, p.channels, first + stage + k, (group * copies + copy) * states + n, total);
        }
        __syncthreads();  // before the parts are written again
      }
    }
    float dd_part = 0.0f, bias_part = 0.0f;
    for (int64_t i = size - 1; i >= 0; --i) {
      const int64_t t = first + i;
      const float u = load<T>(p.u, p.u_stride, t, own.channel);
      if (p.z) {
        const float slope = silu_slope(load<T>(p.z, p.z_stride, t, own.channel));
        const float dy = load<T>(gradient.dy, p.channels, t, own.channel);
        store<T>(gradient.dz, p.channels, t, own.channel, dy * y[i] * slope);
      }
      store<T>(gradient.du, p.channels, t, own.channel, own.d * g[i] + delta[i] * du[i]);
      const float raw = load<T>(p.dt, p.dt_stride, t, own.channel) + own.dt_bias;
      const float ddt = (u * du[i] + ddelta[i]) * sigmoid(raw).s;
      store<T>(gradient.ddt, p.channels, t, own.channel, ddt);
      dd_part += g[i] * u;
      bias_part += ddt;
      if (i % kStage == 0) {
        dd += dd_part, ddt_bias += bias_part;
        dd_part = bias_part = 0.0f;
      }
    }
  }
  if (gradient.dinitial)
    for (int64_t n = 0; n < states; ++n) gradient.dinitial[own.state_at(p, sequence, n)] = lambda[n];
  float* dw = gradient.dw + (1 + sequence) * (states + 2) * p.channels + own.channel;
  for (int64_t n = 0; n < states; ++n) dw[n * p.channels] = own.a[n] * da[n];
  dw[states * p.channels] = dd;
  dw[(states + 1) * p.channels] = ddt_bias;
}

// Runs launch(element, states as a constant, grid, threads) where there is a sequence.
template <class Launch> void with_channels(const SelectiveScanParams& p, const char* op, const Launch& launch) {
  const int64_t threads = p.channels / p.sources * p.states;
  if (threads > kMaxThreads)
    fail(op, ": on a GPU N D/X, the channels that read one group of b, must be at most ", kMaxThreads, ", got ", threads);
  if (p.sequences == 0) return;
  const dim3 grid(static_cast<unsigned>(p.sequences), static_cast<unsigned>(p.sources / p.states));
  with_activations(p.dtype, [&](auto element) {
    if (p.states == 16)
      launch(element, std::integral_constant<int, 16>(), grid, static_cast<int>(threads));
    else
      launch(element, std::integral_constant<int, 0>(), grid, static_cast<int>(threads));
  });
}

void clear_padding(const SelectiveScanParams& p, void* rows, int64_t width, cudaStream_t queue) {
  with_activations(p.dtype, [&](auto element) {
    clear_padding_cuda<decltype(element)>(p.offsets, p.sequences, p.tokens, rows, width, queue);
  });
}

}  // namespace

void selective_scan_cuda(const SelectiveScanParams& p, int device, void* stream) {
  DeviceGuard guard(device, "selective_scan");
  auto queue = static_cast<cudaStream_t>(stream);
  with_channels(p, "selective_scan", [&](auto element, auto states, dim3 grid, int threads) {
    const size_t shared = kStage * (p.states + threads) * sizeof(float);
    forward_kernel<decltype(element), decltype(states)::value><<<grid, threads, shared, queue>>>(p);
  });
  clear_padding(p, p.y, p.channels, queue);
  check_cuda(cudaGetLastError(), "selective_scan");
}

void selective_scan_backward_cuda(const SelectiveScanGradParams& gradient, int device, void* stream) {
  const SelectiveScanParams& p = gradient.forward;
  DeviceGuard guard(device, "selective_scan_backward");
  auto queue = static_cast<cudaStream_t>(stream);
  with_channels(p, "selective_scan_backward", [&](auto element, auto states, dim3 grid, int threads) {
    const size_t shared = 2 * kStage * threads * sizeof(float);
    backward_kernel<decltype(element), decltype(states)::value><<<grid, threads, shared, queue>>>(gradient);
  });
  for (void* rows : {gradient.du, gradient.ddt, gradient.dz, gradient.dc}) clear_padding(p, rows, p.channels, queue);
  clear_padding(p, gradient.db, p.sources, queue);
  sum_blocks_cuda(gradient.dw, p.sequences, (p.states + 2) * p.channels, queue);
  check_cuda(cudaGetLastError(), "selective_scan_backward");
}

}  // namespace pymathrl
