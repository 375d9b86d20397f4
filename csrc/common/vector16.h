// Sixteen floats (kLanes) as one value of the compiler's vector type, for kernels that shuffle lanes: SIMD_CLONES gives
// each processor level its copy, with the same bits. For .cpp files only. Rows of logits use simd.h instead, whose types
// are as wide as the registers of a level.
#pragma once
#include "common/row_softmax.h"

namespace pymathrl {

typedef float f32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
static_assert(sizeof(f32x16) == kLanes * sizeof(float));

HD f32x16 splat(float x) { return x - f32x16{}; }  // x - 0 keeps the sign of zero, where x + 0 would not

HD f32x16 load16(const float* p) {
  f32x16 x;
  memcpy(&x, p, sizeof x);
  return x;
}
HD void store16(float* p, f32x16 x) { memcpy(p, &x, sizeof x); }

// The last 1..15 elements of a row: lanes from `count` on hold 0.
HD f32x16 load_part(const float* p, int64_t count) {
  f32x16 x = {};
  memcpy(&x, p, count * sizeof(float));
  return x;
}
HD void store_part(float* p, int64_t count, f32x16 x) { memcpy(p, &x, count * sizeof(float)); }

// -1 in the lanes below `count`, 0 above.
HD i32x16 first_lanes(int64_t count) {
  const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return lane < static_cast<int32_t>(count);
}

HD float sum_lanes(f32x16 x) {
  float lane[kLanes];
  memcpy(lane, &x, sizeof x);
  return sum_lanes(lane);
}

// exp_row of row_softmax.h, operation by operation.
HD f32x16 exp_lanes(f32x16 x) {
  f32x16 clamped = x < -87.0f ? splat(-87.0f) : x;
  f32x16 t = clamped * 1.44269504f + 12582912.0f;
  f32x16 n = t - 12582912.0f;
  f32x16 r = (clamped - n * 0.693145752f) - n * 1.42860677e-6f;
  f32x16 p = r * 1.38145394e-3f + 8.36874545e-3f;
  p = p * r + 4.16683890e-2f;
  p = p * r + 1.66665211e-1f;
  p = p * r + 4.99999940e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  f32x16 y = p * (f32x16)(((u32x16)t + 127u) << 23);
  return x < -87.0f ? f32x16{} : y;
}

}  // namespace pymathrl
