// rms_norm: h = x + r (or h = x), y = h * rstd * w, rstd = 1 / sqrt(mean(h^2) + eps)   (Zhang & Sennrich, arXiv 1910.07467)
//   dh = rstd (w dy - h rstd^2 mean(w dy h)) + dh_out, dw = sum over rows of dy h rstd;  dx = dr = dh.
// N rows, D width. Bytes in fp32 (bf16: half): forward 8ND, with the sum 16ND; backward 12ND, with the gradient of h
// 16ND. About one flop per byte: memory-bound; torch's own kernel on a CPU makes several passes.
#pragma once
#include "common/row_softmax.h"

namespace pymathrl {

constexpr int64_t kNormRows = 32;  // rows whose dw adds up in fp32; such sums add up in double, in order (256 rows: 3x the error)

struct RmsNormParams {
  DType dtype;           // T: fp32; on a GPU also bf16, to which h is rounded before the norm, as without fusion
  const void* x;         // [N,D] T
  const void* residual;  // [N,D] T or null
  const void* weight;    // [D] T
  void* sum;             // [N,D] T out: h, may be x or residual; null where residual is
  void* y;               // [N,D] T out
  float* rstd;           // [N] out, or null
  int64_t rows, width;
  float eps;
};

struct RmsNormGradParams {
  DType dtype;         // T
  const void* h;       // [N,D] T
  const void* weight;  // [D] T
  const float* rstd;   // [N] of the forward
  const void* dy;      // [N,D] T
  const void* dh_out;  // [N,D] T gradient that reaches h on its other way, or null
  void* dh;            // [N,D] T out
  float* dw;           // [1 + ceil(N/kNormRows), D]: row 0 out, the rest the sums of the blocks
  int64_t rows, width;
};

inline int64_t rms_norm_blocks(int64_t rows) { return (rows + kNormRows - 1) / kNormRows; }

void rms_norm_cpu(const RmsNormParams& p);
void rms_norm_cuda(const RmsNormParams& p, int device, void* stream);
void rms_norm_backward_cpu(const RmsNormGradParams& p);
void rms_norm_backward_cuda(const RmsNormGradParams& p, int device, void* stream);

HD float rms_norm_rstd(float sum_of_squares, int64_t width, float eps) {
  return 1.0f / sqrtf(sum_of_squares / static_cast<float>(width) + eps);
}

// dh of an element; mean = mean over the row of w dy h. F: float or f32x16.
template <class F> HD F rms_norm_grad(F h, F weighted_dy, float rstd, float mean) {
  return (weighted_dy - h * (rstd * rstd * mean)) * rstd;
}

}  // namespace pymathrl
