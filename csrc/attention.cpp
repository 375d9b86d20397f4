#include "attention.h"

#include "common/parallel.h"
#include "common/vector16.h"

namespace pymathrl {
namespace {

// Training: sixteen queries of one key/value head are the lanes, ordered by position and then by head, so that a group's
// heads share each key and a block of lanes ends close to its diagonal. Decode has one query per head: there keys are
// the lanes. Both give a query the same operations in the same order, hence the same bits.
constexpr int kQueries = kLanes;
static_assert(kKeyBlock == kLanes);

constexpr int64_t kGrainFlops = 100000;  // about 20 us

HD constexpr int64_t padded(int64_t head_dim) { return (head_dim + kLanes - 1) / kLanes * kLanes; }

// Rows of E floats, E a multiple of 8: the last vector may be half full.
HD f32x16 load_row(const float* x, int64_t e, int64_t head_dim) {
  if (e + kLanes <= head_dim) return load16(x + e);
  f32x16 half = {};
  memcpy(&half, x + e, kLanes / 2 * sizeof(float));
  return half;
}
HD void store_row(float* x, int64_t e, int64_t head_dim, f32x16 value) {
  memcpy(x + e, &value, (e + kLanes <= head_dim ? kLanes : kLanes / 2) * sizeof(float));
}

HD f32x16 larger(f32x16 a, f32x16 b) { return a > b ? a : b; }

HD float largest(f32x16 x) {
  const i32x16 by8 = {8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7};
  const i32x16 by4 = {4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11};
  const i32x16 by2 = {2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13};
  x = larger(x, __builtin_shuffle(x, by8));
  x = larger(x, __builtin_shuffle(x, by4));
  x = larger(x, __builtin_shuffle(x, by2));
  return x[0] > x[1] ? x[0] : x[1];
}

template <int kStep> HD void swap_blocks(f32x16& a, f32x16& b) {
  i32x16 low, high;
  for (int lane = 0; lane < kLanes; ++lane) {
    low[lane] = lane & kStep ? kLanes + lane - kStep : lane;
    high[lane] = lane & kStep ? kLanes + lane : lane + kStep;
  }
  f32x16 first = __builtin_shuffle(a, b, low);
  b = __builtin_shuffle(a, b, high);
  a = first;
}
template <int kStep> HD void transpose_step(f32x16* x) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & kStep)) swap_blocks<kStep>(x[i], x[i + kStep]);
}
// Not inlined: on processors without the two-source shuffles each copy is thousands of instructions.
SIMD_CLONES __attribute__((noinline)) void transpose(f32x16* x) {
  transpose_step<8>(x);
  transpose_step<4>(x);
  transpose_step<2>(x);
  transpose_step<1>(x);
}

// rotate_element on sixteen elements, times `scale`.
HD f32x16 rotate(f32x16 x, f32x16 angle, float direction, float scale) {
  const i32x16 even = {0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14};
  const i32x16 odd = {1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15};
  const i32x16 swapped = {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14};
  const f32x16 sign = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};
  f32x16 cosine = __builtin_shuffle(angle, even), sine = __builtin_shuffle(angle, odd) * (sign * direction);
  return (x * cosine + __builtin_shuffle(x, swapped) * sine) * scale;
}
SIMD_CLONES __attribute__((noinline)) void rotate_row(const float* x, const float* angle, int64_t head_dim, float direction, float scale, float* out) {
  for (int64_t e = 0; e < head_dim; e += kLanes)
    store_row(out, e, head_dim, rotate(load_row(x, e, head_dim), load_row(angle, e, head_dim), direction, scale));
}

// acc[r] += sum_i weight[r][i] x[i][e..e+15] over i < count, in order, for kRows rows of an accumulator at once.
template <int kRows>
HD void add_products(float* acc, int64_t acc_stride, const float (*weight)[kLanes], const float* x, int64_t x_stride,
                     int64_t count, int64_t head_dim) {
  for (int64_t e = 0; e < head_dim; e += kLanes) {
    f32x16 sum[kRows];
    for (int r = 0; r < kRows; ++r) sum[r] = load_row(acc + r * acc_stride, e, head_dim);
    for (int64_t i = 0; i < count; ++i) {
      f32x16 value = load_row(x + i * x_stride, e, head_dim);
      for (int r = 0; r < kRows; ++r) sum[r] += weight[r][i] * value;
    }
    for (int r = 0; r < kRows; ++r) store_row(acc + r * acc_stride, e, head_dim, sum[r]);
  }
}

