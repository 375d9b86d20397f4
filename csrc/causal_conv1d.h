// causal_conv1d: the short depthwise convolution of a Mamba layer over packed sequences   (arXiv 2312.00752)
//   p_t,c = b_c + sum_k w_c,k x_{t-(W-1)+k, s(c)},  u = silu(p) or p; before a sequence stands `initial`, or zeros
//   s(c) = G floor(floor(c/G) / rep) + c mod G, rep = D/X: a group of G sources is read by rep groups of channels, and the
//   repeat is never written out                                                            (arXiv 2504.10449)
// Backward: q_t = du_t silu'(p_t), p computed again;  dx_j = sum_k w_k q_{j+(W-1)-k} over the copies of a source, of
// j before the sequence dinitial;  dw_k = sum_t x_{t-(W-1)+k} q_t;  db = sum_t q_t.
// Order, the same in every twin: b, then k = 0..W-1; dx: dfinal, then copy by copy, t upwards.
// Bytes in fp32 (bf16: half): forward 4T(X+D), backward 4T(2X+D). 2W+25 flops per element of u: memory-bound.
#pragma once
#include <type_traits>

#include "common/activations.h"
#include "common/packed.h"

namespace pymathrl {

constexpr int64_t kConvTile = 32;  // tokens whose dw adds up in fp32; such sums add up in double, in order
constexpr int kMaxConv = 4;        // W is 2..4

struct CausalConv1dParams {
  DType dtype;             // T of x and u: fp32, on a GPU also bf16
  const void* x;           // [T,X] T, rows x_stride apart
  const float* weight;     // [D,W]
  const float* bias;       // [D] or null
  const int64_t* offsets;  // [B+1]
  const float* initial;    // [B,W-1,X] or null
  void* u;                 // [T,D] T out
  float* final;            // [B,W-1,X] out or null
  int64_t tokens, sequences, sources, channels, group, width, x_stride;
  bool silu;
};

struct CausalConv1dGradParams {
  CausalConv1dParams forward;  // u and final are not used
  const void* du;              // [T,D] T
  const float* dfinal;         // [B,W-1,X] or null
  void* dx;                    // [T,X] T out
  float* dinitial;             // [B,W-1,X] out or null
  float* dw;                   // [1 + tiles, D(W+1)]: dweight, then dbias; row 0 out, the rest the sums of the tiles
};

void causal_conv1d_cpu(const CausalConv1dParams& p);
void causal_conv1d_cuda(const CausalConv1dParams& p, int device, void* stream);
void causal_conv1d_backward_cpu(const CausalConv1dGradParams& p);
void causal_conv1d_backward_cuda(const CausalConv1dGradParams& p, int device, void* stream);

HD int64_t causal_conv1d_tiles(int64_t tokens, int64_t sequences) {
  return tile_numbers(tokens, sequences, kConvTile);
}

// The first of the channels of a copy (0..rep-1) of source s and the sources after it in its group.
HD int64_t copy_channel(int64_t s, int64_t group, int64_t copies, int64_t copy) {
  return (s / group * copies + copy) * group + s % group;
}

HD int64_t group_start(int64_t channel, int64_t group) { return channel / group * group; }

// Where the input of position j, counted from the first token of the sequence and negative, stands in [B,W-1,X].
HD int64_t before_at(const CausalConv1dParams& p, int64_t sequence, int64_t j) {
  return ((sequence + 1) * (p.width - 1) + j) * p.sources;
}

// The taps of a channel and the inputs under them, oldest first. F: float or f32x16.
template <class F, int W> struct ConvTaps {
  F weight[W], bias;
};
template <class F, int W> struct ConvWindow {
  F x[W];
};

template <class F, int W> HD void push(ConvWindow<F, W>* window, F x) {
  for (int k = 0; k + 1 < W; ++k) window->x[k] = window->x[k + 1];
  window->x[W - 1] = x;
}

template <class F, int W> HD F conv_sum(const ConvTaps<F, W>& taps, const ConvWindow<F, W>& window) {
  F sum = taps.bias;
  for (int k = 0; k < W; ++k) sum = sum + taps.weight[k] * window.x[k];
  return sum;
}

// Runs body with the width as a constant.
template <class Body> void with_width(int64_t width, Body body) {
  if (width == 2)
    body(std::integral_constant<int, 2>());
  else if (width == 3)
    body(std::integral_constant<int, 3>());
  else
    body(std::integral_constant<int, 4>());
}

#ifdef __CUDACC__
template <int W>
__device__ __forceinline__ ConvTaps<float, W> load_taps(const float* weight, const float* bias, int64_t channel) {
  ConvTaps<float, W> taps;
  for (int k = 0; k < W; ++k) taps.weight[k] = weight[channel * W + k];
  taps.bias = bias ? bias[channel] : 0.0f;
  return taps;
}
#endif

}  // namespace pymathrl

#ifdef PYMATHRL_LEVEL  // the CPU twins
#include "common/simd.h"

namespace pymathrl {
inline namespace PYMATHRL_LEVEL {

// Of `count` channels, at most sixteen.
template <int W>
HD ConvTaps<f32x16, W> load_taps(const float* weight, const float* bias, int64_t channel, int64_t count) {
  ConvTaps<f32x16, W> taps;
  for (int k = 0; k < W; ++k) {
    float lane[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) lane[i] = weight[(channel + i) * W + k];
    taps.weight[k] = load16(lane);
  }
  taps.bias = bias ? load_some(bias + channel, count) : splat(0.0f);
  return taps;
}

}  // namespace PYMATHRL_LEVEL
}  // namespace pymathrl
#endif
