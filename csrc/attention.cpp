#include "attention.h"

#include "common/packed.h"
#include "common/parallel.h"
#include "common/transpose.h"

namespace pymathrl {
inline namespace PYMATHRL_LEVEL {
namespace {

// Where there are many queries, sixteen of one key/value head are the lanes, ordered by position and then by head, so
// that a group's heads share each key and a block of lanes ends close to its diagonal. For single queries the keys of a
// page are the lanes. Both give a query the same operations in the same order, hence the same bits.
constexpr int kQueries = kLanes;
static_assert(kPage == kLanes);

constexpr int64_t kHeadPart = 64;        // elements of a head that add up in one chain
constexpr int64_t kGrainFlops = 100000;  // about 10 us
constexpr int64_t kPiece = 64;           // positions of a sequence that one task of a forward takes
constexpr int64_t kLaneQueries = 10;     // a run with fewer per key/value head goes one by one (8 to 12: equally fast)

// Rows of E floats, E a multiple of 8: the last sixteen may be eight.
HD f32x16 load_row(const float* x, int64_t e, int64_t head_dim) {
  return e + kLanes <= head_dim ? load16(x + e) : load_part(x + e, kLanes / 2, 0.0f);
}
HD void store_row(float* x, int64_t e, int64_t head_dim, f32x16 value) {
  if (e + kLanes <= head_dim)
    store16(x + e, value);
  else
    store_part(x + e, kLanes / 2, value);
}

HD f32x16 larger(f32x16 a, f32x16 b) { return pick(a > b, a, b); }

template <int kStep> HD float largest(native_f32 x) {
  native_i32 other;
  for (int lane = 0; lane < kNative; ++lane) other[lane] = lane ^ kStep;
  const native_f32 swapped = __builtin_shuffle(x, other);
  x = swapped > x ? swapped : x;
  if constexpr (kStep > 1) return largest<kStep / 2>(x);
  return x[0];
}
HD float largest(f32x16 x) {
  native_f32 top = x.part[0];
  for (int i = 1; i < kParts; ++i) top = x.part[i] > top ? x.part[i] : top;
  return largest<kNative / 2>(top);
}

// Sixteen rows of E elements -> lanes [E'][16], E' = E rounded up to sixteen.
HD void rows_to_lanes(const float* const* row, int64_t head_dim, f32x16* lanes) {
  for (int64_t e = 0; e < head_dim; e += kLanes) {
    for (int i = 0; i < kLanes; ++i) lanes[e + i] = load_row(row[i], e, head_dim);
    transpose(lanes + e);
  }
}
// The way back, for the first `count` rows. lanes is overwritten.
HD void lanes_to_rows(f32x16* lanes, int64_t head_dim, int count, float* const* row) {
  for (int64_t e = 0; e < head_dim; e += kLanes) {
    transpose(lanes + e);
    for (int i = 0; i < count; ++i) store_row(row[i], e, head_dim, lanes[e + i]);
  }
}

// Element e of key j is at data[j * key + e * element]: rows of the projection, or a page with its keys across lanes.
struct Keys {
  const float* data;
  int64_t key, element;
};

// A score is a sum over the elements of a head, in order, kHeadPart at a time (256 at once: 2.5 times torch's error):
// part(begin, end, sum) adds elements begin..end-1 to kCount sums that start at 0.
template <int kCount, class Part> HD void sum_elements(int64_t head_dim, f32x16* score, Part part) {
  for (int u = 0; u < kCount; ++u) score[u] = splat(0.0f);
  for (int64_t begin = 0; begin < head_dim; begin += kHeadPart) {
    f32x16 sum[kCount];
    for (int u = 0; u < kCount; ++u) sum[u] = splat(0.0f);
    part(begin, begin + kHeadPart < head_dim ? begin + kHeadPart : head_dim, sum);
    for (int u = 0; u < kCount; ++u) score[u] += sum[u];
  }
}

// score[j] (lanes = queries) = x . key_j for kCount keys.
template <int kCount> HD void dot_some(const f32x16* x, Keys keys, int64_t head_dim, f32x16* score) {
  sum_elements<kCount>(head_dim, score, [=](int64_t begin, int64_t end, f32x16* sum) __attribute__((always_inline)) {
    for (int64_t e = begin; e < end; ++e)
      for (int u = 0; u < kCount; ++u) sum[u] += x[e] * keys.data[u * keys.key + e * keys.element];
  });
}
HD void dot_keys(const f32x16* x, Keys keys, int64_t count, int64_t head_dim, f32x16* score) {
  for (; count >= 4; count -= 4, score += 4, keys.data += 4 * keys.key) dot_some<4>(x, keys, head_dim, score);
  if (count & 2) dot_some<2>(x, keys, head_dim, score), score += 2, keys.data += 2 * keys.key;
  if (count & 1) dot_some<1>(x, keys, head_dim, score);
}

// acc[e] (lanes = queries) = acc[e] * factor + sum_j weight[j] row_j[e], over j in order. Four at a time fill AVX2's
// registers: eight sums, a weight, a product.
HD void mix_rows(f32x16* acc, f32x16 factor, const f32x16* weight, Keys rows, int64_t count, int64_t head_dim) {
  for (int64_t e = 0; e < head_dim; e += 4) {
    f32x16 sum[4];
    for (int u = 0; u < 4; ++u) sum[u] = acc[e + u] * factor;
    for (int64_t j = 0; j < count; ++j)
      for (int u = 0; u < 4; ++u) sum[u] += weight[j] * rows.data[j * rows.key + (e + u) * rows.element];
    for (int u = 0; u < 4; ++u) acc[e + u] = sum[u];
  }
}

// acc[r] = acc[r] * factor[r] + sum_i weight[r][i] x_i over i < count, in order, for kRows rows of E elements.
template <int kRows>
HD void add_products(float* acc, int64_t acc_stride, const float* factor, const float (*weight)[kLanes], const float* x,
                     int64_t x_stride, int64_t count, int64_t head_dim) {
  for (int64_t e = 0; e < head_dim; e += kLanes) {
    f32x16 sum[kRows];
    for (int r = 0; r < kRows; ++r) sum[r] = load_row(acc + r * acc_stride, e, head_dim) * factor[r];
    for (int64_t i = 0; i < count; ++i) {
      f32x16 value = load_row(x + i * x_stride, e, head_dim);
      for (int r = 0; r < kRows; ++r) sum[r] += value * weight[r][i];
    }
    for (int r = 0; r < kRows; ++r) store_row(acc + r * acc_stride, e, head_dim, sum[r]);
  }
}

// Sixteen queries of a key/value head from query `begin` on: query n is position n / G, head first_head + n % G.
struct Lanes {
  int64_t head[kQueries], at[kQueries];
  f32x16 position;
  int count;      // queries in use; the other lanes repeat the last
  int64_t keys;   // positions that the last of them sees

  HD Lanes(int64_t begin, int64_t end, int64_t first_head, int64_t group) {
    count = static_cast<int>(end - begin < kQueries ? end - begin : kQueries);
    float where[kQueries];
    int64_t p = begin / group, g = begin % group;
    for (int lane = 0; lane < kQueries; ++lane) {
      head[lane] = first_head + g;
      at[lane] = p;
      where[lane] = static_cast<float>(p);
      if (lane + 1 < count && ++g == group) g = 0, ++p;
    }
    position = load16(where);
    keys = p + 1;
  }
};

HD void hide_future(const Lanes& lanes, int64_t first_key, int64_t count, f32x16* score) {
  if (first_key + count - 1 <= lanes.at[0]) return;
  for (int64_t j = 0; j < count; ++j)
    score[j] = pick(lanes.position >= static_cast<float>(first_key + j), score[j], -kInf);
}

HD int64_t block_end(int64_t first, int64_t keys) { return keys - first < kPage ? keys - first : kPage; }

// A packed sequence; position i is its token first + i.
struct Sequence {
  const AttentionParams& p;
  int64_t first, count, width;

  HD Sequence(const AttentionParams& params, int64_t b)
      : p(params), first(params.offsets[b]), count(params.offsets[b + 1] - first),
        width((params.heads + 2 * params.kv_heads) * params.head_dim) {}
  HD int64_t q(int64_t h, int64_t i) const { return (first + i) * width + h * p.head_dim; }
  HD int64_t k(int64_t c, int64_t i) const { return q(p.heads + c, i); }
  HD int64_t v(int64_t c, int64_t i) const { return q(p.heads + p.kv_heads + c, i); }
  HD int64_t row(int64_t h, int64_t i) const { return (first + i) * p.heads + h; }
  HD const float* qkv(int64_t at) const { return static_cast<const float*>(p.qkv) + at; }
  HD float* dqkv(int64_t at) const { return static_cast<float*>(p.dqkv) + at; }
  HD const float* dout(int64_t h, int64_t i) const {
    return static_cast<const float*>(p.dout) + row(h, i) * p.head_dim;
  }

  HD const float* query(int64_t h, int64_t i, float*) const { return qkv(q(h, i)); }
  HD Keys keys(int64_t c, int64_t j) const { return {qkv(k(c, j)), width, 1}; }
  HD Keys values(int64_t c, int64_t j) const { return {qkv(v(c, j)), width, 1}; }
  HD float* out(int64_t h, int64_t i) const { return static_cast<float*>(p.out) + row(h, i) * p.head_dim; }
  HD void lse(int64_t h, int64_t i, float max, float total) const { p.lse[row(h, i)] = max + logf(total); }
};

// Consecutive new tokens of one sequence in the paged cache; position i is row `row0` + i.
struct Run {
  const PagedAttentionParams& p;
  int64_t row0, begin, end, width;  // positions begin..end-1
  const int32_t* table;

  HD Run(const PagedAttentionParams& params, int64_t first_row)
      : p(params), begin(params.position[first_row]), width((params.heads + 2 * params.kv_heads) * params.head_dim),
        table(params.table + params.slot[first_row] * params.columns) {
    row0 = first_row - begin;
    int64_t next = first_row + 1;
    while (next < p.rows && continues_run(p, next)) ++next;
    end = next - row0;
  }
  HD const float* qkv(int64_t head, int64_t i) const {
    return static_cast<const float*>(p.qkv) + (row0 + i) * width + head * p.head_dim;
  }
  HD int64_t page(int64_t c, int64_t i) const {
    const int64_t at = table[i / kPage];
    if (at < 0 || at >= p.pages)
      fail("paged_attention: page ", at, " of position ", i, " is not in [0, ", p.pages, "); correct table");
    return (at * p.kv_heads + c) * p.head_dim * kPage;
  }
  HD float* key_page(int64_t c, int64_t i) const { return static_cast<float*>(p.keys) + page(c, i); }
  HD float* value_page(int64_t c, int64_t i) const { return static_cast<float*>(p.values) + page(c, i); }

  HD const float* query(int64_t h, int64_t i, float* q) const {
    prepare_head(qkv(h, i), p.q_norm, p.rope + i * p.head_dim, p.head_dim, p.eps, p.scale, q);
    return q;
  }
  HD Keys keys(int64_t c, int64_t j) const { return {key_page(c, j), 1, kPage}; }
  HD Keys values(int64_t c, int64_t j) const { return {value_page(c, j), p.head_dim, 1}; }
  HD float* out(int64_t h, int64_t i) const {
    return static_cast<float*>(p.out) + ((row0 + i) * p.heads + h) * p.head_dim;
  }
  HD void lse(int64_t, int64_t, float, float) const {}

  void write(int64_t c) const {
    float k[kMaxHead];
    for (int64_t i = begin; i < end; ++i) {
      prepare_head(qkv(p.heads + c, i), p.k_norm, p.rope + i * p.head_dim, p.head_dim, p.eps, 1.0f, k);
      float* keys = key_page(c, i) + i % kPage;
      for (int64_t e = 0; e < p.head_dim; ++e) keys[e * kPage] = k[e];
      memcpy(value_page(c, i) + i % kPage * p.head_dim, qkv(p.heads + p.kv_heads + c, i), p.head_dim * sizeof(float));
    }
  }
};

// Sixteen queries of a Sequence or a Run.
template <class Source> void attend_lanes(const Source& source, int64_t c, const Lanes& lanes) {
  const int64_t head_dim = source.p.head_dim;
  alignas(64) float q[kQueries][kMaxHead];
  const float* query[kQueries];
  f32x16 lane_q[kMaxHead], sum[kMaxHead];
  for (int i = 0; i < kQueries; ++i) query[i] = source.query(lanes.head[i], lanes.at[i], q[i]);
  rows_to_lanes(query, head_dim, lane_q);
  for (int64_t e = 0; e < head_dim; ++e) sum[e] = splat(0.0f);
  f32x16 max = splat(-kInf), total = splat(0.0f);
  for (int64_t first = 0; first < lanes.keys; first += kPage) {
    const int64_t count = block_end(first, lanes.keys);
    f32x16 prob[kPage];
    dot_keys(lane_q, source.keys(c, first), count, head_dim, prob);
    hide_future(lanes, first, count, prob);
    const f32x16 before = max;
    for (int64_t j = 0; j < count; ++j) max = larger(prob[j], max);
    const f32x16 factor = exp_row(before - max);
    total = total * factor;
    for (int64_t j = 0; j < count; ++j) {
      prob[j] = exp_row(prob[j] - max);
      total += prob[j];
    }
    mix_rows(sum, factor, prob, source.values(c, first), count, head_dim);
  }
  for (int64_t e = 0; e < head_dim; ++e) sum[e] = sum[e] / total;
  float *out[kQueries], lane_max[kLanes], lane_total[kLanes];
  for (int i = 0; i < lanes.count; ++i) out[i] = source.out(lanes.head[i], lanes.at[i]);
  lanes_to_rows(sum, head_dim, lanes.count, out);
  store16(lane_max, max), store16(lane_total, total);
  for (int i = 0; i < lanes.count; ++i) source.lse(lanes.head[i], lanes.at[i], lane_max[i], lane_total[i]);
}

// Positions begin..end-1.
template <class Source> void attend_positions(const Source& source, int64_t c, int64_t begin, int64_t end) {
  const int64_t group = source.p.heads / source.p.kv_heads;
  for (int64_t n = begin * group; n < end * group; n += kQueries)
    attend_lanes(source, c, Lanes(n, end * group, c * group, group));
}

// score[g] (lanes = keys) = q_g . key. `soon` and `later`, as long as the page, are fetched into the cache meanwhile.
template <int kHeads>
HD void dot_page(const float (*q)[kMaxHead], const float* keys, const float* soon, const float* later, int64_t head_dim,
                 f32x16* score) {
  sum_elements<kHeads>(head_dim, score, [=](int64_t begin, int64_t end, f32x16* sum) __attribute__((always_inline)) {
    for (int64_t e = begin; e < end; ++e) {
      __builtin_prefetch(soon + e * kPage);
      __builtin_prefetch(later + e * kPage);
      const f32x16 key = load16(keys + e * kPage);
      for (int g = 0; g < kHeads; ++g) sum[g] += key * q[g][e];
    }
  });
}

// kHeads queries of one position: heads h, h+1, ... that read key/value head c. Four pages at a time: the steps of a
// page wait for each other, those of different pages (but for the running maximum and the sums) do not.
template <int kHeads> void attend_one(const Run& run, int64_t c, int64_t h, int64_t at) {
  constexpr int kTogether = 4;
  static_assert(kHeads <= 4 && kTogether * 4 == kLanes);
  const int64_t head_dim = run.p.head_dim;
  alignas(64) float q[kHeads][kMaxHead], sum[kHeads][kMaxHead], prob[kTogether][kHeads][kLanes], factor[kTogether][4];
  float max[kHeads], total[kHeads];
  for (int g = 0; g < kHeads; ++g) {
    run.query(h + g, at, q[g]);
    memset(sum[g], 0, head_dim * sizeof(float));
    max[g] = -kInf, total[g] = 0.0f;
  }
  const float* next = run.key_page(c, 0);
  for (int64_t first = 0; first <= at; first += kTogether * kPage) {
    const int64_t last = at - first < kTogether * kPage ? at - first : kTogether * kPage - 1;
    const float* values[kTogether];
    memset(factor, 0, sizeof factor);
    for (int64_t n = 0; n <= last / kPage; ++n) {
      const int64_t begin = first + n * kPage, count = block_end(begin, at + 1);
      const float* keys = next;
      values[n] = run.value_page(c, begin);
      next = run.key_page(c, begin + kPage <= at ? begin + kPage : begin);
      f32x16 score[kHeads];
      dot_page<kHeads>(q, keys, values[n], next, head_dim, score);
      for (int g = 0; g < kHeads; ++g) {
        if (count < kPage) score[g] = pick(first_lanes(static_cast<int>(count)), score[g], -kInf);
        const float before = max[g], top = largest(score[g]);
        max[g] = top > before ? top : before;
        factor[n][g] = before - max[g];
        store16(prob[n][g], score[g] - max[g]);
      }
    }
    store16(factor[0], exp_row(load16(factor[0])));
    for (int64_t n = 0; n <= last / kPage; ++n) {
      for (int g = 0; g < kHeads; ++g) store16(prob[n][g], exp_row(load16(prob[n][g])));
      for (int g = 0; g < kHeads; ++g) {
        float sum_prob = total[g] * factor[n][g];
        for (int lane = 0; lane < kLanes; ++lane) sum_prob += prob[n][g][lane];
        total[g] = sum_prob;
      }
      add_products<kHeads>(sum[0], kMaxHead, factor[n], prob[n], values[n], head_dim,
                           block_end(first + n * kPage, at + 1), head_dim);
    }
  }
  for (int g = 0; g < kHeads; ++g) {
    float* out = run.out(h + g, at);
    for (int64_t e = 0; e < head_dim; ++e) out[e] = sum[g][e] / total[g];
  }
}

void attend_run(const Run& run, int64_t c, int64_t begin, int64_t end) {
  const int64_t group = run.p.heads / run.p.kv_heads;
  if ((end - begin) * group >= kLaneQueries && end - begin > 1) return attend_positions(run, c, begin, end);
  for (int64_t at = begin; at < end; ++at)
    for (int64_t h = c * group, last = h + group; h < last;) {
      if (last - h >= 4)
        attend_one<4>(run, c, h, at), h += 4;
      else if (last - h == 3)
        attend_one<3>(run, c, h, at), h += 3;
      else if (last - h == 2)
        attend_one<2>(run, c, h, at), h += 2;
      else
        attend_one<1>(run, c, h, at), h += 1;
    }
}

void backward_lanes(const Sequence& sequence, int64_t c, const Lanes& lanes) {
  const int64_t head_dim = sequence.p.head_dim, width = sequence.width;
  const int64_t stride = (head_dim + kLanes - 1) / kLanes * kLanes;
  const float *query[kQueries], *gradient[kQueries];
  f32x16 lane_q[kMaxHead], lane_dout[kMaxHead], dq[kMaxHead], product[kLanes];
  float lane_lse[kQueries];
  // Rows side by side, `stride` long: 1 KB apart they would share four of the 64 sets of an L1 cache.
  alignas(64) float q[kQueries * kMaxHead], dout[kQueries * kMaxHead];
  for (int i = 0; i < kQueries; ++i) {
    query[i] = sequence.qkv(sequence.q(lanes.head[i], lanes.at[i]));
    gradient[i] = sequence.dout(lanes.head[i], lanes.at[i]);
    const float* out = sequence.out(lanes.head[i], lanes.at[i]);
    product[i] = splat(0.0f);
    for (int64_t e = 0; e < head_dim; e += kLanes) {
      const f32x16 d = load_row(gradient[i], e, head_dim);
      product[i] += d * load_row(out, e, head_dim);
      store16(dout + i * stride + e, d);
      store16(q + i * stride + e, load_row(query[i], e, head_dim));
    }
    lane_lse[i] = sequence.p.lse[sequence.row(lanes.head[i], lanes.at[i])];
  }
  transpose(product);
  f32x16 delta = splat(0.0f);  // do . out
  for (int i = 0; i < kLanes; ++i) delta += product[i];
  rows_to_lanes(query, head_dim, lane_q);
  rows_to_lanes(gradient, head_dim, lane_dout);
  for (int64_t e = 0; e < head_dim; ++e) dq[e] = splat(0.0f);
  const f32x16 lse = load16(lane_lse), one = splat(1.0f);
  const float ones[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  for (int64_t first = 0; first < lanes.keys; first += kPage) {
    const int64_t count = block_end(first, lanes.keys);
    const Keys keys = sequence.keys(c, first);
    f32x16 prob[kPage], ds[kPage];
    dot_keys(lane_q, keys, count, head_dim, prob);
    hide_future(lanes, first, count, prob);
    dot_keys(lane_dout, sequence.values(c, first), count, head_dim, ds);
    alignas(64) float prob_rows[kPage][kLanes], ds_rows[kPage][kLanes];
    for (int64_t j = 0; j < count; ++j) {
      prob[j] = exp_row(prob[j] - lse);
      ds[j] = prob[j] * (ds[j] - delta);
      store16(prob_rows[j], prob[j]), store16(ds_rows[j], ds[j]);
    }
    mix_rows(dq, one, ds, keys, count, head_dim);
    float* dkeys = sequence.dqkv(sequence.k(c, first));
    float* dvalues = sequence.dqkv(sequence.v(c, first));
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) {
      add_products<4>(dkeys + j * width, width, ones, ds_rows + j, q, stride, lanes.count, head_dim);
      add_products<4>(dvalues + j * width, width, ones, prob_rows + j, dout, stride, lanes.count, head_dim);
    }
    for (; j < count; ++j) {
      add_products<1>(dkeys + j * width, width, ones, ds_rows + j, q, stride, lanes.count, head_dim);
      add_products<1>(dvalues + j * width, width, ones, prob_rows + j, dout, stride, lanes.count, head_dim);
    }
  }
  float* out[kQueries];
  for (int i = 0; i < lanes.count; ++i) out[i] = sequence.dqkv(sequence.q(lanes.head[i], lanes.at[i]));
  lanes_to_rows(dq, head_dim, lanes.count, out);
}

void backward_sequence(const Sequence& sequence, int64_t c) {
  const int64_t group = sequence.p.heads / sequence.p.kv_heads, bytes = sequence.p.head_dim * sizeof(float);
  for (int64_t i = 0; i < sequence.count; ++i) {
    memset(sequence.dqkv(sequence.k(c, i)), 0, bytes);
    memset(sequence.dqkv(sequence.v(c, i)), 0, bytes);
  }
  for (int64_t n = 0; n < sequence.count * group; n += kQueries)
    backward_lanes(sequence, c, Lanes(n, sequence.count * group, c * group, group));
}

// Tasks that together make kGrainFlops.
int64_t grain(int64_t tasks, int64_t flops) { return 1 + kGrainFlops * tasks / (1 + flops); }

int64_t training_flops(const AttentionParams& p, int64_t per_pair) {
  int64_t pairs = 0;
  for (int64_t b = 0; b < p.sequences; ++b) {
    const int64_t count = p.offsets[b + 1] - p.offsets[b];
    pairs += count * count;
  }
  return per_pair * pairs / 2 * p.heads * p.head_dim;
}

// The first sequence that ends behind `token`.
int64_t sequence_of(const AttentionParams& p, int64_t token) {
  int64_t low = 0, high = p.sequences;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (p.offsets[middle + 1] > token)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

}  // namespace

// Task n / K takes the pieces, kPiece positions long, that start in its kPiece tokens: few long sequences keep all
// threads busy, and short ones stay whole.
void attention_cpu(const AttentionParams& p) {
  const int64_t tasks = (p.offsets[p.sequences] + kPiece - 1) / kPiece * p.kv_heads;
  parallel_for(tasks, grain(tasks, training_flops(p, 4)), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t low = n / p.kv_heads * kPiece, high = low + kPiece;
      for (int64_t b = sequence_of(p, low); b < p.sequences && p.offsets[b] < high; ++b) {
        const Sequence sequence(p, b);
        int64_t i = sequence.first < low ? (low - sequence.first + kPiece - 1) / kPiece * kPiece : 0;
        for (; i < sequence.count && sequence.first + i < high; i += kPiece)
          attend_positions(sequence, n % p.kv_heads, i, i + kPiece < sequence.count ? i + kPiece : sequence.count);
      }
    }
  });
  clear_padding(p.offsets, p.sequences, p.tokens, p.out, p.heads * p.head_dim);
  memset(p.lse + p.offsets[p.sequences] * p.heads, 0, (p.tokens - p.offsets[p.sequences]) * p.heads * sizeof(float));
}

void attention_backward_cpu(const AttentionParams& p) {
  const int64_t tasks = p.sequences * p.kv_heads;
  parallel_for(tasks, grain(tasks, training_flops(p, 10)), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) backward_sequence(Sequence(p, n / p.kv_heads), n % p.kv_heads);
  });
  clear_padding(p.offsets, p.sequences, p.tokens, p.dqkv, (p.heads + 2 * p.kv_heads) * p.head_dim);
}