// score[j] (lanes = queries) = sum_e x[e] * row_j[e], over e in order, for `count` rows `stride` apart.
template <int kE>
HD void dot_rows(const f32x16* x, const float* row, int64_t stride, int64_t count, int64_t head_dim, f32x16* score) {
  const int64_t n = kE ? kE : head_dim;
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    const float *a = row + j * stride, *b = a + stride, *c = b + stride, *d = c + stride;
    f32x16 s0 = {}, s1 = {}, s2 = {}, s3 = {};
    for (int64_t e = 0; e < n; ++e) {
      s0 += x[e] * a[e];
      s1 += x[e] * b[e];
      s2 += x[e] * c[e];
      s3 += x[e] * d[e];
    }
    score[j] = s0, score[j + 1] = s1, score[j + 2] = s2, score[j + 3] = s3;
  }
  for (; j < count; ++j) {
    f32x16 s = {};
    for (int64_t e = 0; e < n; ++e) s += x[e] * row[j * stride + e];
    score[j] = s;
  }
}

// acc[e] (lanes = queries) = acc[e] * factor + sum_j weight[j] row_j[e], over j in order.
template <int kE>
HD void mix_rows(f32x16* acc, f32x16 factor, const f32x16* weight, const float* row, int64_t stride, int64_t count,
                 int64_t head_dim) {
  const int64_t n = kE ? kE : head_dim;
  for (int64_t e = 0; e < n; e += 8) {
    f32x16 sum[8];
    for (int u = 0; u < 8; ++u) sum[u] = acc[e + u] * factor;
    for (int64_t j = 0; j < count; ++j)
      for (int u = 0; u < 8; ++u) sum[u] += weight[j] * row[j * stride + e + u];
    for (int u = 0; u < 8; ++u) acc[e + u] = sum[u];
  }
}

// Sixteen queries of a key/value head: query n is position n / G, head first_head + n % G.
struct Lanes {
  int64_t head[kQueries], at[kQueries];
  i32x16 position;
  int count;      // queries in use
  int64_t keys;   // positions that the last of them sees

  HD Lanes(int64_t begin, int64_t end, int64_t first_head, int64_t group) {
    count = static_cast<int>(end - begin < kQueries ? end - begin : kQueries);
    for (int lane = 0; lane < kQueries; ++lane) {
      int64_t n = begin + (lane < count ? lane : count - 1);
      head[lane] = first_head + n % group;
      at[lane] = n / group;
      position[lane] = static_cast<int32_t>(at[lane]);
    }
    keys = at[count - 1] + 1;
  }
};

// Rows [16][E'] (E' = padded E) -> lanes [E'][16]; unused rows repeat the last one.
HD void rows_to_lanes(const float* rows, int64_t stride, f32x16* lanes) {
  for (int64_t e = 0; e < stride; e += kLanes) {
    for (int i = 0; i < kQueries; ++i) lanes[e + i] = load16(rows + i * stride + e);
    transpose(lanes + e);
  }
}

HD void load_queries(const AttentionRow& row, const Lanes& lanes, float* q) {
  const int64_t head_dim = row.p.head_dim, stride = padded(head_dim);
  if (stride > head_dim) memset(q, 0, kQueries * stride * sizeof(float));
  for (int i = 0; i < kQueries; ++i)
    rotate_row(row.p.qkv + row.q(lanes.head[i], lanes.at[i]), row.angle(lanes.at[i]), head_dim, 1.0f, row.p.scale,
               q + i * stride);
}

HD void hide_future(const Lanes& lanes, int64_t first_key, int64_t count, f32x16* score, float value) {
  if (first_key + count - 1 <= lanes.at[0]) return;
  for (int64_t j = 0; j < count; ++j)
    score[j] = lanes.position >= static_cast<int32_t>(first_key + j) ? score[j] : splat(value);
}

