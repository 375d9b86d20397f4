#include "selective_scan.h"

#include "common/parallel.h"
#include "common/sum_blocks.h"

namespace pymathrl {
inline namespace PYMATHRL_LEVEL {
namespace {

constexpr int64_t kGrainStates = 16384;  // states moved by one token: about 20 us of work

// Tokens whose steps and gates are computed before the recurrence, where they overlap. Meanwhile the rows of as many more
// are fetched: a lane reads one line of each row, which no prefetcher of the processor foresees (1.5 times as fast).
constexpr int64_t kAhead = 8;

const float* at(const void* rows, int64_t stride, int64_t t) { return static_cast<const float*>(rows) + t * stride; }
float* at(void* rows, int64_t stride, int64_t t) { return static_cast<float*>(rows) + t * stride; }

int64_t state_size(const SelectiveScanParams& p) { return p.states * p.channels; }
float* sequence_states(float* rows, const SelectiveScanParams& p, int64_t sequence) {
  return rows ? rows + sequence * state_size(p) : nullptr;
}
const float* sequence_states(const float* rows, const SelectiveScanParams& p, int64_t sequence) {
  return rows ? rows + sequence * state_size(p) : nullptr;
}

// Up to sixteen neighbouring channels of one group.
struct Lanes {
  int64_t channel, count;
  int64_t b, c;  // the first columns of their groups
};

// Calls part(lanes) for the channels that read one group of b.
template <class Part> void for_lanes(const SelectiveScanParams& p, int64_t group, Part part) {
  const int64_t copies = p.channels / p.sources;
  for (int64_t c = group * copies; c < (group + 1) * copies; ++c)
    for_parts(p.states, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
      part(Lanes{c * p.states + i, count, group * p.states, c * p.states});
    });
}

// The lines of token t, and of a matrix [T,D].
HD void prefetch(const SelectiveScanParams& p, const Lanes& lanes, int64_t t, const void* other) {
  __builtin_prefetch(at(p.dt, p.dt_stride, t) + lanes.channel);
  __builtin_prefetch(at(p.u, p.u_stride, t) + lanes.channel);
  if (p.z) __builtin_prefetch(at(p.z, p.z_stride, t) + lanes.channel);
  __builtin_prefetch(at(p.b, p.b_stride, t) + lanes.b);
  __builtin_prefetch(at(p.c, p.c_stride, t) + lanes.c);
  __builtin_prefetch(at(other, p.channels, t) + lanes.channel);
}

void forward_lanes(const SelectiveScanParams& p, int64_t sequence, const Lanes& lanes) {
  const auto [channel, count, b, c] = lanes;
  f32x16 a[kStateRows], h[kStateRows];
  load_decay(p.a_log, p.states, channel, count, a);
  load_states(sequence_states(p.initial, p, sequence), p.channels, p.states, channel, count, h);
  const f32x16 d = load_some(p.d + channel, count), bias = load_some(p.dt_bias + channel, count);
  const int64_t start = p.offsets[sequence], end = p.offsets[sequence + 1];
  float* checkpoint =
      p.checkpoint ? p.checkpoint + first_tile(p.offsets, sequence, kScanTile) * state_size(p) : nullptr;
  for (int64_t first = start; first < end; first += kAhead) {
    if (checkpoint && (first - start) % kScanTile == 0) {
      store_states(checkpoint, p.channels, p.states, channel, count, h);
      checkpoint += state_size(p);
    }
    const int64_t size = end - first < kAhead ? end - first : kAhead;
    f32x16 delta[kAhead], gate[kAhead];
    for (int64_t t = first + kAhead; t < first + 2 * kAhead && t < end; ++t) prefetch(p, lanes, t, p.y);
    for (int64_t i = 0; i < size; ++i) {
      delta[i] = softplus(load_some(at(p.dt, p.dt_stride, first + i) + channel, count) + bias);
      gate[i] = p.z ? silu(load_some(at(p.z, p.z_stride, first + i) + channel, count)) : splat(1.0f);
    }
    for (int64_t i = 0; i < size; ++i) {
      const int64_t t = first + i;
      const f32x16 y = scan_token(h, a, at(p.b, p.b_stride, t) + b, at(p.c, p.c_stride, t) + c, p.states,
                                  load_some(at(p.u, p.u_stride, t) + channel, count), delta[i], d);
      store_some(at(p.y, p.channels, t) + channel, count, y * gate[i]);
    }
  }
  if (p.final) store_states(sequence_states(p.final, p, sequence), p.channels, p.states, channel, count, h);
}

// What backward holds of sixteen channels between the tiles of a sequence.
struct Adjoint {
  f32x16 a[kStateRows], lambda[kStateRows], da[kStateRows];
  f32x16 d, dt_bias, dd, ddt_bias;
};

// A sum over the tokens of a tile: eight at a time, then those. All 64 in a row doubled the error of da_log.
struct TokenSum {
  f32x16 part = splat(0.0f), whole = splat(0.0f);
};
HD void close(TokenSum* sum, int64_t i) {
  if (i % 8 == 0) *sum = {splat(0.0f), sum->whole + sum->part};
}

// Sums over lanes go to *sum, or are added to it.
HD void put(float* sum, bool first, f32x16 x) { *sum = (first ? 0.0f : *sum) + sum_lanes(x); }

// State by state, so that all of a tile stays in the first cache: 9 arrays of 4 KiB.
void backward_tile(const SelectiveScanGradParams& gradient, const Tile& tile, const float* checkpoint,
                   const Lanes& lanes, Adjoint* adjoint) {
  const SelectiveScanParams& p = gradient.forward;
  const auto [channel, count, b_column, c_column] = lanes;
  const int64_t size = tile.last - tile.first;
  const bool first_of_b = channel % (p.channels / p.sources * p.states) == 0, first_of_c = channel % p.states == 0;
  constexpr int64_t kRows = kScanTile + 1;  // and not 4 KiB: see kStateRows
  f32x16 delta[kRows], added[kRows], g[kRows], y[kRows], du[kRows], ddelta[kRows], abar[kRows], h[kRows];
  for (int64_t t = tile.first; t < tile.last; ++t) prefetch(p, lanes, t, gradient.dy);
  for (int64_t i = 0; i < size; ++i) {
    const int64_t t = tile.first + i;
    const f32x16 u = load_some(at(p.u, p.u_stride, t) + channel, count);
    delta[i] = softplus(load_some(at(p.dt, p.dt_stride, t) + channel, count) + adjoint->dt_bias);
    added[i] = delta[i] * u;
    y[i] = adjoint->d * u;
    g[i] = load_some(at(gradient.dy, p.channels, t) + channel, count);
    if (p.z) g[i] = g[i] * silu(load_some(at(p.z, p.z_stride, t) + channel, count));
    du[i] = ddelta[i] = splat(0.0f);
  }
  for (int64_t n = 0; n < p.states; ++n) {
    const float *b = at(p.b, p.b_stride, tile.first) + b_column + n, *c = at(p.c, p.c_stride, tile.first) + c_column + n;
    float *db = at(gradient.db, p.sources, tile.first) + b_column + n;
    float *dc = at(gradient.dc, p.channels, tile.first) + c_column + n;
    const f32x16 a = adjoint->a[n];
    h[0] = load_some(checkpoint + n * p.channels + channel, count);
    for (int64_t i = 0; i < size; ++i) {
      abar[i] = exp_row(delta[i] * a);
      h[i + 1] = next_state(h[i], abar[i], added[i], b[i * p.b_stride]);
      y[i] += h[i + 1] * c[i * p.c_stride];
    }
    f32x16 lambda = adjoint->lambda[n];
    TokenSum da;
    for (int64_t i = size - 1; i >= 0; --i) {
      StateGrad<f32x16> grad{{}, {}, du[i], ddelta[i], da.part};
      state_back(&lambda, abar[i], h[i], h[i + 1], g[i], added[i], delta[i], a, b[i * p.b_stride], c[i * p.c_stride],
                 &grad);
      du[i] = grad.du, ddelta[i] = grad.ddelta, da.part = grad.a;
      close(&da, i);
      put(db + i * p.sources, first_of_b, grad.b);
      put(dc + i * p.channels, first_of_c, grad.c);
    }
    adjoint->lambda[n] = lambda;
    adjoint->da[n] += da.whole;
  }
  TokenSum dd, ddt_bias;
  for (int64_t i = size - 1; i >= 0; --i) {
    const int64_t t = tile.first + i;
    const f32x16 u = load_some(at(p.u, p.u_stride, t) + channel, count);
    if (p.z) {
      const f32x16 dy = load_some(at(gradient.dy, p.channels, t) + channel, count);
      const f32x16 slope = silu_slope(load_some(at(p.z, p.z_stride, t) + channel, count));
      store_some(at(gradient.dz, p.channels, t) + channel, count, dy * y[i] * slope);
    }
    store_some(at(gradient.du, p.channels, t) + channel, count, adjoint->d * g[i] + delta[i] * du[i]);
    const f32x16 raw = load_some(at(p.dt, p.dt_stride, t) + channel, count) + adjoint->dt_bias;
    const f32x16 ddt = (u * du[i] + ddelta[i]) * sigmoid(raw).s;
    store_some(at(gradient.ddt, p.channels, t) + channel, count, ddt);
    dd.part += g[i] * u;
    ddt_bias.part += ddt;
    close(&dd, i), close(&ddt_bias, i);
  }
  adjoint->dd += dd.whole;
  adjoint->ddt_bias += ddt_bias.whole;
}

void backward_lanes(const SelectiveScanGradParams& gradient, int64_t sequence, const Lanes& lanes) {
  const SelectiveScanParams& p = gradient.forward;
  const auto [channel, count, b, c] = lanes;
  Adjoint adjoint;
  load_decay(p.a_log, p.states, channel, count, adjoint.a);
  load_states(sequence_states(gradient.dfinal, p, sequence), p.channels, p.states, channel, count, adjoint.lambda);
  load_states(nullptr, p.channels, p.states, channel, count, adjoint.da);
  adjoint.d = load_some(p.d + channel, count), adjoint.dt_bias = load_some(p.dt_bias + channel, count);
  adjoint.dd = adjoint.ddt_bias = splat(0.0f);
  const int64_t number = first_tile(p.offsets, sequence, kScanTile);
  Tile tile;
  find_tile(p.offsets, p.sequences, kScanTile, number, &tile);
  const int64_t tiles = (tile.end - tile.start + kScanTile - 1) / kScanTile;
  for (int64_t i = tiles - 1; i >= 0; --i) {
    find_tile(p.offsets, p.sequences, kScanTile, number + i, &tile);
    backward_tile(gradient, tile, p.checkpoint + (number + i) * state_size(p), lanes, &adjoint);
  }
  if (gradient.dinitial)
    store_states(sequence_states(gradient.dinitial, p, sequence), p.channels, p.states, channel, count, adjoint.lambda);
  float* dw = gradient.dw + (1 + sequence) * (p.states + 2) * p.channels + channel;
  for (int64_t n = 0; n < p.states; ++n) store_some(dw + n * p.channels, count, adjoint.a[n] * adjoint.da[n]);
  store_some(dw + p.states * p.channels, count, adjoint.dd);
  store_some(dw + (p.states + 1) * p.channels, count, adjoint.ddt_bias);
}

// Calls task(sequence, group) for all of them, in any order.
template <class Task> void for_groups(const SelectiveScanParams& p, Task task) {
  const int64_t groups = p.sources / p.states, tasks = p.sequences * groups;
  const int64_t work = tasks ? (p.tokens / p.sequences + 1) * p.channels / groups * p.states : 1;
  parallel_for(tasks, 1 + kGrainStates / work, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i / groups, i % groups);
  });
}

void clear_padding(const SelectiveScanParams& p, void* rows, int64_t width) {
  pymathrl::clear_padding(p.offsets, p.sequences, p.tokens, rows, width);
}

}  // namespace

void selective_scan_cpu(const SelectiveScanParams& p) {
  for_groups(p, [&](int64_t sequence, int64_t group) {
    for_lanes(p, group, [&](const Lanes& lanes) { forward_lanes(p, sequence, lanes); });
  });
  clear_padding(p, p.y, p.channels);
}

void selective_scan_backward_cpu(const SelectiveScanGradParams& gradient) {
  const SelectiveScanParams& p = gradient.forward;
  for_groups(p, [&](int64_t sequence, int64_t group) {
    for_lanes(p, group, [&](const Lanes& lanes) { backward_lanes(gradient, sequence, lanes); });
  });
  for (void* rows : {gradient.du, gradient.ddt, gradient.dz, gradient.dc}) clear_padding(p, rows, p.channels);
  clear_padding(p, gradient.db, p.sources);
  sum_blocks(gradient.dw, p.sequences, (p.states + 2) * p.channels);
}

}  // namespace PYMATHRL_LEVEL
}  // namespace pymathrl
