// bfloat16 and float16 as bit patterns, and their conversions, written once for a float and for a vector of sixteen
// (F = float or f32x16, U = its unsigned twin): round to nearest even, nan stays nan, subnormals are kept.
#pragma once
#include "common/hd.h"

namespace pymathrl {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

HD uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
HD float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

#ifndef __CUDACC__
// Sixteen at a time with the compiler's vector type: one zmm, two ymm or four xmm registers, whatever the clone has, and
// the same bits in each. See simd.h.
typedef float f32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
HD u32x16 as_bits(f32x16 x) { return (u32x16)x; }
HD f32x16 as_float(u32x16 bits) { return (f32x16)bits; }
#endif

// U holds the 16 bits of the number in its low half.
template <class U> HD auto bf16_to_f32(U h) { return as_float(h << 16); }

template <class U> HD auto f16_to_f32(U h) {
  U sign = (h & 0x8000u) << 16, magnitude = (h & 0x7fffu) << 13;
  auto scaled = as_float(magnitude) * 5.192296858534828e33f;  // 2^112: the exponent's bias, exact for subnormals too
  U bits = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : as_bits(scaled);  // inf and nan
  return as_float(sign | bits);
}

template <class F> HD auto f32_to_bf16(F x) {
  auto bits = as_bits(x);
  auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? ((bits >> 16) | 0x40u) : rounded;
}

template <class F> HD auto f32_to_f16(F x) {
  auto bits = as_bits(x);
  auto sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  auto normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  auto small = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;  // below 2^-14: the addition rounds at 2^-24
  auto result = magnitude < 0x38800000u ? small : normal;
  result = magnitude >= 0x47800000u ? 0x7c00u + 0u * magnitude : result;  // 65536 and more, inf
  result = magnitude > 0x7f800000u ? 0x7e00u + 0u * magnitude : result;   // nan
  return sign | result;
}

HD float to_f32(float x) { return x; }
HD float to_f32(bf16 x) { return bf16_to_f32(static_cast<uint32_t>(x.bits)); }
HD float to_f32(f16 x) { return f16_to_f32(static_cast<uint32_t>(x.bits)); }

template <class T> HD T from_f32(float x);
template <> HD float from_f32<float>(float x) { return x; }
template <> HD bf16 from_f32<bf16>(float x) { return {static_cast<uint16_t>(f32_to_bf16(x))}; }
template <> HD f16 from_f32<f16>(float x) { return {static_cast<uint16_t>(f32_to_f16(x))}; }

}  // namespace pymathrl