template <int kE> HD void forward_queries(const AttentionRow& row, int64_t kv_head, const Lanes& lanes) {
  const AttentionParams& p = row.p;
  const int64_t head_dim = kE ? kE : p.head_dim, stride = padded(head_dim);
  alignas(64) float q[kQueries * (kE ? padded(kE) : kMaxHead)];
  f32x16 lane_q[kE ? padded(kE) : kMaxHead], sum[kE ? padded(kE) : kMaxHead];
  load_queries(row, lanes, q);
  rows_to_lanes(q, stride, lane_q);
  for (int64_t e = 0; e < stride; ++e) sum[e] = f32x16{};
  f32x16 max = splat(-kInf), total = {};
  const int64_t v_stride = row.width;
  for (int64_t first = 0; first < lanes.keys; first += kKeyBlock) {
    const int64_t count = lanes.keys - first < kKeyBlock ? lanes.keys - first : kKeyBlock;
    f32x16 score[kKeyBlock];
    dot_rows<kE>(lane_q, p.keys + row.key(kv_head, first), head_dim, count, head_dim, score);
    hide_future(lanes, first, count, score, -kInf);
    f32x16 before = max;
    for (int64_t j = 0; j < count; ++j) max = larger(score[j], max);
    f32x16 factor = exp_lanes(before - max);
    total *= factor;
    for (int64_t j = 0; j < count; ++j) {
      score[j] = exp_lanes(score[j] - max);
      total += score[j];
    }
    mix_rows<kE>(sum, factor, score, p.qkv + row.v(kv_head, first), v_stride, count, head_dim);
  }
  for (int64_t e = 0; e < stride; e += kLanes) {
    for (int i = 0; i < kLanes; ++i) sum[e + i] /= total;
    transpose(sum + e);
    for (int i = 0; i < lanes.count; ++i) store_row(p.out + row.out(lanes.head[i], lanes.at[i]), e, head_dim, sum[e + i]);
  }
  for (int i = 0; i < lanes.count; ++i) p.lse[row.lse(lanes.head[i], lanes.at[i])] = max[i] + logf(total[i]);
}

template <int kE> HD void forward_head(const AttentionParams& p, int64_t b, int64_t kv_head) {
  const AttentionRow row(p, b);
  const int64_t group = p.heads / p.kv_heads, head_dim = kE ? kE : p.head_dim;
  for (int64_t i = -row.first; i < 0; ++i) {
    memset(p.out + row.out(kv_head * group, i), 0, group * head_dim * sizeof(float));
    memset(p.keys + row.key(kv_head, i), 0, head_dim * sizeof(float));
    for (int64_t g = 0; g < group; ++g) p.lse[row.lse(kv_head * group + g, i)] = 0.0f;
  }
  for (int64_t i = 0; i < row.count; ++i)
    rotate_row(p.qkv + row.k(kv_head, i), row.angle(i), head_dim, 1.0f, 1.0f, p.keys + row.key(kv_head, i));
  for (int64_t n = 0; n < row.count * group; n += kQueries)
    forward_queries<kE>(row, kv_head, Lanes(n, row.count * group, kv_head * group, group));
}