void paged_attention_cpu(const PagedAttentionParams& p) {
  const int64_t tasks = p.rows * p.kv_heads, group = p.heads / p.kv_heads;
  int64_t keys = 0, longest = 0, length = 0;
  for (int64_t r = 0; r < p.rows; ++r) {
    if (p.slot[r] < 0) continue;
    const int64_t limit = p.positions < p.columns * kPage ? p.positions : p.columns * kPage;
    if (p.slot[r] >= p.slots || p.position[r] < 0 || p.position[r] >= limit)
      fail("paged_attention: row ", r, " has slot ", p.slot[r], " and position ", p.position[r], "; slots must be in ",
           "[-1, ", p.slots, "), positions in [0, ", limit, ") (rope's rows, and 16 per column of table)");
    length = continues_run(p, r) ? length + 1 : 1;
    longest = length > longest ? length : longest;
    keys += p.position[r] + 1;
  }
  const int64_t step = grain(tasks, 4 * keys * p.heads * p.head_dim);
  parallel_for(tasks, step, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t r = n / p.kv_heads, c = n % p.kv_heads;
      if (p.slot[r] < 0) {
        float* out = static_cast<float*>(p.out) + (r * p.heads + c * group) * p.head_dim;
        memset(out, 0, group * p.head_dim * sizeof(float));
      } else if (!continues_run(p, r)) {
        const Run run(p, r);
        run.write(c);
        if (run.end - run.begin <= kPiece) attend_run(run, c, run.begin, run.end);
      }
    }
  });
  if (longest <= kPiece) return;
  parallel_for(tasks, step, [&](int64_t begin, int64_t end) {  // long runs, now that all their keys are written
    for (int64_t n = begin; n < end; ++n) {
      int64_t first = n / p.kv_heads;
      const int64_t r = first;
      if (p.slot[r] < 0) continue;
      while (continues_run(p, first)) --first;
      const Run run(p, first);
      const int64_t at = p.position[r];
      if (run.end - run.begin > kPiece && (at - run.begin) % kPiece == 0)
        attend_positions(run, n % p.kv_heads, at, at + kPiece < run.end ? at + kPiece : run.end);
    }
  });
}

}  // namespace PYMATHRL_LEVEL
}  // namespace pymathrl
