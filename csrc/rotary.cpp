#include "rotary.h"

#include "common/parallel.h"
#include "common/simd.h"
#include "common/sum_blocks.h"

namespace pymathrl {
inline namespace PYMATHRL_LEVEL {
namespace {

constexpr int64_t kGrainElements = 16384;  // about 10 us of work

void forward_row(const RotaryParams& p, int64_t row) {
  const int64_t all = p.heads + 2 * p.kv_heads;
  const int64_t start = row * all * p.head_dim;
  const float *x = static_cast<const float*>(p.qkv) + start, *rope = p.rope + p.position[row] * p.head_dim;
  float* out = static_cast<float*>(p.out) + start;
  for (int64_t index = 0; index < all; ++index, x += p.head_dim, out += p.head_dim) {
    const HeadKind kind = head_kind(p, index);
    if (kind.turned)
      prepare_head(x, kind.norm, rope, p.head_dim, p.eps, kind.scale, out);
    else
      memcpy(out, x, p.head_dim * sizeof(float));
  }
}

HD void turn_head_back(const float* dout, const float* rope, int64_t head_dim, float scale, float* dy) {
  const int64_t half = head_dim / 2;
#pragma omp simd
  for (int64_t j = 0; j < half; ++j) {
    HeadPair pair = turn_back({dout[j], dout[j + half]}, rope[j], rope[j + half], scale);
    dy[j] = pair.low, dy[j + half] = pair.high;
  }
}

// dx holds dy and becomes the gradient of x; adds to dw.
HD void norm_head_back(const float* x, const float* norm, int64_t head_dim, float eps, float* dx, float* dw) {
  const float rstd = head_rstd(x, head_dim, eps);
  f32x16 products = splat(0.0f);
  for_parts(head_dim, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
    f32x16 d = load_some(dx + j, count), value = load_some(x + j, count);
    products += d * load_some(norm + j, count) * value;
    store_some(dw + j, count, load_some(dw + j, count) + d * value * rstd);
  });
  const float mean = sum_lanes(products) / static_cast<float>(head_dim);
  for_parts(head_dim, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
    f32x16 d = load_some(dx + j, count) * load_some(norm + j, count);
    store_some(dx + j, count, rms_norm_grad(load_some(x + j, count), d, rstd, mean));
  });
}

void backward_row(const RotaryGradParams& gradient, int64_t row, float* dw) {
  const RotaryParams& p = gradient.forward;
  const int64_t all = p.heads + 2 * p.kv_heads, start = row * all * p.head_dim;
  const float *x = static_cast<const float*>(p.qkv) + start, *rope = p.rope + p.position[row] * p.head_dim;
  const float* dout = static_cast<const float*>(gradient.dout) + start;
  float* dx = static_cast<float*>(gradient.dqkv) + start;
  for (int64_t index = 0; index < all; ++index, x += p.head_dim, dout += p.head_dim, dx += p.head_dim) {
    const HeadKind kind = head_kind(p, index);
    if (kind.turned)
      turn_head_back(dout, rope, p.head_dim, kind.scale, dx);
    else
      memcpy(dx, dout, p.head_dim * sizeof(float));
    if (kind.norm) norm_head_back(x, kind.norm, p.head_dim, p.eps, dx, index < p.heads ? dw : dw + p.head_dim);
  }
}

}  // namespace

void rotary_cpu(const RotaryParams& p) {
  const int64_t width = (p.heads + 2 * p.kv_heads) * p.head_dim;
  parallel_for(p.rows, 1 + kGrainElements / width, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) forward_row(p, row);
  });
}

void rotary_backward_cpu(const RotaryGradParams& p) {
  const int64_t rows = p.forward.rows, blocks = rotary_blocks(rows), norms = 2 * p.forward.head_dim;
  const int64_t width = (p.forward.heads + 2 * p.forward.kv_heads) * p.forward.head_dim;
  parallel_for(blocks, 1 + kGrainElements / (width * kRotaryRows), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float* dw = p.dw ? p.dw + (1 + block) * norms : nullptr;
      if (dw) memset(dw, 0, norms * sizeof(float));
      int64_t last = (block + 1) * kRotaryRows < rows ? (block + 1) * kRotaryRows : rows;
      for (int64_t row = block * kRotaryRows; row < last; ++row) backward_row(p, row, dw);
    }
  });
  if (p.dw) sum_blocks(p.dw, blocks, norms);
}

}  // namespace PYMATHRL_LEVEL
}  // namespace pymathrl
