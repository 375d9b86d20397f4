// Loads, stores and sums of sixteen floats (kLanes). For .cpp files only: nvcc does not know the vector types.
#pragma once
#include "common/half.h"

namespace pymathrl {

typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
static_assert(sizeof(f32x16) == kLanes * sizeof(float));

HD f32x16 splat(float x) { return x - f32x16{}; }  // x - 0 keeps the sign of zero, where x + 0 would not

HD f32x16 load16(const float* p) {
  f32x16 x;
  memcpy(&x, p, sizeof x);
  return x;
}
HD u32x16 load16_bits(const void* p) {
  u16x16 x;
  memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, u32x16);
}
HD f32x16 load16(const bf16* p) { return bf16_to_f32(load16_bits(p)); }
HD f32x16 load16(const f16* p) { return f16_to_f32(load16_bits(p)); }

HD void store16(float* p, f32x16 x) { memcpy(p, &x, sizeof x); }
HD void store16_bits(void* p, u32x16 bits) {
  u16x16 x = __builtin_convertvector(bits, u16x16);
  memcpy(p, &x, sizeof x);
}
HD void store16(bf16* p, f32x16 x) { store16_bits(p, f32_to_bf16(x)); }
HD void store16(f16* p, f32x16 x) { store16_bits(p, f32_to_f16(x)); }

// The last 1..15 elements of a row: lanes from `count` on hold `fill`.
template <class In> HD f32x16 load_part(const In* p, int64_t count, float fill) {
  f32x16 x = splat(fill);
  for (int64_t lane = 0; lane < count; ++lane) x[lane] = to_f32(p[lane]);
  return x;
}
template <class Out> HD void store_part(Out* p, int64_t count, f32x16 x) {
  for (int64_t lane = 0; lane < count; ++lane) p[lane] = from_f32<Out>(x[lane]);
}
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

}  // namespace pymathrl
