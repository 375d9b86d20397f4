#include "common/row_softmax.h"

#include "common/simd.h"

namespace pymathrl {
namespace {

template <class In> HD float max_of(const In* z, int64_t width) {
  f32x16 m0 = splat(-kInf), m1 = m0;  // two chains: a maximum waits 2-4 cycles for the one before
  int64_t j = 0;
  for (; j + 2 * kLanes <= width; j += 2 * kLanes) {
    f32x16 a = load16(z + j), b = load16(z + j + kLanes);
    m0 = a > m0 ? a : m0;
    m1 = b > m1 ? b : m1;
  }
  for (; j < width; j += kLanes) {
    f32x16 a = j + kLanes <= width ? load16(z + j) : load_part(z + j, width - j, -kInf);
    m0 = a > m0 ? a : m0;
  }
  m0 = m1 > m0 ? m1 : m0;
  float max = -kInf;
  for (int lane = 0; lane < kLanes; ++lane) max = m0[lane] > max ? m0[lane] : max;
  return max;
}

struct BlockSums {
  f32x16 e = {}, ed = {}, d = {}, kept = {};

  HD void add(const BlockSums& part) {
    e += part.e;
    ed += part.ed;
    d += part.d;
    kept += part.kept;
  }

  HD void add(f32x16 x, f32x16 y, float threshold) {
    e += y;
    ed += y > 0.0f ? y * x : f32x16{};  // a masked token: 0 * -inf counts as 0
    d += x;
    kept += y >= threshold ? y : f32x16{};
  }
};

template <class In>
HD RowSums sums_of(const In* z, int64_t width, float max, float inverse_t, float threshold, float* block_sum,
               float* e) {
  RowSums s{max, 0, 0, 0, 0};
  for (int64_t begin = 0; begin < width; begin += kRowBlock) {
    int64_t end = begin + kRowBlock < width ? begin + kRowBlock : width, j = begin;
    BlockSums block;
    while (j < end) {
      int64_t stop = j + kRowPart < end ? j + kRowPart : end;
      BlockSums part;
      for (; j + kLanes <= stop; j += kLanes) {
        f32x16 x = row_distance(load16(z + j), max, inverse_t);
        f32x16 y = exp_row(x);
        if (e) store16(e + j, y);
        part.add(x, y, threshold);
      }
      if (j < stop) {
        i32x16 inside = first_lanes(stop - j);
        f32x16 x = row_distance(load_part(z + j, stop - j, 0.0f), max, inverse_t);
        f32x16 y = exp_row(x);
        if (e) store_part(e + j, stop - j, y);
        part.add(inside ? x : f32x16{}, inside ? y : f32x16{}, threshold);
        j = stop;
      }
      block.add(part);
    }
    float sum = sum_lanes(block.e);
    if (block_sum) block_sum[begin / kRowBlock] = sum;
    s.e += sum;
    s.ed += sum_lanes(block.ed);
    s.d += sum_lanes(block.d);
    s.kept += sum_lanes(block.kept);
  }
  return s;
}

}  // namespace

SIMD_CLONES float row_max(const void* row, DType dtype, int64_t width) {
  if (dtype == DType::f32) return max_of(static_cast<const float*>(row), width);
  if (dtype == DType::bf16) return max_of(static_cast<const bf16*>(row), width);
  return max_of(static_cast<const f16*>(row), width);
}

SIMD_CLONES RowSums row_sums(const void* row, DType dtype, int64_t width, float max, float inverse_t, float threshold,
                             float* block_sum, float* e) {
  if (dtype == DType::f32)
    return sums_of(static_cast<const float*>(row), width, max, inverse_t, threshold, block_sum, e);
  if (dtype == DType::bf16)
    return sums_of(static_cast<const bf16*>(row), width, max, inverse_t, threshold, block_sum, e);
  return sums_of(static_cast<const f16*>(row), width, max, inverse_t, threshold, block_sum, e);
}

}  // namespace pymathrl