template <int kE> HD void backward_queries(const AttentionRow& row, int64_t kv_head, const Lanes& lanes) {
  const AttentionParams& p = row.p;
  const int64_t head_dim = kE ? kE : p.head_dim, stride = padded(head_dim), v_stride = row.width;
  constexpr int64_t kRow = kE ? padded(kE) : kMaxHead;
  alignas(64) float q[kQueries * kRow], dout[kQueries * kRow];
  f32x16 lane_q[kRow], lane_dout[kRow], dq[kRow], product[kLanes];
  load_queries(row, lanes, q);
  f32x16 lse;
  for (int i = 0; i < kQueries; ++i) {
    const int64_t at = row.out(lanes.head[i], lanes.at[i]);
    f32x16 sum = {};
    for (int64_t e = 0; e < head_dim; e += kLanes) {
      f32x16 d = load_row(p.dout + at, e, head_dim);
      sum += d * load_row(p.out + at, e, head_dim);
      store16(dout + i * stride + e, d);
    }
    product[i] = sum;
    lse[i] = p.lse[row.lse(lanes.head[i], lanes.at[i])];
  }
  transpose(product);
  f32x16 delta = {};  // do . out
  for (int i = 0; i < kLanes; ++i) delta += product[i];
  rows_to_lanes(q, stride, lane_q);
  rows_to_lanes(dout, stride, lane_dout);
  for (int64_t e = 0; e < stride; ++e) dq[e] = f32x16{};
  for (int64_t first = 0; first < lanes.keys; first += kKeyBlock) {
    const int64_t count = lanes.keys - first < kKeyBlock ? lanes.keys - first : kKeyBlock;
    const float* keys = p.keys + row.key(kv_head, first);
    const float* values = p.qkv + row.v(kv_head, first);
    f32x16 prob[kKeyBlock], ds[kKeyBlock];
    dot_rows<kE>(lane_q, keys, head_dim, count, head_dim, prob);
    hide_future(lanes, first, count, prob, -kInf);
    dot_rows<kE>(lane_dout, values, v_stride, count, head_dim, ds);
    for (int64_t j = 0; j < count; ++j) {
      prob[j] = exp_lanes(prob[j] - lse);
      ds[j] = prob[j] * (ds[j] - delta);
    }
    mix_rows<kE>(dq, splat(1.0f), ds, keys, head_dim, count, head_dim);
    alignas(64) float prob_rows[kKeyBlock][kLanes], ds_rows[kKeyBlock][kLanes];
    for (int64_t j = 0; j < count; ++j) store16(prob_rows[j], prob[j]), store16(ds_rows[j], ds[j]);
    float* dkeys = p.dqkv + row.k(kv_head, first);
    float* dvalues = p.dqkv + row.v(kv_head, first);
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) {
      add_products<4>(dkeys + j * v_stride, v_stride, ds_rows + j, q, stride, lanes.count, head_dim);
      add_products<4>(dvalues + j * v_stride, v_stride, prob_rows + j, dout, stride, lanes.count, head_dim);
    }
    for (; j < count; ++j) {
      add_products<1>(dkeys + j * v_stride, v_stride, ds_rows + j, q, stride, lanes.count, head_dim);
      add_products<1>(dvalues + j * v_stride, v_stride, prob_rows + j, dout, stride, lanes.count, head_dim);
    }
  }
  for (int64_t e = 0; e < stride; e += kLanes) {
    transpose(dq + e);
    for (int i = 0; i < lanes.count; ++i) store_row(p.dqkv + row.q(lanes.head[i], lanes.at[i]), e, head_dim, dq[e + i]);
  }
  for (int i = 0; i < lanes.count; ++i) {
    float* out = p.dqkv + row.q(lanes.head[i], lanes.at[i]);
    rotate_row(out, row.angle(lanes.at[i]), head_dim, -1.0f, p.scale, out);
  }
}

template <int kE> HD void backward_head(const AttentionParams& p, int64_t b, int64_t kv_head) {
  const AttentionRow row(p, b);
  const int64_t group = p.heads / p.kv_heads, head_dim = kE ? kE : p.head_dim, bytes = head_dim * sizeof(float);
  for (int64_t i = -row.first; i < row.count; ++i) {
    memset(p.dqkv + row.k(kv_head, i), 0, bytes);
    memset(p.dqkv + row.v(kv_head, i), 0, bytes);
    if (i < 0) memset(p.dqkv + row.q(kv_head * group, i), 0, group * bytes);
  }
  for (int64_t n = 0; n < row.count * group; n += kQueries)
    backward_queries<kE>(row, kv_head, Lanes(n, row.count * group, kv_head * group, group));
  for (int64_t i = 0; i < row.count; ++i) {
    float* dk = p.dqkv + row.k(kv_head, i);
    rotate_row(dk, row.angle(i), head_dim, -1.0f, 1.0f, dk);
  }
}

