// Compiled once per processor level (CMakeLists.txt): plain loops over one row, no library templates, so that nothing built
// for a newer processor can be linked into the path of an older one.
#include "row_kernels.h"

#include "common/simd.h"

namespace pymathrl {
inline namespace PYMATHRL_LEVEL {
namespace {

template <class In> HD float max_of(const In* z, int64_t width) {
  f32x16 m0 = splat(-kInf), m1 = m0;  // two chains: a maximum waits 2-4 cycles for the one before
  int64_t j = 0;
  for (; j + 2 * kLanes <= width; j += 2 * kLanes) {
    f32x16 a = load16(z + j), b = load16(z + j + kLanes);
    m0 = pick(a > m0, a, m0);
    m1 = pick(b > m1, b, m1);
  }
  for (; j < width; j += kLanes) {
    f32x16 a = j + kLanes <= width ? load16(z + j) : load_part(z + j, width - j, -kInf);
    m0 = pick(a > m0, a, m0);
  }
  m0 = pick(m1 > m0, m1, m0);
  float lane[kLanes], max = -kInf;
  store16(lane, m0);
  for (int i = 0; i < kLanes; ++i) max = lane[i] > max ? lane[i] : max;
  return max;
}

template <class In> HD f32x16 load_some(const In* p, int64_t count, float fill) {
  return count == kLanes ? load16(p) : load_part(p, count, fill);
}

struct BlockSums {
  f32x16 e = splat(0.0f), ed = e, d = e, kept = e, count = e;

  HD void add(const BlockSums& part) {
    e += part.e;
    ed += part.ed;
    d += part.d;
    kept += part.kept;
    count += part.count;
  }

  HD void add(f32x16 y, f32x16 x) {
    e += y;
    ed += pick(y > 0.0f, y * x, 0.0f);  // a masked token: 0 * -inf counts as 0
  }

  // Of the tokens inside the support: count, and their distances.
  HD void reach(mask16 inside, f32x16 x) {
    d += pick(inside, x, 0.0f);
    count += pick(inside, splat(1.0f), 0.0f);
  }
};

// The order of every sum over a row: each(part, j, count) adds the sixteen elements from j on (count < kLanes at the row's
// end) to the sums of its part, and done(block, sums) takes the sums of each block.
template <class Each, class Done> HD void sum_in_order(int64_t width, const Each& each, const Done& done) {
  for (int64_t begin = 0; begin < width; begin += kRowBlock) {
    int64_t end = begin + kRowBlock < width ? begin + kRowBlock : width, j = begin;
    BlockSums block;
    while (j < end) {
      int64_t stop = j + kRowPart < end ? j + kRowPart : end;
      BlockSums part;
      for (; j + kLanes <= stop; j += kLanes) each(part, j, int64_t{kLanes});
      if (j < stop) {
        each(part, j, stop - j);
        j = stop;
      }
      block.add(part);
    }
    done(begin / kRowBlock, block);
  }
}

// d and the count of a row some of whose logits are -inf.
template <class In> void support_reach(const In* z, int64_t width, float inverse_t, RowSums& s) {
  s.d = 0;
  s.count = 0;
  sum_in_order(
      width,
      [&](BlockSums& part, int64_t j, int64_t count) __attribute__((always_inline)) {
        f32x16 logit = load_some(z + j, count, -kInf);
        part.reach(logit > -kInf, row_distance(logit, s.max, inverse_t));
      },
      [&](int64_t, const BlockSums& block) __attribute__((always_inline)) {
        s.d += sum_lanes(block.d);
        s.count += static_cast<int64_t>(sum_lanes(block.count));
      });
}

template <class In>
HD RowSums sums_of(const In* z, int64_t width, float max, float inverse_t, float threshold, float* block_sum, float* e,
                   const In* next) {
  RowSums s{max, 0, 0, 0, 0, width};
  sum_in_order(
      width,
      [&](BlockSums& part, int64_t j, int64_t count) __attribute__((always_inline)) {
        if (next) __builtin_prefetch(next + j, 0, 2);
        f32x16 x = row_distance(load_some(z + j, count, 0.0f), max, inverse_t), y = exp_row(x);
        if (e) store_some(e + j, count, y);
        if (count < kLanes) {
          mask16 exists = first_lanes(static_cast<int>(count));
          x = pick(exists, x, 0.0f);
          y = pick(exists, y, 0.0f);
        }
        part.add(y, x);
        part.d += x;
        part.kept += pick(y >= threshold, y, 0.0f);
      },
      [&](int64_t b, const BlockSums& block) __attribute__((always_inline)) {
        float sum = sum_lanes(block.e);
        if (block_sum) block_sum[b] = sum;
        s.e += sum;
        s.ed += sum_lanes(block.ed);
        s.d += sum_lanes(block.d);
        s.kept += sum_lanes(block.kept);
      });
  if (s.d == -kInf) support_reach(z, width, inverse_t, s);
  return s;
}

// The logit where it is kept, -inf where it is cut; j: the index of lane 0.
HD f32x16 filter_lanes(f32x16 z, f32x16 e, int64_t j, const Cut& cut) {
  int64_t last = cut.index - j;
  mask16 among_first = first_lanes(last < 0 ? 0 : (last < kLanes ? static_cast<int>(last) + 1 : kLanes));
  f32x16 kept = pick(z > cut.z, z, pick(z == cut.z, pick(among_first, z, -kInf), -kInf));
  return pick(e >= cut.floor, kept, -kInf);
}

// Bit k of the result: whether lane k is true. A sum of distinct powers of two is exact in any order.
HD uint32_t lane_bits(mask16 mask) {
  float power[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) power[lane] = static_cast<float>(1 << lane);
  return static_cast<uint32_t>(sum_lanes(pick(mask, load16(power), 0.0f)));
}

template <class In>
HD RowSums filter_of(const In* z, int64_t width, const Cut cut, float max, float inverse_t, float* e, float* block_sum,
                     uint8_t* support) {
  RowSums s{max, 0, 0, 0, 0, 0};
  sum_in_order(
      width,
      [&](BlockSums& part, int64_t j, int64_t count) __attribute__((always_inline)) {
        f32x16 y = load_some(e + j, count, 0.0f);
        f32x16 logit = filter_lanes(load_some(z + j, count, -kInf), y, j, cut);
        mask16 inside = logit > -kInf;
        f32x16 x = row_distance(logit, max, inverse_t);
        y = pick(inside, y, 0.0f);
        store_some(e + j, count, y);
        part.add(y, x);
        part.reach(inside, x);
        if (support) {
          uint32_t bits = lane_bits(inside);
          support[j / 8] = static_cast<uint8_t>(bits);
          if (count > 8) support[j / 8 + 1] = static_cast<uint8_t>(bits >> 8);
        }
      },
      [&](int64_t b, const BlockSums& block) __attribute__((always_inline)) {
        block_sum[b] = sum_lanes(block.e);
        s.e += block_sum[b];
        s.ed += sum_lanes(block.ed);
        s.d += sum_lanes(block.d);
        s.count += static_cast<int64_t>(sum_lanes(block.count));
      });
  return s;
}

// The first j < count at which acc + e_0 + ... + e_j exceeds target, and e_j > 0: groups of kLanes first, then the group.
// The group sums add up to the block's sum only within rounding: where the target is not met, the last e_j > 0.
int64_t find_in_block(const float* e, int64_t count, double acc, double target) {
  int64_t group = -1;
  double start = acc;
  for (int64_t j = 0; j < count; j += kLanes) {
    f32x16 y = count - j >= kLanes ? load16(e + j) : load_part(e + j, count - j, 0.0f);
    float sum = sum_lanes(y);
    if (sum > 0.0f) {
      group = j;
      start = acc;
    }
    acc += sum;
    if (sum > 0.0f && acc > target) break;
  }
  if (group < 0) return -1;
  int64_t found = group;
  for (int64_t j = group; j < group + kLanes && j < count; ++j) {
    if (!(e[j] > 0.0f)) continue;
    found = j;
    start += e[j];
    if (start > target) break;
  }
  return found;
}

template <bool kEntropy> HD f32x16 grad_part(const TokenGrad& g, f32x16 z) {
  f32x16 logp = row_distance(z, g.anchor, g.inverse_t) - g.rest;
  f32x16 probability = exp_row(logp);
  return kEntropy ? token_grad_other(g, logp, probability) : -probability * g.weight;
}

template <class T, bool kEntropy>
HD void grad_row(const T* z, T* dz, int64_t width, int64_t y, const TokenGrad& g) {
  float own = token_grad_own(g, g.logp(to_f32(z[y])));  // before dz overwrites z
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) store16(dz + j, grad_part<kEntropy>(g, load16(z + j)));
  if (j < width) store_part(dz + j, width - j, grad_part<kEntropy>(g, load_part(z + j, width - j, 0.0f)));
  dz[y] = from_f32<T>(own);
}

template <class T>
HD void grad_row_any(const TokenLogprobGradParams& p, int64_t row, const TokenGrad& g) {
  auto z = static_cast<const T*>(p.logits) + row * p.row_stride;
  auto dz = static_cast<T*>(p.dlogits) + row * p.grad_stride;
  if (p.grad_entropy)
    grad_row<T, true>(z, dz, p.width, p.ids[row], g);
  else
    grad_row<T, false>(z, dz, p.width, p.ids[row], g);
}

void gradient(const TokenLogprobGradParams& p, int64_t row) {
  TokenGrad g = token_grad(p, row);
  if (g.weight == 0.0f && g.entropy_weight == 0.0f) {
    memset(static_cast<char*>(p.dlogits) + row * p.grad_stride * dtype_size(p.dtype), 0, p.width * dtype_size(p.dtype));
    return;
  }
  if (p.dtype == DType::f32)
    grad_row_any<float>(p, row, g);
  else if (p.dtype == DType::bf16)
    grad_row_any<bf16>(p, row, g);
  else
    grad_row_any<f16>(p, row, g);
}

void mix(const float* weights, const float* const* entries, int64_t count, int64_t columns, float* const* out) {
  for_parts(columns, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
    f32x16 sum[kMixRows];
    for (int r = 0; r < kMixRows; ++r) sum[r] = splat(0.0f);
    auto add = [&](int64_t i, f32x16 entry) __attribute__((always_inline)) {
      for (int r = 0; r < kMixRows; ++r) sum[r] += entry * weights[i * kMixRows + r];
    };
    if (n == kLanes)
      for (int64_t i = 0; i < count; ++i) add(i, load16(entries[i] + c));
    else
      for (int64_t i = 0; i < count; ++i) add(i, load_part(entries[i] + c, n, 0.0f));
    for (int r = 0; r < kMixRows; ++r) store_some(out[r] + c, n, load_some(out[r] + c, n, 0.0f) + sum[r]);
  });
}

double dot(const float* a, const float* b, int64_t width) {
  double sum = 0;
  sum_in_order(
      width,
      [&](BlockSums& part, int64_t j, int64_t count) __attribute__((always_inline)) {
        part.add(load_some(a + j, count, 0.0f), load_some(b + j, count, 0.0f));
      },
      [&](int64_t, const BlockSums& block) __attribute__((always_inline)) { sum += sum_lanes(block.ed); });
  return sum;
}

float max(const void* row, DType dtype, int64_t width) {
  if (dtype == DType::f32) return max_of(static_cast<const float*>(row), width);
  if (dtype == DType::bf16) return max_of(static_cast<const bf16*>(row), width);
  return max_of(static_cast<const f16*>(row), width);
}

template <class In>
RowSums sums_as(const void* row, int64_t width, float max, float inverse_t, float threshold, float* block_sum, float* e,
                const void* next) {
  return sums_of(static_cast<const In*>(row), width, max, inverse_t, threshold, block_sum, e,
                 static_cast<const In*>(next));
}

RowSums sums(const void* row, DType dtype, int64_t width, float max, float inverse_t, float threshold, float* block_sum,
             float* e, const void* next) {
  auto run = dtype == DType::f32 ? sums_as<float> : dtype == DType::bf16 ? sums_as<bf16> : sums_as<f16>;
  return run(row, width, max, inverse_t, threshold, block_sum, e, next);
}

template <class In>
RowSums filter_as(const void* row, int64_t width, const Cut& cut, float max, float inverse_t, float* e,
                  float* block_sum, uint8_t* support) {
  return filter_of(static_cast<const In*>(row), width, cut, max, inverse_t, e, block_sum, support);
}

RowSums filter(const void* row, DType dtype, int64_t width, const Cut& cut, float max, float inverse_t, float* e,
               float* block_sum, uint8_t* support) {
  auto run = dtype == DType::f32 ? filter_as<float> : dtype == DType::bf16 ? filter_as<bf16> : filter_as<f16>;
  return run(row, width, cut, max, inverse_t, e, block_sum, support);
}

}  // namespace

extern const RowKernels kernels;
const RowKernels kernels = {max, sums, filter, find_in_block, gradient, mix, dot};

}  // namespace PYMATHRL_LEVEL
}  // namespace pymathrl
