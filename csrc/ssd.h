// ssd: the recurrence of Mamba-2 (state space dual, Dao & Gu, arXiv 2405.21060), per head h with its group's B and C:
//   delta = softplus(dt + dt_bias),  a = exp(A delta),  A = -exp(a_log)
//   S[n,p] <- a S[n,p] + delta x_p B_n,  y_p = D x_p + sum_n C_n S[n,p]
// T tokens or R rows, H heads, P channels of a head, G groups (head h reads group h / (H/G)), N states of a channel.
// One order everywhere on a CPU (scan, split scan, prefill and decode by ssd_step): tokens one after the other, and the
// sum over n from D x_p on, n = 0..N-1. So y and the states have the same bits however the tokens are cut into calls.
// Flops per token and head: 5NP forward, about 13NP backward, as products of matrices (ssd_backward.h). Bytes (fp32) per
// token: forward 4(2HP + 2GN + H): bound by arithmetic. A decode step reads and writes the state, 8HNP: by memory.
#pragma once
#include "common/activations.h"
#include "common/packed.h"

namespace pymathrl {

constexpr int64_t kMaxSsdStates = 256;  // largest N: 16 channels of a state take 16 KB, half of a first-level cache

struct SsdInputs {
  DType dtype;                                     // E, of x, dt, b, c: f32, on a GPU also bf16
  const void* x;                                   // [T,H*P] E
  const void* dt;                                  // [T,H] E, before the bias
  const void* b;                                   // [T,G*N] E
  const void* c;                                   // [T,G*N] E
  const float* a_log;                              // [H]
  const float* d;                                  // [H]
  const float* dt_bias;                            // [H]
  int64_t x_stride, dt_stride, b_stride, c_stride; // elements between two rows
  int64_t tokens, heads, width, groups, states;    // T, H, P, G, N
};

struct SsdScanParams {
  SsdInputs in;
  const int64_t* offsets;  // [B+1]: sequence b is tokens offsets[b]..offsets[b+1]-1; what follows the last is padding
  const float* initial;    // [B,H,N,P] or null: 0
  void* y;                 // [T,H*P] E out; 0 in the padding
  float* final;            // [B,H,N,P] out: the states after the last tokens
  float* starts;           // [ssd_chunks(..),H,N,P] or null, out: the states before each chunk's first token
  int64_t sequences, chunk;
};

struct SsdGradParams {
  SsdScanParams forward;  // y and final are not used; starts is read
  const void* dy;         // [T,H*P] E
  const float* dfinal;     // [B,H,N,P] or null: 0
  void* dx;               // [T,H*P] E out; 0 in the padding, as the next three
  void* ddt;              // [T,H] E out
  float* db;              // [T,H*N] out: of each head; the gradient of b is their sum over the heads of a group
  float* dc;              // [T,H*N] out
  float* dinitial;        // [B,H,N,P] or null, out
  float* sums;            // [3,B,H] out: of each sequence, the gradients of a_log, d and dt_bias
  float* work;            // [workers,work_size]
  int64_t workers;        // (sequence, head) pairs that are worked on at a time: no influence on results
  int64_t work_size;      // ssd_work_size of the longest chunk there can be, min(chunk, T)
};

struct SsdStepParams {
  SsdInputs in;             // T = R rows
  const int64_t* row;       // [R] of state, or -1: padding. Equal ones stand together and are consecutive tokens
  const int64_t* position;  // [R] of the token in its sequence; at 0 the state starts as 0
  float* state;             // [S,H,N,P] in and out
  void* y;                  // [R,H*P] E out; 0 in the padding
  int64_t slots;            // S
};

void ssd_scan_cpu(const SsdScanParams& p);
void ssd_scan_cuda(const SsdScanParams& p, int device, void* stream);
void ssd_scan_backward_cpu(const SsdGradParams& p);
void ssd_scan_backward_cuda(const SsdGradParams& p, int device, void* stream);
void ssd_step_cpu(const SsdStepParams& p);
void ssd_step_cuda(const SsdStepParams& p, int device, void* stream);

// Chunks are the tiles of packed.h.
HD int64_t ssd_chunks(int64_t tokens, int64_t sequences, int64_t chunk) {
  return tile_numbers(tokens, sequences, chunk);
}

HD int64_t ssd_group(const SsdInputs& in, int64_t head) { return head / (in.heads / in.groups); }

// A of a head; delta and a of a token, or of sixteen.
HD float ssd_rate(float a_log) { return -exp_row(a_log); }
template <class F> HD F ssd_delta(F dt, float dt_bias) { return softplus(dt + dt_bias); }
template <class F> HD F ssd_decay(F delta, float rate) { return exp_row(delta * rate); }

// One state, or sixteen neighbouring channels' state n, over one token. dx = delta x.
template <class F> HD void ssd_update(F& state, F& y, float a, F dx, float b, float c) {
  state = state * a + dx * b;
  y = y + state * c;
}

}  // namespace pymathrl
