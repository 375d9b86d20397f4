// token_logprob: logp[n] = z[n,y[n]]/T - lse[n], lse = logsumexp(z[n,:]/T), and what else one sweep over the row gives:
//   entropy = -sum p ln p,  mean_logp = mean_j(z_j)/T - lse (ROVER, arXiv 2509.24981),  top_prob = max p,  all over the
//   tokens whose logit is not -inf (the update puts -inf where the sampler's filters cut),
//   proxy_logp = z_y/T - logsumexp over {j: p_j >= min_p * max p} (Lp-Reg, arXiv 2510.03222); -1e4 where y is not in it.
// Backward: dz_j = (g/T)(1[j=y] - p_j) + (gH/T)(-p_j (ln p_j + H)); a row with g = gH = 0 gives exact zeros, even where
// its logits are inf or nan; a logit of -inf gets 0. Only logp and entropy have a gradient: the others enter constants of
// the losses.
// N rows, V vocabulary, fp32/bf16/fp16 logits of s bytes, fp32 mathematics.
// Bytes: forward sNV, backward 2sNV (in place or not); N=8192 V=151936 bf16: 2.49 and 4.98 GB = 0.74 and 1.49 ms at
// 3.35 TB/s. About 10 flop per byte: memory-bound on a GPU; on a CPU the exp of a row costs as much as its bytes.
#pragma once
#include "common/row_softmax.h"

namespace pymathrl {

constexpr float kProxyFloor = -1e4f;  // of a filtered token, as published: k3 of it overflows to no gradient

struct TokenLogprobParams {
  const void* logits;   // [N,V] of `dtype`, rows `row_stride` elements apart
  const int64_t* ids;   // [N] in [0,V); on a GPU a row with another id gives nan, and nothing is read out of bounds
  float* logp;          // [N] out, nats
  float* entropy;       // [N] out, nats
  float* mean_logp;     // [N] out, nats
  float* top_prob;      // [N] out
  double* lse;          // [N] out, nats
  float* proxy_logp;    // [N] out, nats, or null
  int64_t rows, width, row_stride;
  DType dtype;
  double temperature;   // > 0
  double min_p;         // [0,1], of proxy_logp
};

struct TokenLogprobGradParams {
  const void* logits;     // [N,V] of `dtype`, rows `row_stride` elements apart
  const int64_t* ids;     // [N]
  const double* lse;      // [N] nats, of the forward
  const float* entropy;   // [N] nats, of the forward; null where grad_entropy is
  const float* grad_logp;     // [N] or null (zero)
  const float* grad_entropy;  // [N] or null (zero)
  void* dlogits;          // [N,V] out, of `dtype`, rows `grad_stride` elements apart; may be `logits` itself
  int64_t rows, width, row_stride, grad_stride;
  DType dtype;
  double temperature;
};

void token_logprob_cpu(const TokenLogprobParams& p);
void token_logprob_cuda(const TokenLogprobParams& p, int device, void* stream);
void token_logprob_backward_cpu(const TokenLogprobGradParams& p);
void token_logprob_backward_cuda(const TokenLogprobGradParams& p, int device, void* stream);

// Writes one row's results. z_y: the logit of the row's token, nan where the id is out of range; e_y: its exp(d).
HD void token_logprob_finish(const TokenLogprobParams& p, int64_t row, const RowSums& sums, float z_y, float e_y) {
  RowStats stats = finish_row(sums, 1.0 / p.temperature);
  float d = row_distance(z_y, sums.max, static_cast<float>(1.0 / p.temperature));
  p.logp[row] = static_cast<float>(d - stats.log_sum);
  p.entropy[row] = stats.entropy;
  p.mean_logp[row] = stats.mean_logp;
  p.top_prob[row] = stats.top_prob;
  p.lse[row] = stats.lse;
  if (!p.proxy_logp) return;
  bool filtered = e_y < min_p_threshold(p.min_p) || e_y == 0.0f;
  p.proxy_logp[row] = filtered ? kProxyFloor : static_cast<float>(d - log(sums.kept));
}

// What one row of the backward needs. logp_j = (z_j - anchor)/T - rest: `anchor` is T lse in fp32, `rest` what that
// rounding left, so that logp_j is as exact near 0 as the forward's.
struct TokenGrad {
  float anchor, rest, inverse_t, weight, entropy_weight, entropy;
  HD float logp(float z) const { return row_distance(z, anchor, inverse_t) - rest; }
};

HD TokenGrad token_grad(const TokenLogprobGradParams& p, int64_t row) {
  TokenGrad g;
  double inverse = 1.0 / p.temperature;
  g.inverse_t = static_cast<float>(inverse);
  g.anchor = static_cast<float>(p.lse[row] * p.temperature);
  g.rest = static_cast<float>(p.lse[row] - static_cast<double>(g.anchor) * inverse);
  g.weight = p.grad_logp ? static_cast<float>(p.grad_logp[row] * inverse) : 0.0f;
  g.entropy_weight = p.grad_entropy ? static_cast<float>(p.grad_entropy[row] * inverse) : 0.0f;
  g.entropy = p.grad_entropy ? p.entropy[row] : 0.0f;
  return g;
}

// dz of a token that is not the row's own; F: float or f32x16, probability = exp(logp).
template <class F> HD F token_grad_other(const TokenGrad& g, F logp, F probability) {
  F inner = (logp + g.entropy) * g.entropy_weight + g.weight;
  return pick(probability > 0.0f, -probability * inner, 0.0f);  // a masked token: 0 * -inf counts as 0
}

// dz of the row's own token: 1 - p by expm1, which keeps its digits where p is almost 1. A logit of -inf is a mask's
// constant: without this line its token would get the weight g.
HD float token_grad_own(const TokenGrad& g, float logp) {
  if (logp == -kInf) return 0.0f;
  float probability = exp_row(logp);
  float entropy_part = probability > 0.0f ? -probability * (g.entropy_weight * (logp + g.entropy)) : 0.0f;
  return -g.weight * expm1f(logp) + entropy_part;
}

}  // namespace pymathrl
