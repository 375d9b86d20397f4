// The CUDA side of row_softmax.h: a team of threads (one warp, or a whole block) sweeps one row once, in 128-bit loads,
// with a running maximum. Which thread adds which elements, and in which order, follows from the row's width alone: not
// from other rows, and not from the pointer's alignment.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "common/cuda.cuh"
#include "common/row_softmax.h"

namespace pymathrl {

constexpr int kVec = 8;     // elements of one load: 16 bytes of bf16, twice 16 bytes of fp32
constexpr int kUnroll = 4;  // loads in flight per thread
constexpr float kLog2E = 1.44269504f;
constexpr double kLn2 = 0.693147180559945309;

// 2^x by the hardware, within 2 ulp; 0 below -126. fp32 has 16 of these units per SM and cycle: enough for bf16 rows at
// full bandwidth, where the polynomial of exp_row would cost more instructions than there are per byte.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// e of one logit, as the sums below compute it. scale = log2(e) / T.
__device__ __forceinline__ float row_exp2(float z, float max, float scale) { return exp2_fast((z - max) * scale); }

__device__ __forceinline__ void unpack(float4 a, float4 b, float* x) {
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}
__device__ __forceinline__ void load8(const float* p, float* x) {
  auto v = reinterpret_cast<const float4*>(p);
  unpack(v[0], v[1], x);
}
__device__ __forceinline__ void load8(const bf16* p, float* x) {
  uint4 v = *reinterpret_cast<const uint4*>(p);
  uint32_t word[4] = {v.x, v.y, v.z, v.w};
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(word[i] << 16);
    x[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
  }
}
__device__ __forceinline__ void load8(const f16* p, float* x) {
  uint4 v = *reinterpret_cast<const uint4*>(p);
  uint32_t word[4] = {v.x, v.y, v.z, v.w};
  for (int i = 0; i < 4; ++i) {
    __half2 h;
    memcpy(&h, &word[i], sizeof h);
    float2 f = __half22float2(h);
    x[2 * i] = f.x, x[2 * i + 1] = f.y;
  }
}
__device__ __forceinline__ void store8(float* p, const float* x) {
  auto v = reinterpret_cast<float4*>(p);
  v[0] = make_float4(x[0], x[1], x[2], x[3]);
  v[1] = make_float4(x[4], x[5], x[6], x[7]);
}
__device__ __forceinline__ void store8(bf16* p, const float* x) {
  uint32_t word[4];
  for (int i = 0; i < 4; ++i) {
    __nv_bfloat162 h = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
    memcpy(&word[i], &h, sizeof h);
  }
  *reinterpret_cast<uint4*>(p) = make_uint4(word[0], word[1], word[2], word[3]);
}
__device__ __forceinline__ void store8(f16* p, const float* x) {
  uint32_t word[4];
  for (int i = 0; i < 4; ++i) {
    __half2 h = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
    memcpy(&word[i], &h, sizeof h);
  }
  *reinterpret_cast<uint4*>(p) = make_uint4(word[0], word[1], word[2], word[3]);
}

// Eight elements from j on, of which `count` exist; the rest become `fill`.
template <class T>
__device__ __forceinline__ void load_vec(const T* p, int count, bool aligned, float fill, float* x) {
  if (aligned && count >= kVec) return load8(p, x);
#pragma unroll
  for (int i = 0; i < kVec; ++i) x[i] = i < count ? to_f32(p[i]) : fill;
}
template <class T> __device__ __forceinline__ void store_vec(T* p, int count, bool aligned, const float* x) {
  if (aligned && count >= kVec) return store8(p, x);
#pragma unroll
  for (int i = 0; i < kVec; ++i)
    if (i < count) p[i] = from_f32<T>(x[i]);
}

// True where 128-bit accesses to every row are allowed.
inline bool rows_aligned(const void* data, int64_t row_stride, DType dtype) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_stride * dtype_size(dtype) % 16 == 0;
}

// How many of the eight elements from j on exist (0..8).
__device__ __forceinline__ int vec_count(int64_t j, int64_t width) {
  int64_t left = width - j;
  return left >= kVec ? kVec : (left > 0 ? static_cast<int>(left) : 0);
}

// Reduces K values over the team; every thread gets the result. Where the team is the block, all of its threads must
// call it, and `shared` holds K*32 values; where it is a warp (team = 32), `shared` is not touched.
template <int K, class V, class Op>
__device__ __forceinline__ void team_reduce(V (&value)[K], V identity, V* shared, Op op, int team) {
#pragma unroll
  for (int k = 0; k < K; ++k)
    for (int offset = 16; offset > 0; offset >>= 1)
      value[k] = op(value[k], __shfl_xor_sync(0xffffffffu, value[k], offset));
  if (team == 32) return;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  __syncthreads();  // the readers of an earlier reduction are done with `shared`
  if (lane == 0)
    for (int k = 0; k < K; ++k) shared[k * 32 + warp] = value[k];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) {  // each warp adds the warps' values up for itself, all in the same order
    value[k] = lane < team / 32 ? shared[k * 32 + lane] : identity;
    for (int offset = 16; offset > 0; offset >>= 1)
      value[k] = op(value[k], __shfl_xor_sync(0xffffffffu, value[k], offset));
  }
}

// The running sums of one thread, measured from its own running maximum; x in units of log2.
struct OnlineSums {
  float max = -kInf, e = 0, ex = 0, z = 0;

  __device__ __forceinline__ void raise(float candidate, float scale) {
    if (!(candidate > max)) return;
    if (max != -kInf) {  // else nothing but masked tokens so far: their sums are 0 (or nan, which must stay)
      float shift = (max - candidate) * scale, factor = exp2_fast(shift);
      ex = factor * (ex + shift * e);
      e *= factor;
    }
    max = candidate;
  }

