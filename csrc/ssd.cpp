#include "ssd.h"

#include <algorithm>
#include <atomic>

#include "common/parallel.h"
#include "common/transpose.h"
#include "ssd_backward.h"

namespace pymathrl {
inline namespace PYMATHRL_LEVEL {
namespace {

constexpr int64_t kGrainStates = 4096;         // state updates of sixteen channels that are worth a task: about 5 us
constexpr int64_t kStepWidth = 4 * kLanes;     // channels of a task of ssd_step

// kTokens consecutive tokens over kVectors * 16 channels. Two tokens at a time halve the loads and stores of states and
// give two chains of sums; the operations on each number are the same as one token after the other.
template <int kTokens, int kVectors>
HD void advance(float* state, int64_t stride, int64_t states, const float* a, const float* const* b,
                const float* const* c, const f32x16 (*dx)[kVectors], f32x16 (*y)[kVectors]) {
  for (int64_t n = 0; n < states; ++n, state += stride)
    for (int v = 0; v < kVectors; ++v) {
      f32x16 s = load16(state + v * kLanes);
      for (int t = 0; t < kTokens; ++t) ssd_update(s, y[t][v], a[t], dx[t][v], b[t][n], c[t][n]);
      store16(state + v * kLanes, s);
    }
}

// Consecutive tokens of a head, from token `first` on.
struct Run {
  const SsdInputs& in;
  float* y;  // [T,H*P]
  int64_t head, first;
  float rate, bias, d;

  HD Run(const SsdInputs& inputs, void* out, int64_t head_index, int64_t first_token)
      : in(inputs), y(static_cast<float*>(out)), head(head_index), first(first_token),
        rate(ssd_rate(inputs.a_log[head_index])), bias(inputs.dt_bias[head_index]), d(inputs.d[head_index]) {}
  HD const float* x(int64_t t) const {
    return static_cast<const float*>(in.x) + (first + t) * in.x_stride + head * in.width;
  }
  HD float dt(int64_t t) const { return static_cast<const float*>(in.dt)[(first + t) * in.dt_stride + head]; }
  HD const float* b(int64_t t) const {
    return static_cast<const float*>(in.b) + (first + t) * in.b_stride + ssd_group(in, head) * in.states;
  }
  HD const float* c(int64_t t) const {
    return static_cast<const float*>(in.c) + (first + t) * in.c_stride + ssd_group(in, head) * in.states;
  }
  HD float* out(int64_t t) const { return y + ((first + t) * in.heads + head) * in.width; }
};

// Tokens t..t+kTokens-1 of a run; `count` of the kVectors * 16 channels from p on exist.
template <int kTokens, int kVectors>
HD void tokens_of(const Run& run, int64_t t, int64_t p, int64_t count, const float* delta, const float* a,
                  float* state, int64_t stride) {
  f32x16 dx[kTokens][kVectors], y[kTokens][kVectors];
  const float *b[kTokens], *c[kTokens];
  const auto rest = [=](int v) { return std::min<int64_t>(count - v * kLanes, kLanes); };
  for (int i = 0; i < kTokens; ++i) {
    b[i] = run.b(t + i), c[i] = run.c(t + i);
    for (int v = 0; v < kVectors; ++v) {
      const f32x16 x = load_some(run.x(t + i) + p + v * kLanes, rest(v));
      dx[i][v] = x * delta[i];
      y[i][v] = x * run.d;
    }
  }
  advance<kTokens, kVectors>(state, stride, run.in.states, a, b, c, dx, y);
  for (int i = 0; i < kTokens; ++i)
    for (int v = 0; v < kVectors; ++v) store_some(run.out(t + i) + p + v * kLanes, rest(v), y[i][v]);
}

// Tokens begin..end-1 of a run over the `count` channels from p on, 16 at most. state: [N][16].
void advance_run(const Run& run, int64_t begin, int64_t end, int64_t p, int64_t count, float* state) {
  for (int64_t t = begin; t < end; t += kLanes) {
    const int64_t tokens = std::min<int64_t>(end - t, kLanes);
    float delta[kLanes] = {}, a[kLanes];
    for (int64_t i = 0; i < tokens; ++i) delta[i] = run.dt(t + i);
    const f32x16 lanes = ssd_delta(load16(delta), run.bias);
    store16(delta, lanes);
    store16(a, ssd_decay(lanes, run.rate));
    int64_t i = 0;
    for (; i + 2 <= tokens; i += 2) tokens_of<2, 1>(run, t + i, p, count, delta + i, a + i, state, kLanes);
    if (i < tokens) tokens_of<1, 1>(run, t + i, p, count, delta + i, a + i, state, kLanes);
  }
}

// Sixteen channels of a state [N,P] <-> [N][16]; the channels beyond `count` are 0.
HD void load_state(const float* from, int64_t width, int64_t states, int64_t count, float* state) {
  for (int64_t n = 0; n < states; ++n) store16(state + n * kLanes, load_some(from + n * width, count));
}
HD void store_state(const float* state, int64_t width, int64_t states, int64_t count, float* to) {
  for (int64_t n = 0; n < states; ++n) store_some(to + n * width, count, load16(state + n * kLanes));
}

void scan(const SsdScanParams& p, int64_t sequence, int64_t head, int64_t channel) {
  const SsdInputs& in = p.in;
  const int64_t begin = p.offsets[sequence], tokens = p.offsets[sequence + 1] - begin;
  const int64_t count = std::min<int64_t>(in.width - channel, kLanes), matrix = in.states * in.width;
  const int64_t at = (sequence * in.heads + head) * matrix + channel;
  alignas(64) float state[kMaxSsdStates * kLanes];
  if (p.initial)
    load_state(p.initial + at, in.width, in.states, count, state);
  else
    memset(state, 0, in.states * kLanes * sizeof(float));
  const Run run(in, p.y, head, begin);
  if (!p.starts) advance_run(run, 0, tokens, channel, count, state);
  for (int64_t t = 0; p.starts && t < tokens; t += p.chunk) {
    const int64_t start = first_tile(p.offsets, sequence, p.chunk) + t / p.chunk;
    store_state(state, in.width, in.states, count, p.starts + (start * in.heads + head) * matrix + channel);
    advance_run(run, t, std::min(t + p.chunk, tokens), channel, count, state);
  }
  store_state(state, in.width, in.states, count, p.final + at);
}

// The run that begins at row r, over the channels from `channel` on.
void step(const SsdStepParams& p, int64_t r, int64_t head, int64_t channel) {
  const SsdInputs& in = p.in;
  const int64_t width = std::min(in.width - channel, kStepWidth);
  const Run run(in, p.y, head, r);
  if (p.row[r] < 0) {
    memset(run.out(0) + channel, 0, width * sizeof(float));
    return;
  }
  if (!run_starts(p.row, r)) return;
  const int64_t tokens = run_end(p.row, in.tokens, r) - r;
  float* in_place = p.state + (p.row[r] * in.heads + head) * in.states * in.width + channel;
  const bool fresh = p.position[r] == 0;
  if (tokens == 1 && width == kStepWidth && !fresh) {  // once through the state, as it lies in memory
    const float delta = ssd_delta(run.dt(0), run.bias), a = ssd_decay(delta, run.rate);
    tokens_of<1, kStepWidth / kLanes>(run, 0, channel, width, &delta, &a, in_place, in.width);
    return;
  }
  alignas(64) float state[kMaxSsdStates * kLanes];
  for (int64_t j = 0; j < width; j += kLanes) {
    const int64_t count = std::min<int64_t>(width - j, kLanes);
    if (fresh)
      memset(state, 0, in.states * kLanes * sizeof(float));
    else
      load_state(in_place + j, in.width, in.states, count, state);
    advance_run(run, 0, tokens, channel + j, count, state);
    store_state(state, in.width, in.states, count, in_place + j);
  }
}

// The steps of ssd_backward.h by one thread. A tile of sums stays in registers: 16 of them, or 32 on AVX-512.
constexpr int kTileRows = kNative == 4 ? 2 : 4;
constexpr int kTileVectors = kNative == 16 ? 4 : 1;
constexpr int64_t kDepthPart = 64;  // products that add up in one chain
static_assert(kLanes % kTileRows == 0);

template <int kVectors> HD void product_tile(const Product& p, int64_t i, int64_t j, int64_t begin, int64_t end) {
  for (int64_t part = begin; part < end; part += kDepthPart) {
    f32x16 sum[kTileRows][kVectors];
    for (int r = 0; r < kTileRows; ++r)
      for (int v = 0; v < kVectors; ++v) sum[r][v] = splat(0.0f);
    const float *a = p.a + i * p.a_row, *b = p.b + j;
    for (int64_t k = part; k < std::min(end, part + kDepthPart); ++k)
      for (int v = 0; v < kVectors; ++v) {
        const f32x16 value = load16(b + k * p.b_stride + v * kLanes);
        for (int r = 0; r < kTileRows; ++r) sum[r][v] += value * a[r * p.a_row + k * p.a_step];
      }
    const float* from = part > begin ? p.out : p.from;
    const float factor = part > begin ? 1.0f : p.factor;
    for (int r = 0; r < kTileRows; ++r)
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = (i + r) * p.stride + j + v * kLanes;
        store16(p.out + at, factor == 0.0f ? sum[r][v] : load16(from + at) * factor + sum[r][v]);
      }
  }
}

struct Thread {
  template <class F> HD void grid(int64_t rows, int64_t columns, F f) {
    for (int64_t i = 0; i < rows; ++i) {
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) f(i, j);
    }
  }
  template <class F> HD void columns(int64_t rows, int64_t count, F f) { grid(rows, count, f); }
  template <class F> HD void row_sums(int64_t rows, int64_t columns, float* out, F f) {
    for (int64_t i = 0; i < rows; ++i) {
      float lane[kLanes] = {};
      for (int64_t j = 0; j < columns; j += kLanes) {
#pragma omp simd
        for (int64_t l = 0; l < kLanes; ++l) lane[l] += f(i, j + l);
      }
      out[i] = pymathrl::sum_lanes(static_cast<const float*>(lane));
    }
  }
  template <class F> HD void once(F f) { f(); }

  void pack(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to, int64_t to_stride,
            int64_t to_rows, int64_t to_columns) {
    for (int64_t i = 0; i < to_rows; ++i, to += to_stride) {
      const int64_t count = i < rows ? columns : 0;
      if (count) memcpy(to, from + i * stride, count * sizeof(float));
      memset(to + count, 0, (to_columns - count) * sizeof(float));
    }
  }
  void unpack(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t stride) {
    for (int64_t i = 0; i < rows; ++i) memcpy(to + i * stride, from + i * from_stride, columns * sizeof(float));
  }
  void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
    for (int64_t i = 0; i < rows; i += kLanes)
      for (int64_t j = 0; j < columns; j += kLanes) {
        f32x16 x[kLanes];
        for (int r = 0; r < kLanes; ++r) x[r] = load16(from + (i + r) * from_stride + j);
        PYMATHRL_LEVEL::transpose(x);
        for (int r = 0; r < kLanes; ++r) store16(to + (j + r) * to_stride + i, x[r]);
      }
  }
  // A column of tiles after the other: its part of b stays in the first-level cache while the rows of a pass.
  __attribute__((noinline)) void multiply(const Product& p) {
    for (int64_t j = 0; j < p.columns;) {
      const bool wide = p.columns - j >= kTileVectors * kLanes;
      for (int64_t i = p.kind == Product::lower_out ? j : 0; i < p.rows; i += kTileRows) {
        const int64_t begin = p.kind == Product::upper ? i : 0;
        const int64_t end = p.kind == Product::lower ? std::min(p.depth, i + kTileRows) : p.depth;
        if (wide)
          product_tile<kTileVectors>(p, i, j, begin, end);
        else
          product_tile<1>(p, i, j, begin, end);
      }
      j += wide ? kTileVectors * kLanes : kLanes;
    }
  }
};

