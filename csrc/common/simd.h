// Sixteen floats at a time (kLanes), in as many registers as the processor level of this translation unit needs: one of
// 512 bits, two of 256 or four of 128. The bits are the same in each. Written with the compiler's vector types, in the
// register's own width: gcc falls back to scalars for comparisons on wider ones (measured 10x slower on AVX2).
// For .cpp files only; everything is in a namespace of the level, so that no two levels share a symbol.
#pragma once
#include "common/half.h"

#ifndef PYMATHRL_LEVEL
#error "simd.h is for files that CMake compiles once per processor level, with -DPYMATHRL_LEVEL=base|v3|v4"
#endif

namespace pymathrl {
inline namespace PYMATHRL_LEVEL {

#if defined(__AVX512F__)
constexpr int kNative = 16;
#elif defined(__AVX2__)
constexpr int kNative = 8;
#else
constexpr int kNative = 4;
#endif
constexpr int kParts = kLanes / kNative;

typedef float native_f32 __attribute__((vector_size(kNative * 4)));
typedef uint32_t native_u32 __attribute__((vector_size(kNative * 4)));
typedef int32_t native_i32 __attribute__((vector_size(kNative * 4)));
typedef uint16_t native_u16 __attribute__((vector_size(kNative * 2)));

struct f32x16 {
  native_f32 part[kParts];
};
struct u32x16 {
  native_u32 part[kParts];
};
struct mask16 {  // -1 or 0 per lane
  native_i32 part[kParts];
};

HD f32x16 splat(float x) {
  f32x16 r;
  for (int i = 0; i < kParts; ++i) r.part[i] = x - native_f32{};  // x - 0 keeps the sign of zero, where x + 0 would not
  return r;
}
HD u32x16 splat(uint32_t x) {
  u32x16 r;
  for (int i = 0; i < kParts; ++i) r.part[i] = x + native_u32{};
  return r;
}

#define LANE_OPERATOR(T, S, R, op)                                     \
  HD R operator op(T a, T b) {                                         \
    R r;                                                               \
    for (int i = 0; i < kParts; ++i) r.part[i] = a.part[i] op b.part[i]; \
    return r;                                                          \
  }                                                                    \
  HD R operator op(T a, S b) { return a op splat(b); }
LANE_OPERATOR(f32x16, float, f32x16, +)
LANE_OPERATOR(f32x16, float, f32x16, -)
LANE_OPERATOR(f32x16, float, f32x16, *)
LANE_OPERATOR(f32x16, float, f32x16, /)
LANE_OPERATOR(f32x16, float, mask16, <)
LANE_OPERATOR(f32x16, float, mask16, >)
LANE_OPERATOR(f32x16, float, mask16, >=)
LANE_OPERATOR(f32x16, float, mask16, ==)
LANE_OPERATOR(u32x16, uint32_t, u32x16, +)
LANE_OPERATOR(u32x16, uint32_t, u32x16, -)
LANE_OPERATOR(u32x16, uint32_t, u32x16, &)
LANE_OPERATOR(u32x16, uint32_t, u32x16, |)
LANE_OPERATOR(u32x16, uint32_t, mask16, <)
LANE_OPERATOR(u32x16, uint32_t, mask16, >)
LANE_OPERATOR(u32x16, uint32_t, mask16, >=)
#undef LANE_OPERATOR

HD f32x16 operator/(float a, f32x16 b) { return splat(a) / b; }
HD u32x16 operator<<(u32x16 a, int bits) {
  for (int i = 0; i < kParts; ++i) a.part[i] <<= bits;
  return a;
}
HD u32x16 operator>>(u32x16 a, int bits) {
  for (int i = 0; i < kParts; ++i) a.part[i] >>= bits;
  return a;
}
HD f32x16 operator-(f32x16 a) {
  for (int i = 0; i < kParts; ++i) a.part[i] = -a.part[i];
  return a;
}
HD f32x16& operator+=(f32x16& a, f32x16 b) { return a = a + b; }

HD f32x16 pick(mask16 mask, f32x16 a, f32x16 b) {
  f32x16 r;
  for (int i = 0; i < kParts; ++i) r.part[i] = mask.part[i] ? a.part[i] : b.part[i];
  return r;
}
HD u32x16 pick(mask16 mask, u32x16 a, u32x16 b) {
  u32x16 r;
  for (int i = 0; i < kParts; ++i) r.part[i] = mask.part[i] ? a.part[i] : b.part[i];
  return r;
}
HD f32x16 pick(mask16 mask, float a, f32x16 b) { return pick(mask, splat(a), b); }
HD f32x16 pick(mask16 mask, f32x16 a, float b) { return pick(mask, a, splat(b)); }
HD u32x16 pick(mask16 mask, uint32_t a, u32x16 b) { return pick(mask, splat(a), b); }

HD u32x16 as_bits(f32x16 x) {
  u32x16 r;
  for (int i = 0; i < kParts; ++i) r.part[i] = (native_u32)x.part[i];
  return r;
}
HD f32x16 as_float(u32x16 bits) {
  f32x16 r;
  for (int i = 0; i < kParts; ++i) r.part[i] = (native_f32)bits.part[i];
  return r;
}

HD f32x16 load16(const float* p) {
  f32x16 x;  // register by register: one memcpy of all goes through the stack
  for (int i = 0; i < kParts; ++i) memcpy(&x.part[i], p + i * kNative, sizeof(native_f32));
  return x;
}
HD u32x16 load16_bits(const void* p) {
  u32x16 r;
  for (int i = 0; i < kParts; ++i) {
    native_u16 x;
    memcpy(&x, static_cast<const char*>(p) + i * sizeof x, sizeof x);
    r.part[i] = __builtin_convertvector(x, native_u32);
  }
  return r;
}
HD f32x16 load16(const bf16* p) { return bf16_to_f32<f32x16>(load16_bits(p)); }
HD f32x16 load16(const f16* p) { return f16_to_f32<f32x16>(load16_bits(p)); }

HD void store16(float* p, f32x16 x) {
  for (int i = 0; i < kParts; ++i) memcpy(p + i * kNative, &x.part[i], sizeof(native_f32));
}
HD void store16_bits(void* p, u32x16 bits) {
  for (int i = 0; i < kParts; ++i) {
    native_u16 x = __builtin_convertvector(bits.part[i], native_u16);
    memcpy(static_cast<char*>(p) + i * sizeof x, &x, sizeof x);
  }
}
HD void store16(bf16* p, f32x16 x) { store16_bits(p, f32_to_bf16<u32x16>(x)); }
HD void store16(f16* p, f32x16 x) { store16_bits(p, f32_to_f16<u32x16>(x)); }

// The last 1..15 elements of a row: lanes from `count` on hold `fill`.
template <class In> HD f32x16 load_part(const In* p, int64_t count, float fill) {
  float x[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = fill;
  for (int64_t lane = 0; lane < count; ++lane) x[lane] = to_f32(p[lane]);
  return load16(x);
}
template <class Out> HD void store_part(Out* p, int64_t count, f32x16 x) {
  float y[kLanes];
  store16(y, x);
  for (int64_t lane = 0; lane < count; ++lane) p[lane] = from_f32<Out>(y[lane]);
}

// Calls part(j, count) for each sixteen elements of a row; count < 16 at its end.
template <class Part> HD void for_parts(int64_t width, Part part) {
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) part(j, int64_t{kLanes});
  if (j < width) part(j, width - j);
}
HD f32x16 load_some(const float* p, int64_t count) { return count == kLanes ? load16(p) : load_part(p, count, 0.0f); }
HD void store_some(float* p, int64_t count, f32x16 x) {
  if (count == kLanes)
    store16(p, x);
  else
    store_part(p, count, x);
}

// True in the lanes below `count`.
HD mask16 first_lanes(int count) {
  mask16 mask;
  for (int i = 0; i < kParts; ++i) {
    native_i32 lane;
    for (int k = 0; k < kNative; ++k) lane[k] = i * kNative + k;
    mask.part[i] = lane < count;
  }
  return mask;
}

HD float sum_lanes(f32x16 x) {
  float lane[kLanes];
  store16(lane, x);
  return pymathrl::sum_lanes(static_cast<const float*>(lane));
}

}  // namespace PYMATHRL_LEVEL
}  // namespace pymathrl
