// Sixteen vectors of sixteen, transposed in registers.
#pragma once
#include "common/simd.h"

namespace pymathrl {
inline namespace PYMATHRL_LEVEL {

template <int kStep> HD void swap_blocks(native_f32& a, native_f32& b) {
  native_i32 low, high;
  for (int lane = 0; lane < kNative; ++lane) {
    low[lane] = lane & kStep ? kNative + lane - kStep : lane;
    high[lane] = lane & kStep ? kNative + lane : lane + kStep;
  }
  native_f32 first = __builtin_shuffle(a, b, low);
  b = __builtin_shuffle(a, b, high);
  a = first;
}
template <int kStep> HD void transpose_steps(native_f32* x) {
#pragma GCC unroll 16
  for (int i = 0; i < kNative; ++i)
    if (!(i & kStep)) swap_blocks<kStep>(x[i], x[i + kStep]);
  if constexpr (kStep > 1) transpose_steps<kStep / 2>(x);
}

// x[i] lane j <-> x[j] lane i, in squares of a register's width. Not inlined: a copy is hundreds of instructions.
inline __attribute__((noinline)) void transpose(f32x16* x) {
  for (int i = 0; i < kParts; ++i)
    for (int j = 0; j <= i; ++j) {
      native_f32 a[kNative], b[kNative];
#pragma GCC unroll 16
      for (int r = 0; r < kNative; ++r) a[r] = x[i * kNative + r].part[j], b[r] = x[j * kNative + r].part[i];
      transpose_steps<kNative / 2>(a);
      if (i != j) {
        transpose_steps<kNative / 2>(b);
#pragma GCC unroll 16
        for (int r = 0; r < kNative; ++r) x[i * kNative + r].part[j] = b[r];
      }
#pragma GCC unroll 16
      for (int r = 0; r < kNative; ++r) x[j * kNative + r].part[i] = a[r];
    }
}

}  // namespace PYMATHRL_LEVEL
}  // namespace pymathrl
