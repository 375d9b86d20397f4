#include "rms_norm.h"

#include "common/parallel.h"
#include "common/simd.h"
#include "common/sum_blocks.h"

namespace pymathrl {
inline namespace PYMATHRL_LEVEL {
namespace {

constexpr int64_t kGrainElements = 32768;  // about 10 us of work

void forward_row(const RmsNormParams& p, int64_t row) {
  const int64_t start = row * p.width;
  const float *h = static_cast<const float*>(p.x) + start, *weight = static_cast<const float*>(p.weight);
  f32x16 squares = splat(0.0f);
  if (p.residual) {
    const float *x = h, *r = static_cast<const float*>(p.residual) + start;
    float* sum = static_cast<float*>(p.sum) + start;
    for_parts(p.width, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
      f32x16 value = load_some(x + j, count) + load_some(r + j, count);
      store_some(sum + j, count, value);
      squares += value * value;
    });
    h = sum;
  } else {
    for_parts(p.width, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
      f32x16 value = load_some(h + j, count);
      squares += value * value;
    });
  }
  float rstd = rms_norm_rstd(sum_lanes(squares), p.width, p.eps);
  if (p.rstd) p.rstd[row] = rstd;
  float* y = static_cast<float*>(p.y) + start;
  for_parts(p.width, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
    store_some(y + j, count, load_some(h + j, count) * rstd * load_some(weight + j, count));
  });
}

void backward_row(const RmsNormGradParams& p, int64_t row, float* dw) {
  const int64_t start = row * p.width;
  const float *h = static_cast<const float*>(p.h) + start, *dy = static_cast<const float*>(p.dy) + start;
  const float *weight = static_cast<const float*>(p.weight), *more = static_cast<const float*>(p.dh_out);
  float* dh = static_cast<float*>(p.dh) + start;
  const float rstd = p.rstd[row];
  f32x16 products = splat(0.0f);
  for_parts(p.width, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
    f32x16 d = load_some(dy + j, count), value = load_some(h + j, count);
    products += d * load_some(weight + j, count) * value;
    store_some(dw + j, count, load_some(dw + j, count) + d * value * rstd);
  });
  const float mean = sum_lanes(products) / static_cast<float>(p.width);
  for_parts(p.width, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
    f32x16 d = load_some(dy + j, count) * load_some(weight + j, count);
    f32x16 gradient = rms_norm_grad(load_some(h + j, count), d, rstd, mean);
    if (more) gradient += load_some(more + start + j, count);
    store_some(dh + j, count, gradient);
  });
}

}  // namespace

void rms_norm_cpu(const RmsNormParams& p) {
  parallel_for(p.rows, 1 + kGrainElements / p.width, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) forward_row(p, row);
  });
}

void rms_norm_backward_cpu(const RmsNormGradParams& p) {
  const int64_t blocks = rms_norm_blocks(p.rows);
  parallel_for(blocks, 1 + kGrainElements / (p.width * kNormRows), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float* dw = p.dw + (1 + block) * p.width;
      memset(dw, 0, p.width * sizeof(float));
      int64_t last = (block + 1) * kNormRows < p.rows ? (block + 1) * kNormRows : p.rows;
      for (int64_t row = block * kNormRows; row < last; ++row) backward_row(p, row, dw);
    }
  });
  sum_blocks(p.dw, blocks, p.width);
}

}  // namespace PYMATHRL_LEVEL
}  // namespace pymathrl
