#include "token_logprob.h"

#include "common/parallel.h"
#include "common/simd.h"

namespace pymathrl {
namespace {

constexpr int64_t kGrainElements = 32768;  // about 20 us of work: below that a second thread costs more than it saves

int64_t row_grain(int64_t width) { return width < kGrainElements ? kGrainElements / width : 1; }

template <bool kEntropy> HD f32x16 grad_part(const TokenGrad& g, f32x16 z) {
  f32x16 logp = row_distance(z, g.anchor, g.inverse_t) - g.rest;
  f32x16 probability = exp_row(logp);
  return kEntropy ? token_grad_other(g, logp, probability) : -probability * g.weight;
}

template <class T, bool kEntropy>
HD void grad_row(const T* z, T* dz, int64_t width, int64_t y, const TokenGrad& g) {
  float own = token_grad_own(g, g.logp(to_f32(z[y])));  // before dz overwrites z
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) store16(dz + j, grad_part<kEntropy>(g, load16(z + j)));
  if (j < width) store_part(dz + j, width - j, grad_part<kEntropy>(g, load_part(z + j, width - j, 0.0f)));
  dz[y] = from_f32<T>(own);
}

template <class T>
HD void grad_row_any(const TokenLogprobGradParams& p, int64_t row, const TokenGrad& g) {
  auto z = static_cast<const T*>(p.logits) + row * p.row_stride;
  auto dz = static_cast<T*>(p.dlogits) + row * p.grad_stride;
  if (p.grad_entropy)
    grad_row<T, true>(z, dz, p.width, p.ids[row], g);
  else
    grad_row<T, false>(z, dz, p.width, p.ids[row], g);
}

SIMD_CLONES void grad_row_dispatch(const TokenLogprobGradParams& p, int64_t row) {
  TokenGrad g = token_grad(p, row);
  if (g.weight == 0.0f && g.entropy_weight == 0.0f) {
    memset(static_cast<char*>(p.dlogits) + row * p.grad_stride * dtype_size(p.dtype), 0, p.width * dtype_size(p.dtype));
    return;
  }
  if (p.dtype == DType::f32)
    grad_row_any<float>(p, row, g);
  else if (p.dtype == DType::bf16)
    grad_row_any<bf16>(p, row, g);
  else
    grad_row_any<f16>(p, row, g);
}

void check_ids(const int64_t* ids, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row)
    if (ids[row] < 0 || ids[row] >= width)
      fail("token_logprob: ids must be in [0, V=", width, "), got ", ids[row], " in row ", row,
           "; give rows without a token any valid id and gradient 0");
}

}  // namespace

void token_logprob_cpu(const TokenLogprobParams& p) {
  check_ids(p.ids, p.rows, p.width);
  float inverse_t = static_cast<float>(1.0 / p.temperature);
  parallel_for(p.rows, row_grain(p.width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const void* z = row_at(p.logits, p.dtype, row * p.row_stride);
      float max = row_max(z, p.dtype, p.width);
      RowSums sums = row_sums(z, p.dtype, p.width, max, inverse_t, min_p_threshold(p.min_p), nullptr, nullptr);
      float z_y = row_element(z, p.dtype, p.ids[row]);
      token_logprob_finish(p, row, sums, z_y, exp_row(row_distance(z_y, max, inverse_t)));
    }
  });
}

void token_logprob_backward_cpu(const TokenLogprobGradParams& p) {
  check_ids(p.ids, p.rows, p.width);
  parallel_for(p.rows, row_grain(p.width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) grad_row_dispatch(p, row);
  });
}

}  // namespace pymathrl