  __device__ __forceinline__ void add(float value, float base, float scale) {
    float x = (value - base) * scale, y = exp2_fast(x);
    e += y;
    ex += y > 0.0f ? y * x : 0.0f;  // a masked token: 0 * -inf counts as 0
    z += value;
  }

  __device__ __forceinline__ float base() const { return max == -kInf ? 0.0f : max; }  // -inf - -inf would be nan
};

struct WholeRow {
  __device__ __forceinline__ float operator()(float z, int64_t) const { return z; }
};

// The sums of one row, on every thread of the team. shared: 3*32 floats (unused by a warp). logit(z, j): what counts as
// the logit of token j, so that a row which a filter masks gives the bits of the same row with -inf stored in it.
template <class T, int kTeam, class Logit = WholeRow>
__device__ RowSums team_row_sums(const T* row, int64_t width, bool aligned, float inverse_t, int thread, float* shared,
                                 const Logit& logit = Logit()) {
  const float scale = inverse_t * kLog2E;
  const int64_t step = static_cast<int64_t>(kTeam) * kVec;
  OnlineSums own;
  int64_t j = static_cast<int64_t>(thread) * kVec;
  for (; j + (kUnroll - 1) * step + kVec <= width; j += kUnroll * step) {
    float x[kUnroll][kVec];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) load_vec(row + j + u * step, kVec, aligned, 0.0f, x[u]);
    float top = -kInf;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        x[u][i] = logit(x[u][i], j + u * step + i);
        top = fmaxf(top, x[u][i]);
      }
    own.raise(top, scale);
    float base = own.base();
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int i = 0; i < kVec; ++i) own.add(x[u][i], base, scale);
  }
  for (; j < width; j += step) {
    int count = vec_count(j, width);
    float x[kVec], top = -kInf;
    load_vec(row + j, count, aligned, -kInf, x);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      x[i] = logit(x[i], j + i);
      top = fmaxf(top, x[i]);
    }
    own.raise(top, scale);
    float base = own.base();
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      if (i < count) own.add(x[i], base, scale);
  }
  float max[1] = {own.max};
  team_reduce(max, -kInf, shared, Max(), kTeam);
  own.raise(max[0], scale);
  float sums[3] = {own.e, own.ex, own.z};
  team_reduce(sums, 0.0f, shared, Add(), kTeam);
  int64_t count = width;
  if (sums[2] == -kInf) {  // on all threads alike: some logit is -inf. Sweep again for the sum over the others
    float reach[2] = {0.0f, 0.0f};  // sum of z, number of tokens: exact below 2^24
    for (j = static_cast<int64_t>(thread) * kVec; j < width; j += step) {
      float x[kVec];
      load_vec(row + j, vec_count(j, width), aligned, -kInf, x);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const float z = logit(x[i], j + i);
        reach[0] += z > -kInf ? z : 0.0f;
        reach[1] += z > -kInf ? 1.0f : 0.0f;
      }
    }
    team_reduce(reach, 0.0f, shared, Add(), kTeam);
    sums[2] = reach[0];
    count = static_cast<int64_t>(reach[1]);
  }
  RowSums s;
  s.max = max[0];
  s.e = sums[0];
  s.ed = sums[1] * kLn2;
  s.d = (sums[2] - static_cast<double>(count) * s.max) * inverse_t;
  s.kept = 0;
  s.count = count;
  return s;
}

// The team's size by the row's width: the same for any number of rows, so that a row's bits do not depend on it.
constexpr int64_t kWarpWidth = 1024, kSmallWidth = 8192;
constexpr int kSmallTeam = 128, kLargeTeam = 512, kWarpsPerBlock = 4;

template <class Launch> void with_team(int64_t width, const Launch& launch) {
  if (width <= kWarpWidth)
    launch(std::integral_constant<int, 32>());
  else if (width <= kSmallWidth)
    launch(std::integral_constant<int, kSmallTeam>());
  else
    launch(std::integral_constant<int, kLargeTeam>());
}

template <class Launch> void with_activations(DType dtype, const Launch& launch) {
  if (dtype == DType::f32)
    launch(float());
  else
    launch(bf16());
}
template <class Launch> void with_logits(DType dtype, const Launch& launch) {
  if (dtype == DType::f32)
    launch(float());
  else if (dtype == DType::bf16)
    launch(bf16());
  else
    launch(f16());
}

// Blocks and threads for one team per row; kernels stride over rows by team_rows_step(), so any number of rows fits.
template <int kTeam> dim3 team_grid(int64_t rows) {
  int64_t blocks = kTeam == 32 ? (rows + kWarpsPerBlock - 1) / kWarpsPerBlock : rows;
  return dim3(static_cast<unsigned>(blocks < (1 << 30) ? blocks : (1 << 30)));
}
template <int kTeam> constexpr int team_threads() { return kTeam == 32 ? 32 * kWarpsPerBlock : kTeam; }
template <int kTeam> __device__ __forceinline__ int64_t team_first_row() {
  return kTeam == 32 ? static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + (threadIdx.x >> 5) : blockIdx.x;
}
template <int kTeam> __device__ __forceinline__ int64_t team_rows_step() {
  return static_cast<int64_t>(gridDim.x) * (kTeam == 32 ? kWarpsPerBlock : 1);
}
template <int kTeam> __device__ __forceinline__ int team_thread() {
  return kTeam == 32 ? threadIdx.x & 31 : threadIdx.x;
}

}  // namespace pymathrl
