// sample_token: one token per row from softmax(z/T), filtered by top-k, then top-p, then min-p, with the numbers that
// training needs from the same sweep.
//   u = philox_uniform(seed, uid, step, stream);  token = min {j : sum_{i<=j, kept} e_i > u * sum_{kept} e_i}
//   logp, entropy and mean_logp are of what the filters keep, renormalised: bit for bit what token_logprob gives for the
//   row with -inf in place of the logits that are cut (the same sums in the same order). `support` records what was kept.
// Filters act on tokens in the order of their logits, highest first, equal logits by index; each keeps a prefix of that
// order and at least one token:
//   top_k   the first k
//   top_p   until the mass of what is kept reaches top_p of the mass that top_k left
//   min_p   p_j >= min_p * p_max
// "reaches" and ">=" take equality within kTie. A token with e_j = 0 (logit -inf, or 87 T below the largest) is never
// drawn. T = 0 takes the largest logit, lowest index; its numbers are those at T = 1, filters have no effect.
// A row without a distribution (nan, +inf, or nothing but -inf) gives id -1 and nan.
// B rows, V vocabulary, logits of s bytes. Bytes: sBV once on a CPU (a row stays in L2 for the second look), once or twice
// on a GPU; with top-k or top-p about five more sweeps, from L2. B=64 V=151936 bf16: 19 MB, 6 us at 3.35 TB/s.
#pragma once
#include "common/philox.h"
#include "common/row_softmax.h"
#include "common/half.h"
#include "common/tensor.h"

namespace pymathrl {

// One bit per token of a row, bit j%8 of byte j/8.
HD int64_t support_bytes(int64_t width) { return (width + 7) / 8; }

struct SampleTokenParams {
  const void* logits;    // [B,V] of `dtype`, rows `row_stride` elements apart
  const int64_t* uid;    // [B] which sample a row belongs to
  const int64_t* step;   // [B] the position of the token within its sample; its low 32 bits count
  int64_t* ids;          // [B] out
  float* logp;           // [B] out, nats
  float* entropy;        // [B] out, nats
  float* mean_logp;      // [B] out, nats
  float* kept_mass;      // [B] out, the share of the probability that the filters left; 1 without filters
  uint8_t* support;      // [B, support_bytes(V)] out, or null: bit j%8 of byte j/8 set where token j was kept
  int64_t rows, width, row_stride;
  DType dtype;
  uint64_t seed;
  uint32_t stream;
  double temperature;    // >= 0; 0 = greedy
  int64_t top_k;         // 0 = off
  double top_p;          // [0,1]; 1 = off
  double min_p;          // [0,1]; 0 = off
};

void sample_token_cpu(const SampleTokenParams& p);
void sample_token_cuda(const SampleTokenParams& p, int device, void* stream);

// What is kept: e >= floor, and in the order of the filters not after (z, index).
struct Cut {
  float floor = 0.0f, z = -kInf;
  int64_t index = INT64_MAX;
  HD bool keeps(float e, float value, int64_t j) const {
    return e >= floor && (value > z || (value == z && j <= index));
  }
};

// The cut of top-k alone, 0 < k < width, on a CPU.
Cut top_k_cut(const void* row, DType dtype, int64_t width, int64_t k);

HD double sample_temperature(const SampleTokenParams& p) { return p.temperature == 0.0 ? 1.0 : p.temperature; }
HD bool by_top_k(const SampleTokenParams& p) { return p.top_k > 0 && p.top_k < p.width; }
HD bool by_top_p(const SampleTokenParams& p) { return p.top_p < 1.0; }
HD bool filtered(const SampleTokenParams& p) {
  return p.temperature != 0.0 && (by_top_k(p) || by_top_p(p) || p.min_p > 0.0);
}

// The mass at which top-p stops, of the mass before it.
HD double top_p_target(const SampleTokenParams& p, double mass) { return p.top_p * mass * (1.0 - kTie); }

HD double sample_uniform(const SampleTokenParams& p, int64_t row) {
  return philox_uniform(p.seed, static_cast<uint64_t>(p.uid[row]), static_cast<uint32_t>(p.step[row]), p.stream);
}

HD uint8_t* support_row(const SampleTokenParams& p, int64_t row) {
  return p.support ? p.support + row * support_bytes(p.width) : nullptr;
}

// Writes one row's numbers. kept: the sums over what is kept, `sums` itself without filters.
HD void sample_token_finish(const SampleTokenParams& p, int64_t row, int64_t id, float z_id, const RowSums& sums,
                            const RowSums& kept) {
  const double inverse = 1.0 / sample_temperature(p), share = kept.e / sums.e;
  const RowStats stats = finish_row(kept, inverse);
  p.ids[row] = id;
  p.logp[row] = static_cast<float>(row_distance(z_id, kept.max, static_cast<float>(inverse)) - stats.log_sum);
  p.entropy[row] = stats.entropy;
  p.mean_logp[row] = stats.mean_logp;
  p.kept_mass[row] = static_cast<float>(share < 1.0 ? share : 1.0);
}

// The row without a distribution: its support is empty.
HD void sample_token_fail(const SampleTokenParams& p, int64_t row) {
  const float nan = as_float(0x7fc00000u);
  p.ids[row] = -1;
  p.logp[row] = p.entropy[row] = p.mean_logp[row] = p.kept_mass[row] = nan;
  if (p.support) memset(support_row(p, row), 0, static_cast<size_t>(support_bytes(p.width)));
}

}  // namespace pymathrl
