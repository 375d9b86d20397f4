#include "causal_conv1d.h"

#include "common/packed.cuh"
#include "common/row_softmax.cuh"
#include "common/sum_blocks.cuh"

namespace pymathrl {
namespace {

constexpr int kThreads = 128;

// One block per tile and kThreads sources, one thread per source: it goes through the channels that copy it.
dim3 grid_of(const CausalConv1dParams& p) {
  return dim3(static_cast<unsigned>(causal_conv1d_tiles(p.tokens, p.sequences)),
              static_cast<unsigned>((p.sources + kThreads - 1) / kThreads));
}

// The input of token j, which may lie before the sequence.
template <class T>
__device__ float input_at(const CausalConv1dParams& p, const Tile& tile, int64_t j, int64_t s) {
  if (j >= tile.start) return to_f32(static_cast<const T*>(p.x)[j * p.x_stride + s]);
  return p.initial ? p.initial[before_at(p, tile.sequence, j - tile.start) + s] : 0.0f;
}

// Under the taps before the tile's first token is pushed.
template <class T, int W>
__device__ ConvWindow<float, W> window_before(const CausalConv1dParams& p, const Tile& tile, int64_t s) {
  ConvWindow<float, W> window;
  for (int k = 0; k < W; ++k) window.x[k] = k ? input_at<T>(p, tile, tile.first - W + k, s) : 0.0f;
  return window;
}

template <class T, int W> __global__ void forward_kernel(CausalConv1dParams p) {
  const int64_t s = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x, copies = p.channels / p.sources;
  Tile tile;
  if (s >= p.sources || !find_tile(p.offsets, p.sequences, kConvTile, blockIdx.x, &tile)) return;
  for (int64_t copy = 0; copy < copies; ++copy) {
    const int64_t channel = copy_channel(s, p.group, copies, copy);
    const auto taps = load_taps<W>(p.weight, p.bias, channel);
    auto window = window_before<T, W>(p, tile, s);
    for (int64_t t = tile.first; t < tile.last; ++t) {
      push(&window, input_at<T>(p, tile, t, s));
      const float sum = conv_sum(taps, window);
      static_cast<T*>(p.u)[t * p.channels + channel] = from_f32<T>(p.silu ? silu(sum) : sum);
    }
  }
  if (p.final && tile.last == tile.end)
    for (int64_t k = 1; k < W; ++k)
      p.final[before_at(p, tile.sequence, -k) + s] = input_at<T>(p, tile, tile.end - k, s);
}

// As backward_tile of the CPU, but token by token through all copies, so that dx is rounded once.
template <class T, int W> __global__ void backward_kernel(CausalConv1dGradParams gradient) {
  const CausalConv1dParams& p = gradient.forward;
  const int64_t s = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x, copies = p.channels / p.sources;
  if (s >= p.sources) return;
  float* dw = gradient.dw + (1 + static_cast<int64_t>(blockIdx.x)) * p.channels * (W + 1);
  Tile tile;
  const bool some = find_tile(p.offsets, p.sequences, kConvTile, blockIdx.x, &tile);
  float dx[kConvTile + W - 1];  // of tokens tile.first - (W-1) on
  for (int64_t i = 0; i < kConvTile + W - 1; ++i) {
    const int64_t j = tile.first - (W - 1) + i;
    const bool kept = some && gradient.dfinal && j >= tile.end - (W - 1) && j < tile.last;
    dx[i] = kept ? gradient.dfinal[before_at(p, tile.sequence, j - tile.end) + s] : 0.0f;
  }
  for (int64_t copy = 0; copy < copies; ++copy) {
    const int64_t channel = copy_channel(s, p.group, copies, copy);
    ConvTaps<float, W> sums = {};
    if (some) {
      const auto taps = load_taps<W>(p.weight, p.bias, channel);
      auto window = window_before<T, W>(p, tile, s);
      ConvWindow<float, W> q = {};  // of tokens j .. j+W-1
      for (int64_t i = 0; i < tile.last - tile.first + W - 1; ++i) {
        const int64_t t = tile.first + i;
        float slope = 0.0f;
        if (t < tile.end) {
          push(&window, input_at<T>(p, tile, t, s));
          slope = to_f32(static_cast<const T*>(gradient.du)[t * p.channels + channel]);
          if (p.silu) slope = slope * silu_slope(conv_sum(taps, window));
        }
        push(&q, slope);
        if (t < tile.last) {
          for (int k = 0; k < W; ++k) sums.weight[k] += window.x[k] * slope;
          sums.bias += slope;
        }
        for (int k = 0; k < W; ++k) dx[i] += taps.weight[W - 1 - k] * q.x[k];
      }
    }
    for (int k = 0; k < W; ++k) dw[channel * W + k] = sums.weight[k];
    dw[p.channels * W + channel] = sums.bias;
  }
  if (!some) return;
  for (int64_t i = 0; i < tile.last - tile.first + W - 1; ++i) {
    const int64_t j = tile.first - (W - 1) + i;
    if (j >= tile.first)
      static_cast<T*>(gradient.dx)[j * p.sources + s] = from_f32<T>(dx[i]);
    else if (tile.first == tile.start && gradient.dinitial)
      gradient.dinitial[before_at(p, tile.sequence, j - tile.start) + s] = dx[i];
  }
}

}  // namespace

void causal_conv1d_cuda(const CausalConv1dParams& p, int device, void* stream) {
  DeviceGuard guard(device, "causal_conv1d");
  auto queue = static_cast<cudaStream_t>(stream);
  with_activations(p.dtype, [&](auto element) {
    using T = decltype(element);
    with_width(p.width, [&](auto width) {
      if (p.sequences) forward_kernel<T, decltype(width)::value><<<grid_of(p), kThreads, 0, queue>>>(p);
    });
    clear_padding_cuda<T>(p.offsets, p.sequences, p.tokens, p.u, p.channels, queue);
  });
  check_cuda(cudaGetLastError(), "causal_conv1d");
}

void causal_conv1d_backward_cuda(const CausalConv1dGradParams& gradient, int device, void* stream) {
  const CausalConv1dParams& p = gradient.forward;
  DeviceGuard guard(device, "causal_conv1d_backward");
  auto queue = static_cast<cudaStream_t>(stream);
  with_activations(p.dtype, [&](auto element) {
    using T = decltype(element);
    with_width(p.width, [&](auto width) {
      if (p.sequences) backward_kernel<T, decltype(width)::value><<<grid_of(p), kThreads, 0, queue>>>(gradient);
    });
    clear_padding_cuda<T>(p.offsets, p.sequences, p.tokens, gradient.dx, p.sources, queue);
  });
  const int64_t tiles = p.sequences ? causal_conv1d_tiles(p.tokens, p.sequences) : 0;
  sum_blocks_cuda(gradient.dw, tiles, p.channels * (p.width + 1), queue);
  check_cuda(cudaGetLastError(), "causal_conv1d_backward");
}

}  // namespace pymathrl
