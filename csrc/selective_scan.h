// selective_scan: the recurrence of a Mamba-1 layer over packed sequences, gate included   (arXiv 2312.00752)
//   delta = softplus(dt + dt_bias), A = -e^a_log, abar_n = e^(delta A_n)
//   h_n <- abar_n h_n + delta u B_n,  y = D u + sum_n C_n h_n,  out = y silu(z)             for each channel, in token order
// Channel i reads group i/N of C and group i/(N rep) of B, rep = D/X; the repeat is never written out (arXiv 2504.10449).
// Backward, per channel and from the last token to the first, lambda starting at dfinal:
//   g = dout silu(z), dz = dout y silu'(z);  lambda_n = g C_n + (abar lambda)_n of the next token;  carry = abar h before
//   du = D g + delta sum_n lambda B,  ddelta = sum_n lambda (u B + A carry),  ddt = ddelta s(dt + dt_bias)
//   dB_n = sum over the rep N channels of its group of lambda delta u,  dC_n = sum over the N channels of g h
//   da_log_n = A_n sum_t lambda delta carry,  dD = sum_t g u,  ddt_bias = sum_t ddt,  dinitial = abar lambda of token 0
// The states of every kScanTile tokens are kept; backward computes those in between again, tile by tile.
// Order, the same in every twin: y from D u on, then n = 0..N-1. delta u is one product, so that h and y do not depend on
// how a twin groups it. One exponential and 5 flops per state forward; backward 1 and 18.
// Bytes in fp32: forward 4T(4D+X+D) + 4TND/64; N = 16: 25 flops per byte and more, bound by the exponentials.
#pragma once
#include "common/activations.h"
#include "common/packed.h"

namespace pymathrl {

constexpr int64_t kScanTile = 64;
constexpr int64_t kMaxStates = 128;

struct SelectiveScanParams {
  DType dtype;                                             // T: fp32, on a GPU also bf16
  const void *u, *dt, *z, *b, *c;                          // [T,D] [T,D] [T,D] or null [T,X] [T,D], of T
  int64_t u_stride, dt_stride, z_stride, b_stride, c_stride;  // elements from row to row
  const float* a_log;                                      // [D,N]
  const float *d, *dt_bias;                                // [D]
  const int64_t* offsets;                                  // [B+1]
  const float* initial;                                    // [B,N,D] or null
  void* y;                                                 // [T,D] T out
  float* final;                                            // [B,N,D] out or null
  float* checkpoint;                                       // [tiles,N,D] out or null: the states before each tile
  int64_t tokens, sequences, channels, sources, states;
};

struct SelectiveScanGradParams {
  SelectiveScanParams forward;         // checkpoint is read; initial, y and final are not used
  const void* dy;                      // [T,D] T
  const float* dfinal;                 // [B,N,D] or null
  void *du, *ddt, *dz, *db, *dc;       // dense, as u dt z b c; dz null where z is
  float* dinitial;                     // [B,N,D] out or null
  float* dw;                           // [1+B,N+2,D]: a_log, d, dt_bias; row 0 out, the rest the sums of the sequences
};

void selective_scan_cpu(const SelectiveScanParams& p);
void selective_scan_cuda(const SelectiveScanParams& p, int device, void* stream);
void selective_scan_backward_cpu(const SelectiveScanGradParams& p);
void selective_scan_backward_cuda(const SelectiveScanGradParams& p, int device, void* stream);

HD int64_t selective_scan_tiles(int64_t tokens, int64_t sequences) {
  return tile_numbers(tokens, sequences, kScanTile);
}

// F: float, one channel, or f32x16, sixteen of one group.
template <class F> HD F decay_rate(F a_log) { return -exp_row(a_log); }

// h after a token.
template <class F> HD F next_state(F h, F abar, F added, float b) { return abar * h + added * b; }

// One token: moves h[N] on and returns y before the gate. a[N], b[N], c[N].
template <class F>
HD F scan_token(F* h, const F* a, const float* b, const float* c, int64_t states, F u, F delta, F d) {
  const F added = delta * u;
  F y = d * u;
  UNROLL
  for (int64_t n = 0; n < states; ++n) {
    h[n] = next_state(h[n], exp_row(delta * a[n]), added, b[n]);
    y += h[n] * c[n];
  }
  return y;
}

// One state of one token on the way back. lambda: of the next token times its abar; becomes this token's.
template <class F> struct StateGrad {
  F b, c;        // the channel's parts of dB and dC
  F du, ddelta;  // sums: lambda B, and A lambda carry
  F a;           // sum: delta lambda carry
};
template <class F>
HD void state_back(F* lambda, F abar, F h_before, F h, F g, F added, F delta, F a, float b, float c, StateGrad<F>* grad) {
  const F here = g * c + *lambda, moved = here * (abar * h_before);
  grad->b = here * added;
  grad->c = g * h;
  grad->du += here * b;
  grad->ddelta += moved * a;
  grad->a += moved * delta;
  *lambda = abar * here;
}

}  // namespace pymathrl

#ifdef PYMATHRL_LEVEL  // the CPU twins
#include "common/simd.h"

namespace pymathrl {
inline namespace PYMATHRL_LEVEL {

// For a[N] and h[N] side by side on the stack. With kMaxStates rows each they would be a multiple of 4 KiB apart, and a
// load from one would wait for the last stores to the other: 27 ns for a token's sixteen states of a lane, with it 18.
constexpr int64_t kStateRows = kMaxStates + 20;

// a[N] of `count` channels, at most sixteen.
HD void load_decay(const float* a_log, int64_t states, int64_t channel, int64_t count, f32x16* a) {
  for (int64_t n = 0; n < states; ++n) {
    float lane[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) lane[i] = a_log[(channel + i) * states + n];
    a[n] = decay_rate(load16(lane));
  }
}

// Column `channel` of the rows [N,D] of a state, or of zeros where there is none.
HD void load_states(const float* rows, int64_t channels, int64_t states, int64_t channel, int64_t count, f32x16* h) {
  for (int64_t n = 0; n < states; ++n) h[n] = rows ? load_some(rows + n * channels + channel, count) : splat(0.0f);
}
HD void store_states(float* rows, int64_t channels, int64_t states, int64_t channel, int64_t count, const f32x16* h) {
  for (int64_t n = 0; n < states; ++n) store_some(rows + n * channels + channel, count, h[n]);
}

}  // namespace PYMATHRL_LEVEL
}  // namespace pymathrl
#endif