// One key/value head of one row, one query in each of its heads. Keys are the lanes.
template <int kE> HD void decode_head(const DecodeAttentionParams& p, int64_t b, int64_t kv_head) {
  const int64_t head_dim = kE ? kE : p.head_dim, stride = padded(head_dim), group = p.heads / p.kv_heads;
  constexpr int64_t kRow = kE ? padded(kE) : kMaxHead;
  const float* qkv = p.qkv + b * (p.heads + 2 * p.kv_heads) * head_dim;
  const float* angle = p.angle + (p.column - p.pad[b]) * head_dim;
  float* keys = p.cache + (b * p.kv_heads + kv_head) * p.capacity * head_dim;
  float* values = keys + p.rows * p.kv_heads * p.capacity * head_dim;
  rotate_row(qkv + (p.heads + kv_head) * head_dim, angle, head_dim, 1.0f, 1.0f, keys + p.column * head_dim);
  memcpy(values + p.column * head_dim, qkv + (p.heads + p.kv_heads + kv_head) * head_dim, head_dim * sizeof(float));
  for (int64_t g0 = 0; g0 < group; g0 += 4) {
    const int64_t queries = group - g0 < 4 ? group - g0 : 4;
    alignas(64) float q[4][kRow], sum[4][kRow], max[4], total[4];
    for (int64_t g = 0; g < queries; ++g) {
      rotate_row(qkv + (kv_head * group + g0 + g) * head_dim, angle, head_dim, 1.0f, p.scale, q[g]);
      memset(sum[g], 0, head_dim * sizeof(float));
      max[g] = -kInf, total[g] = 0.0f;
    }
    for (int64_t first = p.pad[b]; first <= p.column; first += kKeyBlock) {
      const int64_t count = p.column + 1 - first < kKeyBlock ? p.column + 1 - first : kKeyBlock;
      f32x16 lane_k[kRow];
      for (int64_t e = 0; e < stride; e += kLanes) {
        for (int64_t j = 0; j < kKeyBlock; ++j)
          lane_k[e + j] = j < count ? load_row(keys + (first + j) * head_dim, e, head_dim) : f32x16{};
        transpose(lane_k + e);
      }
      alignas(64) float prob[4][kLanes];
      for (int64_t g = 0; g < queries; ++g) {
        f32x16 score = {};
        for (int64_t e = 0; e < head_dim; ++e) score += q[g][e] * lane_k[e];
        score = first_lanes(count) ? score : splat(-kInf);
        const float before = max[g], top = largest(score);
        max[g] = top > before ? top : before;
        const float factor = exp_row(before - max[g]);
        store16(prob[g], exp_lanes(score - max[g]));
        float sum_prob = total[g] * factor;
        for (int lane = 0; lane < kLanes; ++lane) sum_prob += prob[g][lane];
        total[g] = sum_prob;
        for (int64_t e = 0; e < head_dim; ++e) sum[g][e] *= factor;
      }
      const float* v = values + first * head_dim;
      if (queries == 4) {
        add_products<4>(sum[0], kRow, prob, v, head_dim, count, head_dim);
      } else {
        for (int64_t g = 0; g < queries; ++g) add_products<1>(sum[g], kRow, prob + g, v, head_dim, count, head_dim);
      }
    }
    for (int64_t g = 0; g < queries; ++g) {
      float* out = p.out + (b * p.heads + kv_head * group + g0 + g) * head_dim;
      for (int64_t e = 0; e < head_dim; ++e) out[e] = sum[g][e] / total[g];
    }
  }
}

SIMD_CLONES void forward_task(const AttentionParams& p, int64_t b, int64_t kv_head) {
  forward_head<0>(p, b, kv_head);
}

SIMD_CLONES void backward_task(const AttentionParams& p, int64_t b, int64_t kv_head) {
  backward_head<0>(p, b, kv_head);
}

SIMD_CLONES void decode_task(const DecodeAttentionParams& p, int64_t b, int64_t kv_head) {
  decode_head<0>(p, b, kv_head);
}

template <class Params, class Task>
void for_heads(const Params& p, int64_t flops, Task task) {
  parallel_for(p.rows * p.kv_heads, 1 + kGrainFlops / (1 + flops), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) task(p, n / p.kv_heads, n % p.kv_heads);
  });
}

}  // namespace

void attention_cpu(const AttentionParams& p) {
  for_heads(p, 2 * p.columns * p.columns * p.heads / p.kv_heads * p.head_dim, forward_task);
}

void attention_backward_cpu(const AttentionParams& p) {
  for_heads(p, 5 * p.columns * p.columns * p.heads / p.kv_heads * p.head_dim, backward_task);
}

void decode_attention_cpu(const DecodeAttentionParams& p) {
  for_heads(p, 8 * (p.column + 1) * p.heads / p.kv_heads * p.head_dim, decode_task);
}

}  // namespace pymathrl
