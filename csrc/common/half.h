// bfloat16 and float16 as bit patterns, and their conversions, written once for a float and for a vector of sixteen
// (F = float or f32x16 of simd.h, U = its unsigned twin): round to nearest even, nan stays nan, subnormals are kept.
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

// One lane's meaning of the choice that simd.h gives for sixteen.
HD float pick(bool condition, float a, float b) { return condition ? a : b; }
HD uint32_t pick(bool condition, uint32_t a, uint32_t b) { return condition ? a : b; }

// U holds the 16 bits of the number in its low half.
template <class F, class U> HD F bf16_to_f32(U h) { return as_float(h << 16); }

template <class F, class U> HD F f16_to_f32(U h) {
  U sign = (h & 0x8000u) << 16, magnitude = (h & 0x7fffu) << 13;
  F scaled = as_float(magnitude) * 5.192296858534828e33f;  // 2^112: the exponent's bias, exact for subnormals too
  U bits = pick(magnitude >= 0x0f800000u, magnitude | 0x7f800000u, as_bits(scaled));  // inf and nan
  return as_float(sign | bits);
}

template <class U, class F> HD U f32_to_bf16(F x) {
  U bits = as_bits(x);
  U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return pick((bits & 0x7fffffffu) > 0x7f800000u, (bits >> 16) | 0x40u, rounded);
}

template <class U, class F> HD U f32_to_f16(F x) {
  U bits = as_bits(x);
  U sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  U normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  U small = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;  // below 2^-14: the addition rounds at 2^-24
  U result = pick(magnitude < 0x38800000u, small, normal);
  result = pick(magnitude >= 0x47800000u, 0x7c00u, result);  // 65536 and more, inf
  result = pick(magnitude > 0x7f800000u, 0x7e00u, result);   // nan
  return sign | result;
}

HD float to_f32(float x) { return x; }
HD float to_f32(bf16 x) { return bf16_to_f32<float>(static_cast<uint32_t>(x.bits)); }
HD float to_f32(f16 x) { return f16_to_f32<float>(static_cast<uint32_t>(x.bits)); }

template <class T> HD T from_f32(float x);
template <> HD float from_f32<float>(float x) { return x; }
template <> HD bf16 from_f32<bf16>(float x) { return {static_cast<uint16_t>(f32_to_bf16<uint32_t>(x))}; }
template <> HD f16 from_f32<f16>(float x) { return {static_cast<uint16_t>(f32_to_f16<uint32_t>(x))}; }

}  // namespace pymathrl
