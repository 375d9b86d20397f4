#include "attention.h"
#include "common/cuda.cuh"

namespace pymathrl {
namespace {

// A head is spread over the lanes of a warp: lane l holds elements l, l + 32, ... (kParts of them), zeros from E on.
// Training takes one warp per query (or key); generation one block per row and key/value head. T: float or bf16; all
// sums are fp32.
constexpr int kWarps = 4;
constexpr int kGroup = 4;  // query heads that a block of generation takes together
constexpr unsigned kAll = 0xffffffffu;

__device__ __forceinline__ float warp_sum(float x) {
  for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(kAll, x, offset);
  return x;
}

template <class T, int kParts> struct Head {
  float x[kParts];

  __device__ void clear() {
    for (int t = 0; t < kParts; ++t) x[t] = 0.0f;
  }
  __device__ void load(const T* from, int64_t head_dim) {
    for (int t = 0; t < kParts; ++t) {
      int e = threadIdx.x + 32 * t;
      x[t] = e < head_dim ? to_f32(from[e]) : 0.0f;
    }
  }
  __device__ void store(T* to, int64_t head_dim, float factor) const {
    for (int t = 0; t < kParts; ++t) {
      int e = threadIdx.x + 32 * t;
      if (e < head_dim) to[e] = from_f32<T>(x[t] * factor);
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

// Where the heads of a token are.
template <class T> struct Place {
  const AttentionParams& p;
  int64_t width;

  __device__ explicit Place(const AttentionParams& params)
      : p(params), width((params.heads + 2 * params.kv_heads) * params.head_dim) {}
  __device__ int64_t q(int64_t h, int64_t t) const { return t * width + h * p.head_dim; }
  __device__ int64_t k(int64_t c, int64_t t) const { return q(p.heads + c, t); }
  __device__ int64_t v(int64_t c, int64_t t) const { return q(p.heads + p.kv_heads + c, t); }
  __device__ int64_t out(int64_t h, int64_t t) const { return (t * p.heads + h) * p.head_dim; }
  __device__ const T* qkv(int64_t at) const { return static_cast<const T*>(p.qkv) + at; }
  __device__ T* dqkv(int64_t at) const { return static_cast<T*>(p.dqkv) + at; }
};

// Warp n -> head, token, and the sequence's tokens first..last-1 (none in the padding). False: no such warp.
__device__ bool locate(const AttentionParams& p, int64_t heads, int64_t& head, int64_t& token, int64_t& first,
                       int64_t& last) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (n >= p.tokens * heads) return false;
  token = n / heads;
  head = n % heads;
  first = last = 0;
  if (token >= p.offsets[p.sequences]) return true;
  int64_t low = 0, high = p.sequences - 1;  // the first sequence that ends behind the token
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (p.offsets[middle + 1] > token)
      high = middle;
    else
      low = middle + 1;
  }
  first = p.offsets[low];
  last = p.offsets[low + 1];
  return true;
}

template <class T, int kParts> __global__ void forward_kernel(AttentionParams p) {
  int64_t h, i, first, last;
  if (!locate(p, p.heads, h, i, first, last)) return;
  const Place<T> place(p);
  const int64_t c = h / (p.heads / p.kv_heads);
  Head<T, kParts> q, k, v, sum;
  sum.clear();
  float factor = 0.0f, lse = 0.0f;
  if (first < last) {
    float max = -kInf, total = 0.0f;
    q.load(place.qkv(place.q(h, i)), p.head_dim);
    for (int64_t j = first; j <= i; ++j) {
      k.load(place.qkv(place.k(c, j)), p.head_dim);
      v.load(place.qkv(place.v(c, j)), p.head_dim);
      const float score = q.dot(k), before = max;
      max = score > max ? score : max;
      const float shrink = exp_row(before - max), prob = exp_row(score - max);
      total = total * shrink + prob;
      for (int t = 0; t < kParts; ++t) sum.x[t] = sum.x[t] * shrink + prob * v.x[t];
    }
    factor = 1.0f / total;
    lse = max + logf(total);
  }
  sum.store(static_cast<T*>(p.out) + place.out(h, i), p.head_dim, factor);
  if (threadIdx.x == 0) p.lse[i * p.heads + h] = lse;
}

template <class T, int kParts> __global__ void backward_queries_kernel(AttentionParams p) {
  int64_t h, i, first, last;
  if (!locate(p, p.heads, h, i, first, last)) return;
  const Place<T> place(p);
  const int64_t c = h / (p.heads / p.kv_heads);
  Head<T, kParts> q, dout, out, k, v, dq;
  dq.clear();
  if (first < last) {
    q.load(place.qkv(place.q(h, i)), p.head_dim);
    dout.load(static_cast<const T*>(p.dout) + place.out(h, i), p.head_dim);
    out.load(static_cast<const T*>(p.out) + place.out(h, i), p.head_dim);
    const float delta = dout.dot(out), lse = p.lse[i * p.heads + h];
    for (int64_t j = first; j <= i; ++j) {
      k.load(place.qkv(place.k(c, j)), p.head_dim);
      v.load(place.qkv(place.v(c, j)), p.head_dim);
      dq.add(exp_row(q.dot(k) - lse) * (dout.dot(v) - delta), k);
    }
  }
  dq.store(place.dqkv(place.q(h, i)), p.head_dim, 1.0f);
}

template <class T, int kParts> __global__ void backward_keys_kernel(AttentionParams p) {
  int64_t c, j, first, last;
  if (!locate(p, p.kv_heads, c, j, first, last)) return;
  const Place<T> place(p);
  const int64_t group = p.heads / p.kv_heads;
  Head<T, kParts> q, dout, out, k, v, dk, dv;
  dk.clear();
  dv.clear();
  if (first < last) {
    k.load(place.qkv(place.k(c, j)), p.head_dim);
    v.load(place.qkv(place.v(c, j)), p.head_dim);
  }
  for (int64_t i = j; i < last; ++i)
    for (int64_t h = c * group; h < (c + 1) * group; ++h) {
      q.load(place.qkv(place.q(h, i)), p.head_dim);
      dout.load(static_cast<const T*>(p.dout) + place.out(h, i), p.head_dim);
      out.load(static_cast<const T*>(p.out) + place.out(h, i), p.head_dim);
      const float prob = exp_row(q.dot(k) - p.lse[i * p.heads + h]);
      dv.add(prob, dout);
      dk.add(prob * (dout.dot(v) - dout.dot(out)), q);
    }
  dk.store(place.dqkv(place.k(c, j)), p.head_dim, 1.0f);
  dv.store(place.dqkv(place.v(c, j)), p.head_dim, 1.0f);
}

// Where key/value head c keeps position i: the first element of its page.
__device__ int64_t page_at(const PagedAttentionParams& p, int64_t row, int64_t c, int64_t i) {
  return (p.table[p.slot[row] * p.columns + i / kPage] * p.kv_heads + c) * p.head_dim * kPage;
}

// One warp per row and key/value head. All rows are written before any is attended over.
template <class T> __global__ void write_kernel(PagedAttentionParams p) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (n >= p.rows * p.kv_heads) return;
  const int64_t row = n / p.kv_heads, c = n % p.kv_heads;
  if (p.slot[row] < 0) return;
  const int64_t i = p.position[row], page = page_at(p, row, c, i);
  const T* k = static_cast<const T*>(p.qkv) + (row * (p.heads + 2 * p.kv_heads) + p.heads + c) * p.head_dim;
  const T* v = k + p.kv_heads * p.head_dim;
  T* keys = static_cast<T*>(p.keys) + page + i % kPage;
  T* values = static_cast<T*>(p.values) + page + i % kPage * p.head_dim;
  prepare_head(threadIdx.x, k, p.k_norm, p.rope + i * p.head_dim, p.head_dim, p.eps, 1.0f,
               [&](int64_t e, float x) { keys[e * kPage] = from_f32<T>(x); });
  for (int e = threadIdx.x; e < p.head_dim; e += 32) values[e] = v[e];
}

// One block per row and up to kGroup query heads of a key/value head. Warp w takes pages w, w + kWarps, ...; their sums
// are put together in the order of the warps, so that a row's order depends on its position alone. In a page the lanes
// l and l + 16 hold key l and half of the elements each.
template <class T, int kParts> __global__ void __launch_bounds__(32 * kWarps) paged_kernel(PagedAttentionParams p) {
  __shared__ float q[kGroup][32 * kParts], part[kWarps][kGroup][32 * kParts];
  __shared__ float part_max[kWarps][kGroup], part_total[kWarps][kGroup];
  const int64_t group = p.heads / p.kv_heads, parts = (group + kGroup - 1) / kGroup;
  const int64_t row = blockIdx.x / (p.kv_heads * parts), c = blockIdx.x / parts % p.kv_heads;
  const int64_t first_head = c * group + blockIdx.x % parts * kGroup;
  const int heads = static_cast<int>(min(int64_t{kGroup}, (c + 1) * group - first_head));
  const int lane = threadIdx.x, warp = threadIdx.y;
  T* out = static_cast<T*>(p.out) + (row * p.heads + first_head) * p.head_dim;
  if (p.slot[row] < 0) {
    for (int n = warp * 32 + lane; n < heads * p.head_dim; n += 32 * kWarps) out[n] = from_f32<T>(0.0f);
    return;
  }
  const int64_t at = p.position[row];
  if (warp < heads) {
    static_assert(kWarps >= kGroup);
    const T* x = static_cast<const T*>(p.qkv) + (row * (p.heads + 2 * p.kv_heads) + first_head + warp) * p.head_dim;
    prepare_head(lane, x, p.q_norm, p.rope + at * p.head_dim, p.head_dim, p.eps, p.scale,
                 [&](int64_t e, float y) { q[warp][e] = y; });
  }
  __syncthreads();
  Head<T, kParts> sum[kGroup], v;
  float max[kGroup], total[kGroup];
  for (int g = 0; g < kGroup; ++g) sum[g].clear(), max[g] = -kInf, total[g] = 0.0f;
  const int key = lane % kPage, half = static_cast<int>(p.head_dim / 2), first_element = lane / kPage * half;
  for (int64_t first = warp * kPage; first <= at; first += kWarps * kPage) {
    const int count = static_cast<int>(min(int64_t{kPage}, at + 1 - first));
    const int64_t page = page_at(p, row, c, first);
    const T* keys = static_cast<const T*>(p.keys) + page + key;
    const T* values = static_cast<const T*>(p.values) + page;
    float prob[kGroup] = {};
    for (int e = first_element; e < first_element + half; ++e) {
      const float k = to_f32(keys[e * kPage]);
      for (int g = 0; g < kGroup; ++g) prob[g] += (g < heads ? q[g][e] : 0.0f) * k;
    }
    for (int g = 0; g < kGroup; ++g) {
      float score = prob[g] + __shfl_xor_sync(kAll, prob[g], kPage);
      if (key >= count) score = -kInf;
      float top = score;
      for (int step = kPage / 2; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(kAll, top, step));
      const float before = max[g];
      max[g] = fmaxf(before, top);
      prob[g] = exp_row(score - max[g]);
      float page_total = prob[g];
      for (int step = kPage / 2; step > 0; step /= 2) page_total += __shfl_xor_sync(kAll, page_total, step);
      const float shrink = exp_row(before - max[g]);
      total[g] = total[g] * shrink + page_total;
      for (int t = 0; t < kParts; ++t) sum[g].x[t] *= shrink;
    }
    for (int j = 0; j < count; ++j) {
      v.load(values + j * p.head_dim, p.head_dim);
      for (int g = 0; g < kGroup; ++g) sum[g].add(__shfl_sync(kAll, prob[g], j), v);
    }
  }
  for (int g = 0; g < kGroup; ++g) {
    for (int t = 0; t < kParts; ++t) part[warp][g][lane + 32 * t] = sum[g].x[t];
    if (lane == 0) part_max[warp][g] = max[g], part_total[warp][g] = total[g];
  }
  __syncthreads();
  if (warp >= heads) return;
  float top = -kInf, all = 0.0f, weight[kWarps];
  for (int w = 0; w < kWarps; ++w) top = fmaxf(top, part_max[w][warp]);
  for (int w = 0; w < kWarps; ++w) {
    weight[w] = exp_row(part_max[w][warp] - top);  // 0 for a warp without pages
    all += part_total[w][warp] * weight[w];
  }
  for (int e = lane; e < p.head_dim; e += 32) {
    float mixed = 0.0f;
    for (int w = 0; w < kWarps; ++w) mixed += part[w][warp][e] * weight[w];
    out[warp * p.head_dim + e] = from_f32<T>(mixed / all);
  }
}

const dim3 kThreads(32, kWarps);
unsigned blocks(int64_t warps) { return static_cast<unsigned>((warps + kWarps - 1) / kWarps); }

// run(T{}, parts) with the element type and the elements per lane as types.
template <class T, class Run> void with_parts(int64_t head_dim, Run run) {
  if (head_dim <= 32) return run(T{}, std::integral_constant<int, 1>{});
  if (head_dim <= 64) return run(T{}, std::integral_constant<int, 2>{});
  if (head_dim <= 128) return run(T{}, std::integral_constant<int, 4>{});
  run(T{}, std::integral_constant<int, kMaxHead / 32>{});
}
template <class Run> void dispatch(DType dtype, int64_t head_dim, Run run) {
  if (dtype == DType::bf16)
    with_parts<bf16>(head_dim, run);
  else
    with_parts<float>(head_dim, run);
}

}  // namespace

void attention_cuda(const AttentionParams& p, int device, void* stream) {
  if (p.tokens == 0) return;
  DeviceGuard guard(device, "attention");
  auto queue = static_cast<cudaStream_t>(stream);
  dispatch(p.dtype, p.head_dim, [&](auto type, auto parts) {
    forward_kernel<decltype(type), parts.value><<<blocks(p.tokens * p.heads), kThreads, 0, queue>>>(p);
  });
  check_cuda(cudaGetLastError(), "attention");
}

void attention_backward_cuda(const AttentionParams& p, int device, void* stream) {
  if (p.tokens == 0) return;
  DeviceGuard guard(device, "attention_backward");
  auto queue = static_cast<cudaStream_t>(stream);
  dispatch(p.dtype, p.head_dim, [&](auto type, auto parts) {
    using T = decltype(type);
    backward_queries_kernel<T, parts.value><<<blocks(p.tokens * p.heads), kThreads, 0, queue>>>(p);
    backward_keys_kernel<T, parts.value><<<blocks(p.tokens * p.kv_heads), kThreads, 0, queue>>>(p);
  });
  check_cuda(cudaGetLastError(), "attention_backward");
}

void paged_attention_cuda(const PagedAttentionParams& p, int device, void* stream) {
  if (p.rows == 0) return;
  DeviceGuard guard(device, "paged_attention");
  auto queue = static_cast<cudaStream_t>(stream);
  const int64_t group = p.heads / p.kv_heads, parts_of_group = (group + kGroup - 1) / kGroup;
  const auto grid = static_cast<unsigned>(p.rows * p.kv_heads * parts_of_group);
  dispatch(p.dtype, p.head_dim, [&](auto type, auto parts) {
    using T = decltype(type);
    write_kernel<T><<<blocks(p.rows * p.kv_heads), kThreads, 0, queue>>>(p);
    paged_kernel<T, parts.value><<<grid, kThreads, 0, queue>>>(p);
  });
  check_cuda(cudaGetLastError(), "paged_attention");
}

}  // namespace pymathrl
