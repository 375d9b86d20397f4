#include "causal_conv1d.h"

#include "common/parallel.h"
#include "common/sum_blocks.h"

namespace pymathrl {
inline namespace PYMATHRL_LEVEL {
namespace {

constexpr int64_t kGrainElements = 16384;  // about 10 us of work

// Calls part(s, count) for each sixteen sources of a group; fewer at the group's end.
template <class Part> void for_sources(const CausalConv1dParams& p, Part part) {
  for (int64_t start = 0; start < p.sources; start += p.group)
    for_parts(p.group, [&](int64_t i, int64_t count) __attribute__((always_inline)) { part(start + i, count); });
}

// The input of token j, which may lie before the sequence.
HD f32x16 input_at(const CausalConv1dParams& p, const Tile& tile, int64_t j, int64_t s, int64_t count) {
  if (j >= tile.start) return load_some(static_cast<const float*>(p.x) + j * p.x_stride + s, count);
  return p.initial ? load_some(p.initial + before_at(p, tile.sequence, j - tile.start) + s, count) : splat(0.0f);
}

// Under the taps before the tile's first token is pushed.
template <int W>
HD ConvWindow<f32x16, W> window_before(const CausalConv1dParams& p, const Tile& tile, int64_t s, int64_t count) {
  ConvWindow<f32x16, W> window;
  for (int k = 0; k < W; ++k) window.x[k] = k ? input_at(p, tile, tile.first - W + k, s, count) : splat(0.0f);
  return window;
}

template <int W> void forward_tile(const CausalConv1dParams& p, const Tile& tile) {
  const int64_t copies = p.channels / p.sources;
  for_sources(p, [&](int64_t s, int64_t count) __attribute__((always_inline)) {
    for (int64_t copy = 0; copy < copies; ++copy) {
      const int64_t channel = copy_channel(s, p.group, copies, copy);
      const auto taps = load_taps<W>(p.weight, p.bias, channel, count);
      auto window = window_before<W>(p, tile, s, count);
      const float* x = static_cast<const float*>(p.x) + tile.first * p.x_stride + s;
      float* u = static_cast<float*>(p.u) + tile.first * p.channels + channel;
      for (int64_t t = tile.first; t < tile.last; ++t, x += p.x_stride, u += p.channels) {
        push(&window, load_some(x, count));
        const f32x16 sum = conv_sum(taps, window);
        store_some(u, count, p.silu ? silu(sum) : sum);
      }
    }
    if (p.final && tile.last == tile.end)
      for (int64_t k = 1; k < W; ++k)
        store_some(p.final + before_at(p, tile.sequence, -k) + s, count, input_at(p, tile, tile.end - k, s, count));
  });
}

// The tile's own dx, its part of dw and, of the first tile of a sequence, dinitial. It computes q of W-1 more tokens.
template <int W> void backward_tile(const CausalConv1dGradParams& gradient, const Tile& tile, float* dw) {
  const CausalConv1dParams& p = gradient.forward;
  const int64_t copies = p.channels / p.sources;
  for_sources(p, [&](int64_t s, int64_t count) __attribute__((always_inline)) {
    for (int64_t copy = 0; copy < copies; ++copy) {
      const int64_t channel = copy_channel(s, p.group, copies, copy);
      const auto taps = load_taps<W>(p.weight, p.bias, channel, count);
      auto window = window_before<W>(p, tile, s, count);
      ConvTaps<f32x16, W> sums;
      ConvWindow<f32x16, W> q;  // of tokens j .. j+W-1
      for (int k = 0; k < W; ++k) sums.weight[k] = q.x[k] = splat(0.0f);
      sums.bias = splat(0.0f);
      for (int64_t t = tile.first; t < tile.last + W - 1; ++t) {
        f32x16 slope = splat(0.0f);
        if (t < tile.end) {
          push(&window, load_some(static_cast<const float*>(p.x) + t * p.x_stride + s, count));
          slope = load_some(static_cast<const float*>(gradient.du) + t * p.channels + channel, count);
          if (p.silu) slope = slope * silu_slope(conv_sum(taps, window));
        }
        push(&q, slope);
        if (t < tile.last) {
          for (int k = 0; k < W; ++k) sums.weight[k] += window.x[k] * slope;
          sums.bias += slope;
        }
        const int64_t j = t - (W - 1);
        if (j < tile.first && tile.first > tile.start) continue;  // of the tile before
        float* dx = j >= tile.start       ? static_cast<float*>(gradient.dx) + j * p.sources + s
                    : gradient.dinitial ? gradient.dinitial + before_at(p, tile.sequence, j - tile.start) + s
                                        : nullptr;
        if (!dx) continue;
        const bool kept = gradient.dfinal && j >= tile.end - (W - 1);
        f32x16 sum = copy   ? load_some(dx, count)
                     : kept ? load_some(gradient.dfinal + before_at(p, tile.sequence, j - tile.end) + s, count)
                            : splat(0.0f);
        for (int i = 0; i < W; ++i) sum += taps.weight[W - 1 - i] * q.x[i];
        store_some(dx, count, sum);
      }
      for (int k = 0; k < W; ++k) {
        float lane[kLanes];
        store16(lane, sums.weight[k]);
        for (int64_t i = 0; i < count; ++i) dw[(channel + i) * W + k] = lane[i];
      }
      store_some(dw + p.channels * W + channel, count, sums.bias);
    }
  });
}

int64_t grain_of(const CausalConv1dParams& p) { return 1 + kGrainElements / (kConvTile * p.channels); }

}  // namespace

void causal_conv1d_cpu(const CausalConv1dParams& p) {
  parallel_for(causal_conv1d_tiles(p.offsets[p.sequences], p.sequences), grain_of(p), [&](int64_t begin, int64_t end) {
    Tile tile;
    for (int64_t number = begin; number < end; ++number)
      if (find_tile(p.offsets, p.sequences, kConvTile, number, &tile))
        with_width(p.width, [&](auto width) { forward_tile<width()>(p, tile); });
  });
  clear_padding(p.offsets, p.sequences, p.tokens, p.u, p.channels);
}

void causal_conv1d_backward_cpu(const CausalConv1dGradParams& gradient) {
  const CausalConv1dParams& p = gradient.forward;
  const int64_t tiles = causal_conv1d_tiles(p.tokens, p.sequences), sums = p.channels * (p.width + 1);
  parallel_for(tiles, grain_of(p), [&](int64_t begin, int64_t end) {
    Tile tile;
    for (int64_t number = begin; number < end; ++number) {
      float* dw = gradient.dw + (1 + number) * sums;
      if (p.sequences && find_tile(p.offsets, p.sequences, kConvTile, number, &tile))
        with_width(p.width, [&](auto width) { backward_tile<width()>(gradient, tile, dw); });
      else
        memset(dw, 0, sums * sizeof(float));
    }
  });
  clear_padding(p.offsets, p.sequences, p.tokens, gradient.dx, p.sources);
  sum_blocks(gradient.dw, tiles, sums);
}

}  // namespace PYMATHRL_LEVEL
}  // namespace pymathrl
