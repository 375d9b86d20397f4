// One row of logits -> the sums every log-prob comes from. token_logprob and sample_token call the same function, so the
// log-prob that the sampler reports is, bit for bit, the one that the update computes.
//   d_j = (z_j - max z) / T <= 0,  e_j = exp(d_j),  S = sum e_j
//   lse = max/T + ln S,  logp_j = d_j - ln S,  H = ln S - sum(e_j d_j) / S,  mean_j(logp_j) = mean(d_j) - ln S,  p_max = 1/S
// A logit of -inf is a token outside the support: no sum, mean or count includes it. The sampler's filters are such a mask,
// so the numbers of a filtered row are those of its renormalised distribution.
// Everything is measured from the row's maximum: no overflow, and no cancellation between lse and z/T.
// A sum runs over parts of kRowPart elements (fp32, kLanes lanes), parts within a block of kRowBlock, and blocks in double
// and in order: its bits depend on the row's width alone, not on threads, other rows or the vector extension. No lane adds
// more than 8 numbers in a row: with 64 the sum of a row whose largest e is 1 was wrong by 3e-7.
#pragma once
#include "common/half.h"
#include "common/tensor.h"

namespace pymathrl {

constexpr int64_t kRowBlock = 1024, kRowPart = 128;

// Filters compare probabilities that were rounded on their way here (ln, fp32, exp), so that "p >= 0.02 pmax" or "the
// first two make up 0.8" may miss an exact equality by some 1e-7. Within this relative slack equal means equal.
constexpr double kTie = 1e-6;

// min-p keeps the tokens with e_j at or above this: e of the most probable token is exactly 1.
HD float min_p_threshold(double min_p) { return static_cast<float>(min_p * (1.0 - kTie)); }

// e^x for x <= 0 (and the rounding error above 0), within 1.2 ulp; exactly 1 at 0; 0 below -87, where e^x leaves the
// normal numbers; nan stays nan. x = n ln2 + r; the minimax polynomial of degree 6 is within 3e-9. The number n comes
// from the low bits of t (1.5 * 2^23 + n), which saves the conversion to an integer. F: float or f32x16.
template <class F> HD F exp_row(F x) {
  F clamped = pick(x < -87.0f, -87.0f, x);
  F t = clamped * 1.44269504f + 12582912.0f;
  F n = t - 12582912.0f;
  F r = (clamped - n * 0.693145752f) - n * 1.42860677e-6f;
  F p = r * 1.38145394e-3f + 8.36874545e-3f;
  p = p * r + 4.16683890e-2f;
  p = p * r + 1.66665211e-1f;
  p = p * r + 4.99999940e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  F y = p * as_float((as_bits(t) + 127u) << 23);
  return pick(x < -87.0f, 0.0f, y);
}

struct RowSums {
  float max;
  double e, ed, d;  // sum of e_j, e_j d_j, d_j
  double kept;      // sum of e_j over e_j >= threshold
  int64_t count;    // tokens that d sums over: those whose logit is not -inf
};

struct RowStats {
  double log_sum;  // ln S
  double lse;      // nats, of z/T. Double: the backward recovers p_j from it, and fp32 at lse = 20 is 1e-6 coarse
  float entropy, mean_logp, top_prob;
};

// False where the row has a nan or +inf, or nothing but -inf.
HD bool has_distribution(const RowSums& s) { return s.e > 0 && s.e < 1e300; }

// nan everywhere where there is no distribution.
HD RowStats finish_row(const RowSums& s, double inverse_t) {
  RowStats r;
  double sum = has_distribution(s) ? s.e : static_cast<double>(NAN);
  r.log_sum = log(sum);
  r.lse = static_cast<double>(s.max) * inverse_t + r.log_sum;
  r.entropy = static_cast<float>(r.log_sum - s.ed / sum);
  r.mean_logp = static_cast<float>(s.d / static_cast<double>(s.count) - r.log_sum);
  r.top_prob = static_cast<float>(1.0 / sum);
  return r;
}

// d of one logit or of sixteen, by the same operations.
template <class F> HD F row_distance(F z, float max, float inverse_t) { return (z - max) * inverse_t; }

HD int64_t row_blocks(int64_t width) { return (width + kRowBlock - 1) / kRowBlock; }

inline int64_t dtype_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline const void* row_at(const void* logits, DType dtype, int64_t offset) {
  return static_cast<const char*>(logits) + offset * dtype_size(dtype);
}

inline float row_element(const void* row, DType dtype, int64_t j) {
  if (dtype == DType::f32) return static_cast<const float*>(row)[j];
  if (dtype == DType::bf16) return to_f32(static_cast<const bf16*>(row)[j]);
  return to_f32(static_cast<const f16*>(row)[j]);
}

}  // namespace pymathrl
