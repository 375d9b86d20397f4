// The preparation of a head before attention: normalised over its elements (optional), turned by its position, scaled.
//   y_e = x_e rstd w_e  (or y = x),  rstd = 1 / sqrt(mean(x^2) + eps)
//   out_j = (y_j c_j - y_{j+h} s_j) scale,  out_{j+h} = (y_{j+h} c_j + y_j s_j) scale,  j < h = E/2
// The pairs are (j, j+h), Hugging Face's layout. A row of the rope table holds c_0..c_{h-1}, then s_0..s_{h-1}.
// Training (the op rotary) and generation (paged_attention) call these functions: their heads agree bit for bit. The
// sum of squares has kLanes partial sums and one tree, so that loops, vectors and warps add in the same order.
#pragma once
#include "rms_norm.h"

namespace pymathrl {

// The op rotary prepares the heads of N tokens. Backward: dy = scale R^T dout, then rms_norm's gradient, head by head,
// with dw summed over tokens and heads. C = (H+2K)E columns; bytes in fp32 (bf16: half): forward 8NC, backward 8NC, with
// norms 12NC: memory-bound.

constexpr int64_t kRotaryRows = 4;  // tokens whose dw adds up in fp32; such sums add up in double, in order

struct RotaryParams {
  DType dtype;              // T of qkv and out: fp32, on a GPU also bf16
  const void* qkv;          // [N,(H+2K)E] T
  const int64_t* position;  // [N] rows of rope
  const float* rope;        // [P,E]
  const float* q_norm;      // [E] or null: no norm
  const float* k_norm;      // [E] or null
  void* out;                // [N,(H+2K)E] T out
  int64_t rows, heads, kv_heads, head_dim;
  float scale, eps;  // scale: of the query heads
};

struct RotaryGradParams {
  RotaryParams forward;  // out is not used; qkv only where there are norms
  const void* dout;      // [N,(H+2K)E] T
  void* dqkv;            // [N,(H+2K)E] T out
  float* dw;             // [1 + ceil(N/kRotaryRows), 2E]: of q_norm, k_norm; row 0 out, the rest the sums of the blocks
};

void rotary_cpu(const RotaryParams& p);
void rotary_cuda(const RotaryParams& p, int device, void* stream);
void rotary_backward_cpu(const RotaryGradParams& p);
void rotary_backward_cuda(const RotaryGradParams& p, int device, void* stream);

inline int64_t rotary_blocks(int64_t rows) { return (rows + kRotaryRows - 1) / kRotaryRows; }

// How head `index` of a row is prepared: queries, keys, then values, which pass.
struct HeadKind {
  const float* norm;
  float scale;
  bool turned;
};
HD HeadKind head_kind(const RotaryParams& p, int64_t index) {
  if (index < p.heads) return {p.q_norm, p.scale, true};
  if (index < p.heads + p.kv_heads) return {p.k_norm, 1.0f, true};
  return {nullptr, 1.0f, false};
}

struct HeadPair {
  float low, high;  // elements j and j+h
};

HD HeadPair turn_pair(HeadPair y, float cosine, float sine, float scale) {
  return {(y.low * cosine - y.high * sine) * scale, (y.high * cosine + y.low * sine) * scale};
}

HD HeadPair turn_back(HeadPair d, float cosine, float sine, float scale) { return turn_pair(d, cosine, -sine, scale); }

HD float head_rstd(const float* x, int64_t head_dim, float eps) {
  float lane[kLanes] = {};
  int64_t e = 0;
  for (; e + kLanes <= head_dim; e += kLanes)
    for (int i = 0; i < kLanes; ++i) lane[i] += x[e + i] * x[e + i];
  for (int i = 0; e + i < head_dim; ++i) lane[i] += x[e + i] * x[e + i];
  return rms_norm_rstd(sum_lanes(lane), head_dim, eps);
}

// One head on a CPU. norm: [E] or null. rope: the row of its position, [E]. out may be x.
HD void prepare_head(const float* x, const float* norm, const float* rope, int64_t head_dim, float eps, float scale,
                     float* out) {
  const int64_t half = head_dim / 2;
  if (norm) {
    const float rstd = head_rstd(x, head_dim, eps);
#pragma omp simd
    for (int64_t j = 0; j < half; ++j) {
      // Not a HeadPair: gcc makes no vectors of a loop that stores one, and the op took 3 times as long.
      const float low = x[j] * rstd * norm[j], high = x[j + half] * rstd * norm[j + half];
      HeadPair y = turn_pair({low, high}, rope[j], rope[j + half], scale);
      out[j] = y.low, out[j + half] = y.high;
    }
  } else {
#pragma omp simd
    for (int64_t j = 0; j < half; ++j) {
      HeadPair y = turn_pair({x[j], x[j + half]}, rope[j], rope[j + half], scale);
      out[j] = y.low, out[j + half] = y.high;
    }
  }
}

#ifdef __CUDACC__
// The same by the 32 lanes of a warp: calls store(e, value) for each element once. T: float or bf16.
template <class T, class Store>
__device__ __forceinline__ void prepare_head(int lane, const T* x, const float* norm, const float* rope,
                                             int64_t head_dim, float eps, float scale, Store store) {
  const int half = static_cast<int>(head_dim / 2);
  float rstd = 1.0f;
  if (norm) {
    float squares = 0.0f;
    for (int e = lane % kLanes; e < head_dim; e += kLanes) squares += to_f32(x[e]) * to_f32(x[e]);
    for (int width = kLanes / 2; width > 0; width /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, width);
    rstd = rms_norm_rstd(squares, head_dim, eps);
  }
  for (int j = lane; j < half; j += 32) {
    HeadPair y = {to_f32(x[j]), to_f32(x[j + half])};
    if (norm) y = {y.low * rstd * norm[j], y.high * rstd * norm[j + half]};
    y = turn_pair(y, rope[j], rope[j + half], scale);
    store(j, y.low);
    store(j + half, y.high);
  }
}
#endif

}  // namespace pymathrl
