#include "attention.h"
#include "common/cuda.cuh"

namespace pymathrl {
namespace {

// One warp per query (or key); a lane holds every 32nd element of a head. Simple rather than fast: on a GPU the models
// of this package train through torch's fused attention, and these kernels are the same mathematics in fp32.
constexpr int kWarps = 4, kParts = kMaxHead / 32;

__device__ __forceinline__ float warp_sum(float x) {
  for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

struct Head {  // one head, spread over the lanes of a warp; elements from E on are 0
  float x[kParts];

  __device__ void clear() {
    for (int t = 0; t < kParts; ++t) x[t] = 0.0f;
  }
  __device__ void load(const float* from, int64_t head_dim) {
    for (int t = 0; t < kParts; ++t) {
      int e = threadIdx.x + 32 * t;
      x[t] = e < head_dim ? from[e] : 0.0f;
    }
  }
  __device__ void load_rotated(const float* from, const float* angle, int64_t head_dim, float scale) {
    for (int t = 0; t < kParts; ++t) {
      int e = threadIdx.x + 32 * t;
      x[t] = e < head_dim ? rotate_element(from, angle, e, 1.0f) * scale : 0.0f;
    }
  }
  __device__ void store(float* to, int64_t head_dim, float factor) const {
    for (int t = 0; t < kParts; ++t) {
      int e = threadIdx.x + 32 * t;
      if (e < head_dim) to[e] = x[t] * factor;
    }
  }
  // The neighbour of an element's pair is in the lane beside it.
  __device__ void store_rotated_back(float* to, const float* angle, int64_t head_dim, float factor) const {
    for (int t = 0; t < kParts; ++t) {
      int e = threadIdx.x + 32 * t;
      float other = __shfl_xor_sync(0xffffffffu, x[t], 1);
      float pair[2] = {e & 1 ? other : x[t], e & 1 ? x[t] : other};
      if (e < head_dim) to[e] = rotate_element(pair, angle + (e & ~1), e & 1, -1.0f) * factor;
    }
  }
  __device__ float dot(const Head& other) const {
    float sum = 0.0f;
    for (int t = 0; t < kParts; ++t) sum += x[t] * other.x[t];
    return warp_sum(sum);
  }
  __device__ void add(float weight, const Head& other) {
    for (int t = 0; t < kParts; ++t) x[t] += weight * other.x[t];
  }
};

struct OnlineSoftmax {
  Head sum;
  float max = -kInf, total = 0.0f;

  __device__ void add(float score, const Head& value) {
    float before = max;
    max = score > max ? score : max;
    float factor = exp_row(before - max), prob = exp_row(score - max);
    total = total * factor + prob;
    for (int t = 0; t < kParts; ++t) sum.x[t] = sum.x[t] * factor + prob * value.x[t];
  }
};

__device__ int64_t warp_index() { return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y; }

// Warp n -> row, head, position (negative in the padding). False: none.
__device__ bool locate(const AttentionParams& p, int64_t heads, int64_t& b, int64_t& head, int64_t& at) {
  int64_t n = warp_index();
  if (n >= p.rows * heads * p.columns) return false;
  b = n / (heads * p.columns);
  head = n / p.columns % heads;
  at = n % p.columns - (p.pad ? p.pad[b] : 0);
  return true;
}

__global__ void keys_kernel(AttentionParams p) {
  int64_t b, c, j;
  if (!locate(p, p.kv_heads, b, c, j)) return;
  AttentionRow row(p, b);
  Head k;
  k.clear();
  if (j >= 0) k.load_rotated(p.qkv + row.k(c, j), row.angle(j), p.head_dim, 1.0f);
  k.store(p.keys + row.key(c, j), p.head_dim, 1.0f);
}

__global__ void forward_kernel(AttentionParams p) {
  int64_t b, h, i;
  if (!locate(p, p.heads, b, h, i)) return;
  AttentionRow row(p, b);
  const int64_t c = h / (p.heads / p.kv_heads);
  OnlineSoftmax softmax;
  softmax.sum.clear();
  float factor = 0.0f, lse = 0.0f;
  if (i >= 0) {
    Head q, k, v;
    q.load_rotated(p.qkv + row.q(h, i), row.angle(i), p.head_dim, p.scale);
    for (int64_t j = 0; j <= i; ++j) {
      k.load(p.keys + row.key(c, j), p.head_dim);
      v.load(p.qkv + row.v(c, j), p.head_dim);
      softmax.add(q.dot(k), v);
    }
    factor = 1.0f / softmax.total;
    lse = softmax.max + logf(softmax.total);
  }
  softmax.sum.store(p.out + row.out(h, i), p.head_dim, factor);
  if (threadIdx.x == 0) p.lse[row.lse(h, i)] = lse;
}

__device__ float score_gradient(float prob, const Head& dout, const Head& value, float delta) {
  return prob * (dout.dot(value) - delta);
}

__global__ void backward_queries_kernel(AttentionParams p) {
  int64_t b, h, i;
  if (!locate(p, p.heads, b, h, i)) return;
  AttentionRow row(p, b);
  const int64_t c = h / (p.heads / p.kv_heads);
  Head dq;
  dq.clear();
  if (i < 0) return dq.store(p.dqkv + row.q(h, i), p.head_dim, 0.0f);
  Head q, dout, out, k, v;
  q.load_rotated(p.qkv + row.q(h, i), row.angle(i), p.head_dim, p.scale);
  dout.load(p.dout + row.out(h, i), p.head_dim);
  out.load(p.out + row.out(h, i), p.head_dim);
  const float delta = dout.dot(out), lse = p.lse[row.lse(h, i)];
  for (int64_t j = 0; j <= i; ++j) {
    k.load(p.keys + row.key(c, j), p.head_dim);
    v.load(p.qkv + row.v(c, j), p.head_dim);
    dq.add(score_gradient(exp_row(q.dot(k) - lse), dout, v, delta), k);
  }
  dq.store_rotated_back(p.dqkv + row.q(h, i), row.angle(i), p.head_dim, p.scale);
}

__global__ void backward_keys_kernel(AttentionParams p) {
  int64_t b, c, j;
  if (!locate(p, p.kv_heads, b, c, j)) return;
  AttentionRow row(p, b);
  Head dk, dv;
  dk.clear();
  dv.clear();
  if (j < 0) {
    dk.store(p.dqkv + row.k(c, j), p.head_dim, 0.0f);
    return dv.store(p.dqkv + row.v(c, j), p.head_dim, 0.0f);
  }
  const int64_t group = p.heads / p.kv_heads;
  Head q, dout, out, k, v;
  k.load(p.keys + row.key(c, j), p.head_dim);
  v.load(p.qkv + row.v(c, j), p.head_dim);
  for (int64_t i = j; i < row.count; ++i)
    for (int64_t h = c * group; h < (c + 1) * group; ++h) {
      q.load_rotated(p.qkv + row.q(h, i), row.angle(i), p.head_dim, p.scale);
      dout.load(p.dout + row.out(h, i), p.head_dim);
      out.load(p.out + row.out(h, i), p.head_dim);
      const float prob = exp_row(q.dot(k) - p.lse[row.lse(h, i)]);
      dv.add(prob, dout);
      dk.add(score_gradient(prob, dout, v, dout.dot(out)), q);
    }
  dk.store_rotated_back(p.dqkv + row.k(c, j), row.angle(j), p.head_dim, 1.0f);
  dv.store(p.dqkv + row.v(c, j), p.head_dim, 1.0f);
}

__global__ void decode_write_kernel(DecodeAttentionParams p) {
  int64_t n = warp_index();
  if (n >= p.rows * p.kv_heads) return;
  const int64_t b = n / p.kv_heads, c = n % p.kv_heads;
  const float* qkv = p.qkv + b * (p.heads + 2 * p.kv_heads) * p.head_dim;
  float* keys = p.cache + (n * p.capacity + p.column) * p.head_dim;
  Head x;
  x.load_rotated(qkv + (p.heads + c) * p.head_dim, p.angle + (p.column - p.pad[b]) * p.head_dim, p.head_dim, 1.0f);
  x.store(keys, p.head_dim, 1.0f);
  x.load(qkv + (p.heads + p.kv_heads + c) * p.head_dim, p.head_dim);
  x.store(keys + p.rows * p.kv_heads * p.capacity * p.head_dim, p.head_dim, 1.0f);
}

__global__ void decode_kernel(DecodeAttentionParams p) {
  int64_t n = warp_index();
  if (n >= p.rows * p.heads) return;
  const int64_t b = n / p.heads, h = n % p.heads, c = h / (p.heads / p.kv_heads);
  const float* keys = p.cache + (b * p.kv_heads + c) * p.capacity * p.head_dim;
  const float* values = keys + p.rows * p.kv_heads * p.capacity * p.head_dim;
  Head q, k, v;
  q.load_rotated(p.qkv + (b * (p.heads + 2 * p.kv_heads) + h) * p.head_dim,
                 p.angle + (p.column - p.pad[b]) * p.head_dim, p.head_dim, p.scale);
  OnlineSoftmax softmax;
  softmax.sum.clear();
  for (int64_t j = p.pad[b]; j <= p.column; ++j) {
    k.load(keys + j * p.head_dim, p.head_dim);
    v.load(values + j * p.head_dim, p.head_dim);
    softmax.add(q.dot(k), v);
  }
  softmax.sum.store(p.out + n * p.head_dim, p.head_dim, 1.0f / softmax.total);
}

const dim3 kThreads(32, kWarps);
unsigned blocks(int64_t warps) { return static_cast<unsigned>((warps + kWarps - 1) / kWarps); }

}  // namespace

void attention_cuda(const AttentionParams& p, int device, void* stream) {
  if (p.rows * p.columns == 0) return;
  DeviceGuard guard(device, "attention");
  auto queue = static_cast<cudaStream_t>(stream);
  keys_kernel<<<blocks(p.rows * p.kv_heads * p.columns), kThreads, 0, queue>>>(p);
  forward_kernel<<<blocks(p.rows * p.heads * p.columns), kThreads, 0, queue>>>(p);
  check_cuda(cudaGetLastError(), "attention");
}

void attention_backward_cuda(const AttentionParams& p, int device, void* stream) {
  if (p.rows * p.columns == 0) return;
  DeviceGuard guard(device, "attention_backward");
  auto queue = static_cast<cudaStream_t>(stream);
  backward_queries_kernel<<<blocks(p.rows * p.heads * p.columns), kThreads, 0, queue>>>(p);
  backward_keys_kernel<<<blocks(p.rows * p.kv_heads * p.columns), kThreads, 0, queue>>>(p);
  check_cuda(cudaGetLastError(), "attention_backward");
}

void decode_attention_cuda(const DecodeAttentionParams& p, int device, void* stream) {
  if (p.rows == 0) return;
  DeviceGuard guard(device, "decode_attention");
  auto queue = static_cast<cudaStream_t>(stream);
  decode_write_kernel<<<blocks(p.rows * p.kv_heads), kThreads, 0, queue>>>(p);
  decode_kernel<<<blocks(p.rows * p.heads), kThreads, 0, queue>>>(p);
  check_cuda(cudaGetLastError(), "decode_attention");
}

}  // namespace pymathrl
