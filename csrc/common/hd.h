// Mathematics shared by the CPU and the CUDA twin of every op. Compiles as plain C++ and under nvcc.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define HD __host__ __device__ __forceinline__
#define UNROLL _Pragma("unroll")  // before a loop over an array that must stay in registers
#else
#define HD inline __attribute__((always_inline))
#define UNROLL
#endif

// Row kernels are compiled once per x86-64 level and chosen when the module loads: one wheel runs everywhere. The
// levels give the same bits, because the lane count of a reduction is fixed in the code (kLanes), never by the register.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#define SIMD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SIMD_CLONES
#endif

namespace pymathrl {

constexpr float kInf = __builtin_huge_valf();

HD float bits_float(int32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// e^x in fp32 within 1.5 ulp on [-87.3, 88.7]; 0 below, inf above, nan stays nan. Branch-free, so that gcc vectorises
// loops over it (libm's expf does not without -ffast-math). x = n ln2 + r, |r| <= ln2/2; Taylor polynomial of degree 7
// (its first dropped term is 2e-9); 2^n is applied in two halves so that results near the subnormals stay right.
HD float exp_f32(float x) {
  float clamped = x < -104.0f ? -104.0f : (x > 89.0f ? 89.0f : x);  // keeps n in int range; nan compares false
  float n = (clamped * 1.44269504f + 12582912.0f) - 12582912.0f;    // 1.5 * 2^23: rounds to the nearest integer
  float r = (clamped - n * 0.693145752f) - n * 1.42860677e-6f;      // ln2 split in two; the first product is exact
  float p = 1.98412698e-4f;
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  int32_t i = static_cast<int32_t>(n != n ? 0.0f : n);
  int32_t half = i >> 1;
  float y = p * bits_float((half + 127) << 23) * bits_float((i - half + 127) << 23);
  y = x < -103.98f ? 0.0f : y;
  y = x > 88.7228394f ? kInf : y;
  return x != x ? x : y;
}

HD float clamp_f32(float x, float lo, float hi) { return x < lo ? lo : (x > hi ? hi : x); }

// Reductions over a row use kLanes partial sums (element j goes to lane j % kLanes), then this fixed pairwise tree.
constexpr int kLanes = 16;

HD float sum_lanes(const float* lane) {
  float a[kLanes / 2], b[kLanes / 4];
  for (int i = 0; i < 8; ++i) a[i] = lane[i] + lane[i + 8];
  for (int i = 0; i < 4; ++i) b[i] = a[i] + a[i + 4];
  return (b[0] + b[2]) + (b[1] + b[3]);
}

}  // namespace pymathrl
