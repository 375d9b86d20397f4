#include "mamba_step.h"

#include "common/parallel.h"
#include "common/tensor.h"

namespace pymathrl {
inline namespace PYMATHRL_LEVEL {
namespace {

constexpr int64_t kBlockRows = 16;  // the runs that start in a block of rows share one a[N]

// Rows [first, last) are a run.
struct Run {
  int64_t first, last;
};

// Calls body(run) for the runs that start in rows [begin, end).
template <class Body> HD void for_runs(const MambaStepParams& p, int64_t begin, int64_t end, Body body) {
  for (int64_t i = begin; i < end;) {
    const int64_t last = run_end(p.row, p.rows, i);
    if (run_starts(p.row, i)) body(Run{i, last});
    i = last;
  }
}

HD const float* x_of(const MambaStepParams& p, int64_t i) {
  return static_cast<const float*>(p.proj) + i * p.proj_stride + p.channels;
}

// The states before a run; null: zeros.
HD const float* states_before(const MambaStepParams& p, const Run& run, const float* states, int64_t size) {
  return p.position[run.first] == 0 ? nullptr : states + p.row[run.first] * size;
}

// Sixteen channels, those that copy the sources s.. once. The conv_state stays as it is: other copies read it too.
template <int W>
HD void run_lanes(const MambaStepParams& p, const Run& run, const f32x16* a, const ConvTaps<f32x16, W>& taps, int64_t s,
                  int64_t channel, int64_t count) {
  float* out = static_cast<float*>(p.out) + channel;
  if (p.row[run.first] < 0) {
    for (int64_t i = run.first; i < run.last; ++i) store_some(out + i * p.channels, count, splat(0.0f));
    return;
  }
  const float* inputs = states_before(p, run, p.conv_state, (W - 1) * p.sources);
  ConvWindow<f32x16, W> window;
  for (int k = 0; k < W; ++k)
    window.x[k] = k && inputs ? load_some(inputs + (k - 1) * p.sources + s, count) : splat(0.0f);
  f32x16 h[kStateRows];
  const int64_t size = p.states * p.channels;
  load_states(states_before(p, run, p.ssm_state, size), p.channels, p.states, channel, count, h);
  const f32x16 d = load_some(p.d + channel, count), bias = load_some(p.dt_bias + channel, count);
  for (int64_t i = run.first; i < run.last; ++i) {
    const float *x = x_of(p, i), *z = x - p.channels, *b = x + p.sources, *c = b + p.sources;
    const float* dt = static_cast<const float*>(p.dt) + i * p.dt_stride;
    push(&window, load_some(x + s, count));
    const f32x16 u = silu(conv_sum(taps, window)), delta = softplus(load_some(dt + channel, count) + bias);
    const f32x16 y = scan_token(h, a, b + group_start(s, p.states), c + group_start(channel, p.states), p.states, u,
                                delta, d);
    store_some(out + i * p.channels, count, y * silu(load_some(z + channel, count)));
  }
  store_states(p.ssm_state + p.row[run.first] * size, p.channels, p.states, channel, count, h);
}

// The last W-1 inputs after a run. New row k is old row k + tokens, where there is one: going up, none is overwritten
// before it was read.
HD void move_window(const MambaStepParams& p, const Run& run, int64_t s, int64_t count) {
  if (p.row[run.first] < 0) return;
  const int64_t kept = p.width - 1, tokens = run.last - run.first;
  const float* before = states_before(p, run, p.conv_state, kept * p.sources);
  float* state = p.conv_state + p.row[run.first] * kept * p.sources + s;
  for (int64_t k = 0; k < kept; ++k) {
    f32x16 x = splat(0.0f);
    if (k + tokens >= kept)
      x = load_some(x_of(p, run.last - kept + k) + s, count);
    else if (before)
      x = load_some(before + (k + tokens) * p.sources + s, count);
    store_some(state + k * p.sources, count, x);
  }
}

template <int W> void step_group(const MambaStepParams& p, int64_t group, int64_t begin, int64_t end) {
  const int64_t copies = p.channels / p.sources;
  for_parts(p.states, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const int64_t s = group * p.states + i;
    for (int64_t copy = 0; copy < copies; ++copy) {
      const int64_t channel = copy_channel(s, p.states, copies, copy);
      f32x16 a[kStateRows];
      load_decay(p.a_log, p.states, channel, count, a);
      const auto taps = load_taps<W>(p.weight, p.bias, channel, count);
      for_runs(p, begin, end, [&](const Run& run) __attribute__((always_inline)) {
        run_lanes(p, run, a, taps, s, channel, count);
      });
    }
    for_runs(p, begin, end, [&](const Run& run) __attribute__((always_inline)) { move_window(p, run, s, count); });
  });
}

}  // namespace

void mamba_step_cpu(const MambaStepParams& p) {
  for (int64_t i = 0; i < p.rows; ++i)
    if (p.row[i] < -1 || p.row[i] >= p.slots)
      fail("mamba_step: row must be in [-1, ", p.slots, ") (the rows of the states), got ", p.row[i], " at ", i);
  const int64_t groups = p.sources / p.states, blocks = (p.rows + kBlockRows - 1) / kBlockRows;
  parallel_for(groups * blocks, 1, [&](int64_t task, int64_t) {
    const int64_t begin = task / groups * kBlockRows, end = begin + kBlockRows < p.rows ? begin + kBlockRows : p.rows;
    with_width(p.width, [&](auto width) { step_group<width()>(p, task % groups, begin, end); });
  });
}

}  // namespace PYMATHRL_LEVEL
}  // namespace pymathrl
