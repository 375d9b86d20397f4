// mamba_step: new tokens of many sequences through a Mamba-1 layer, between its projections, on states held in place
//   u = silu(conv(x)),  y = scan(u, dt, b, c) silu(z),  [z D | x X | b X | c D | ..] = a row of proj
// by the functions of causal_conv1d.h and selective_scan.h: on a CPU the bits are theirs; on a GPU u is rounded to T as
// between the two ops, and the compiler may fuse products and sums otherwise than there. Consecutive rows of one sequence
// are a run; a run's tokens go through one after the other, so that a prefill is the same call as a decode.
// Bytes in fp32 per row: states 8ND + 8(W-1)X, proj and dt 4(3D+2X), y 4D; a_log once per row block. M1-3B (D = 3072,
// X = 1024, N = 16, W = 4): 475 KB, of which the states are 418 KB. 2 exponentials per state at R = 1: memory-bound on a
// GPU.
#pragma once
#include "causal_conv1d.h"
#include "selective_scan.h"

namespace pymathrl {

struct MambaStepParams {
  DType dtype;              // T of proj, dt and out: fp32, on a GPU also bf16
  const void* proj;         // [R, at least 2D+2X] T, rows proj_stride apart
  const void* dt;           // [R,D] T, rows dt_stride apart
  float* conv_state;        // [S,W-1,X] in/out
  float* ssm_state;         // [S,N,D] in/out
  const int64_t* row;       // [R] of the states, -1: padding
  const int64_t* position;  // [R] 0: the states before are zeros
  const float* weight;      // [D,W]
  const float* bias;        // [D]
  const float* a_log;       // [D,N]
  const float *d, *dt_bias;  // [D]
  void* out;                // [R,D] T out
  int64_t rows, slots, sources, channels, states, width, proj_stride, dt_stride;
};

void mamba_step_cpu(const MambaStepParams& p);
void mamba_step_cuda(const MambaStepParams& p, int device, void* stream);

}  // namespace pymathrl