void clear_padding(const SsdScanParams& p, void* rows, int64_t width) {
  pymathrl::clear_padding(p.offsets, p.sequences, p.in.tokens, rows, width);
}

}  // namespace

void ssd_scan_cpu(const SsdScanParams& p) {
  const SsdInputs& in = p.in;
  const int64_t slices = (in.width + kLanes - 1) / kLanes, end = p.offsets[p.sequences];
  clear_padding(p, p.y, in.heads * in.width);
  const int64_t states = in.states * (1 + end / std::max<int64_t>(p.sequences, 1));
  parallel_for(p.sequences * in.heads * slices, 1 + kGrainStates / states, [&](int64_t begin, int64_t stop) {
    for (int64_t i = begin; i < stop; ++i)
      scan(p, i / slices / in.heads, i / slices % in.heads, i % slices * kLanes);
  });
}

void ssd_scan_backward_cpu(const SsdGradParams& g) {
  const SsdScanParams& p = g.forward;
  const SsdInputs& in = p.in;
  clear_padding(p, g.dx, in.heads * in.width);
  clear_padding(p, g.ddt, in.heads);
  clear_padding(p, g.db, in.heads * in.states);
  clear_padding(p, g.dc, in.heads * in.states);
  std::atomic<int64_t> next{0};
  parallel_for(g.workers, 1, [&](int64_t begin, int64_t stop) {
    for (int64_t worker = begin; worker < stop; ++worker)
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < p.sequences * in.heads;) {
        Thread team;
        backward_head<float>(g, i / in.heads, i % in.heads, team, g.work + worker * g.work_size);
      }
  });
}

void ssd_step_cpu(const SsdStepParams& p) {
  const SsdInputs& in = p.in;
  for (int64_t r = 0; r < in.tokens; ++r)
    if (p.row[r] < -1 || p.row[r] >= p.slots)
      fail("ssd_step: row must be in [-1, ", p.slots, "), got ", p.row[r], " at ", r, "; correct row");
  const int64_t slices = (in.width + kStepWidth - 1) / kStepWidth;
  const int64_t states = in.states * (kStepWidth / kLanes);
  parallel_for(in.tokens * in.heads * slices, 1 + kGrainStates / states, [&](int64_t begin, int64_t stop) {
    for (int64_t i = begin; i < stop; ++i)
      step(p, i / slices / in.heads, i / slices % in.heads, i % slices * kStepWidth);
  });
}

}  // namespace PYMATHRL_LEVEL
}  // namespace pymathrl
