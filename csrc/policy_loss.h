// policy_loss: sum_n c[n] l[n], its gradient G[n] = c[n] dl[n]/dlogp[n], and the counters, in one pass over N tokens.
//   x = logp - old, r = e^x, A = advantage, c = aggregation coefficient (1/N, 1/(B L), ...); everything is minimised.
//   clip      max(-A min(r, delta), -A clip(r, 1-low, 1+high)); A < 0: at most -A dual          (PPO, GRPO, DAPO)
//   weighted  -w A logp, w = 1 or sg(clip(r, low, high))                                        (REINFORCE, CISPO)
//   sequence  clip with s = exp(mean or sum of x over the sequence) in the place of r           (GSPO, RLOO)
//   rover     (Q - sg(A + beta Q'))^2, Q = rho x, Q' = rho (mean_logp[n+1] - old_mean_logp[n+1]) (ROVER);
//             over responses (Q - A)^2 with Q = rho (mean of x over the sequence)
//   lp_reg    clip; where selected and logp < proxy: -A r + coef k3(proxy - logp)               (Lp-Reg)
//   sapo      -A (4/tau) sigmoid(tau (r - 1)), tau by the sign of A                             (SAPO)
//   vespo     -sg(phi) A logp, phi = exp(k log w + lambda (1 - w)), w = exp(sum of x over the sequence), k and lambda by
//             the sign of A                                                                     (VESPO)
//   then l *= tis weight (a constant; vespo has it inside w); l += kl_coef KL(logp, ref), times r or not;
//   l -= entropy_coef H.
// Bytes: 17 to 21 per token read, 4 written: N = 65536 is 0.4 us at 3.35 TB/s, so a GPU call is bound by its launch.
#pragma once
#include "common/hd.h"

namespace pymathrl {

enum class Form : int { clip = 0, weighted = 1, sequence = 2, rover = 3, lp_reg = 4, sapo = 5, vespo = 6 };
enum class Kl : int { none = 0, k1 = 1, k2 = 2, k3 = 3, k1_straight = 4, k3_straight = 5 };
enum class Level : int { none = 0, token = 1, sequence = 2, geometric = 3 };

// The result of one call: the loss, then statistics over the active tokens. Sums add over chunks of a step; maxima and
// minima combine by max and min. A quantity that the form does not have keeps the identity (0, -inf, +inf).
enum Term : int {
  kLoss, kTokens, kClipLow, kClipHigh, kDualClip, kTisClipped, kSelected, kRatio, kLogRatio, kLogRatioAbs, kOldK3, kKl,
  kEntropy, kTisWeight, kTisWeightSquare, kQ, kNextQ, kTarget, kQAbove, kQBelow, kSums,
  kRatioMax = kSums, kLogRatioAbsMax, kTisWeightMax, kQMax, kNextQMax, kTargetMax, kMaxima,
  kQMin = kMaxima, kNextQMin, kTargetMin, kTerms
};
constexpr const char* kTermNames[kTerms] = {
    "loss", "tokens", "clip_low", "clip_high", "dual_clip", "tis_clipped", "selected", "ratio", "log_ratio",
    "log_ratio_abs", "old_k3", "kl", "entropy", "tis_weight", "tis_weight_square", "q", "next_q", "target", "q_above",
    "q_below", "ratio_max", "log_ratio_abs_max", "tis_weight_max", "q_max", "next_q_max", "target_max", "q_min",
    "next_q_min", "target_min"};

struct PolicyLossConfig {
  Form form;
  float clip_low, clip_high;  // clip, sequence, lp_reg: the range is [1-low, 1+high]
  float delta, dual_clip;     // clip, sequence: caps on the unclipped ratio and, for A < 0, on the loss / -A; inf = off
  bool ratio_weight;          // weighted: w = clip(r, weight_low, weight_high) instead of 1
  float weight_low, weight_high;
  bool sequence_mean;         // sequence: mean of x over the sequence instead of the sum
  float rho, beta;            // rover
  bool rover_response;        // rover: Q is rho times the mean of x over the sequence
  float q_low, q_high;        // rover: Q past these bounds and moving further out is cut; -inf, inf = off
  float lp_reg_coef;
  float tau_positive, tau_negative;                     // sapo: temperature where A > 0, where A <= 0
  float k_positive, lambda_positive, k_negative, lambda_negative;  // vespo: where A >= 0, where A < 0
  Kl kl;
  bool kl_ratio;              // the divergence of a token is multiplied by its r
  float kl_coef, entropy_coef;
  Level tis;
  bool tis_mask;              // a weight above the cap becomes 0 instead of the cap
  float tis_cap;
  double log_tis_cap;         // vespo adds it up over a sequence: in fp32 its rounding would add up too

  HD bool sequence_pass() const {
    return form == Form::sequence || form == Form::vespo || (form == Form::rover && rover_response) ||
           tis == Level::sequence || tis == Level::geometric;
  }
};

// N tokens, S sequences. Log-probs in nats. "null" = not given.
struct PolicyLossParams {
  const float* logp;            // [N] current policy
  const float* old_logp;        // [N] constant, or null: old = logp, so r = 1
  const float* advantage;       // [N] constant
  const float* coef;            // [N] aggregation coefficient; 0 = the token is not active
  const uint8_t* mask;          // [N] or null; 0 = not active
  const int64_t* offsets;       // [S+1] or null: first token of each sequence, the last entry is N
  const float* mean_logp;       // [N] or [N+1] or null (Q' = 0): mean over the vocabulary, current policy
  const float* old_mean_logp;   // the same of the old policy
  const uint8_t* link;          // [N] 1 = row n+1 scores the next token of the same sequence, and that one is sampled
  const float* proxy_logp;      // [N] Lp-Reg
  const uint8_t* selected;      // [N] Lp-Reg: candidates
  const float* ref_logp;        // [N] or null
  const float* entropy;         // [N] or null
  const float* behaviour_logp;  // [N] or null: the sampler's log-prob
  float* grad_logp;             // [N] out
  float* grad_entropy;          // [N] out or null
  float* result;                // [kTerms] out
  float* partial;               // workspace [kTerms * policy_loss_blocks(N, device)]
  float* sequence_work;         // workspace [3 N] where config.sequence_pass(), else null: SequenceValues by member
  int64_t n, sequences, mean_rows;
  PolicyLossConfig config;

  bool extras() const { return config.kl != Kl::none || config.tis != Level::none || entropy; }
};

constexpr int64_t kCpuBlock = 1024, kCudaBlock = 512;  // tokens per partial sum; added up in block order

inline int64_t policy_loss_blocks(int64_t n, bool cuda) {
  int64_t block = cuda ? kCudaBlock : kCpuBlock;
  return (n + block - 1) / block;
}

void policy_loss_cpu(const PolicyLossParams& p);
void policy_loss_cuda(const PolicyLossParams& p, int device, void* stream);

// A truth value as all ones or all zeros. gcc 12 vectorises bit operations on these and gives up on selects of bools.
using Mask = int32_t;
HD Mask mask_of(bool condition) { return -static_cast<int32_t>(condition); }
HD float keep(Mask mask, float x) {  // x or 0, also where x is nan or inf
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits_float(bits & mask);
}
HD float choose(Mask mask, float yes, float no) {
  int32_t y, n;
  memcpy(&y, &yes, sizeof y);
  memcpy(&n, &no, sizeof n);
  return bits_float((y & mask) | (n & ~mask));
}
HD float count_of(Mask mask) { return static_cast<float>(-mask); }

struct Token {
  float logp, old_logp, advantage, coef;
  float next_mean, next_old_mean;                 // rover: row n+1
  float proxy_logp, ref_logp, entropy, behaviour_logp;
  float sequence_x, sequence_gain, tis_x;         // from the sequence pass, SequenceValues
  float phi_positive, phi_negative;               // of vespo, in the place of the latter two
  Mask active, link, selected;
};

struct TokenResult {
  float grad_logp, grad_entropy;
  float term[kTerms];  // to be combined where active
  Mask active;
};

HD float term_identity(int k) { return k < kSums ? 0.0f : (k < kMaxima ? -kInf : kInf); }

// What a form leaves at its identity need not be reduced.
constexpr bool term_used(Form form, bool extras, int k) {
  bool of_rover = (k >= kQ && k < kSums) || k == kQMax || k == kNextQMax || k == kTargetMax || k >= kQMin;
  bool of_extras = k == kTisClipped || (k >= kKl && k <= kTisWeightSquare) || k == kTisWeightMax;
  if (of_rover) return form == Form::rover;
  if (of_extras) return extras;
  if (k == kSelected) return form == Form::lp_reg;
  if (k == kDualClip) return form == Form::clip || form == Form::sequence;
  return true;
}

// e^d - 1 - d. Near 0 the difference would keep no digits (d = 1e-3: the result is 5e-7, its rounding error 6e-8).
HD float exp_excess(float d) {
  float p = 1.98412698e-4f;
  p = p * d + 1.38888889e-3f;
  p = p * d + 8.33333333e-3f;
  p = p * d + 4.16666667e-2f;
  p = p * d + 1.66666667e-1f;
  p = p * d + 0.5f;
  return choose(mask_of(d > -0.25f) & mask_of(d < 0.25f), p * d * d, (exp_f32(d) - 1.0f) - d);
}

constexpr float kMaxLogRatio = 20.0f;          // e^20 = 4.9e8: beyond it a ratio carries no information
constexpr float kMaxSequenceLogRatio = 10.0f;  // as in verl's GSPO
constexpr double kMinWeightLogRatio = -18.420680743952367;  // log 1e-8: vespo's w stops here, phi is 2e-15 or less
constexpr float kMaxK3 = 10.0f;                // k3 stops here, and its gradient with it

struct Excess {
  float value, slope;  // k3 of d = other - logp, and dk3/dlogp = 1 - e^d
};

HD Excess bounded_k3(float d) {
  float bounded = clamp_f32(d, -kMaxLogRatio, kMaxLogRatio), value = exp_excess(bounded);
  Mask flat = mask_of(value > kMaxK3);
  return {choose(flat, kMaxK3, value), keep(~flat, -(value + bounded))};
}

// Comparisons are written so that nan reaches loss and gradient: a nan input is found, not clipped away.
template <Form F, bool kExtras>
HD TokenResult policy_token(const PolicyLossConfig& c, const Token& t) {
  float a = t.advantage, x = t.logp - t.old_logp;
  float bounded = clamp_f32(x, -kMaxLogRatio, kMaxLogRatio);
  Mask flat = mask_of(x < -kMaxLogRatio) | mask_of(x > kMaxLogRatio);  // a clamped ratio is a constant
  const float ratio = exp_f32(bounded);
  const Mask ratio_flat = flat;
  float r = ratio, loss, grad;  // r and flat become those of the sequence where the form is over sequences
  Mask low = 0, high = 0, dual = 0, selected = 0;
  float q = 0.0f, next_q = 0.0f, target = 0.0f;
  if (F == Form::clip || F == Form::sequence || F == Form::lp_reg) {
    float gain = 1.0f;
    if (F == Form::sequence) {
      flat = mask_of(t.sequence_x < -kMaxLogRatio) | mask_of(t.sequence_x > kMaxSequenceLogRatio);
      r = exp_f32(clamp_f32(t.sequence_x, -kMaxLogRatio, kMaxSequenceLogRatio));
      gain = t.sequence_gain;
    }
    float delta = F == Form::lp_reg ? kInf : c.delta;
    float free_arm = -a * (r > delta ? delta : r);
    float clip_arm = -a * clamp_f32(r, 1.0f - c.clip_low, 1.0f + c.clip_high);
    Mask clipped = mask_of(free_arm < clip_arm);  // inside the range the arms are equal and the gradient passes
    loss = choose(clipped, clip_arm, free_arm);
    grad = keep(~(clipped | mask_of(r >= delta) | flat), -a * r * gain);
    low = mask_of(a < 0.0f) & mask_of(r < 1.0f - c.clip_low);
    high = mask_of(a > 0.0f) & mask_of(r > 1.0f + c.clip_high);
    if (F == Form::lp_reg) {
      selected = t.selected & ~mask_of(t.logp >= t.proxy_logp);
      Excess k3 = bounded_k3(t.proxy_logp - t.logp);
      loss = choose(selected, -a * r + c.lp_reg_coef * k3.value, loss);
      grad = choose(selected, keep(~flat, -a * r) + c.lp_reg_coef * k3.slope, grad);
      low &= ~selected;
      high &= ~selected;
    } else {
      dual = mask_of(a < 0.0f) & mask_of(loss > -a * c.dual_clip);
      loss = choose(dual, -a * c.dual_clip, loss);
      grad = keep(~dual, grad);
    }
  } else if (F == Form::weighted) {
    Mask ratio_weight = mask_of(c.ratio_weight);
    float w = choose(ratio_weight, clamp_f32(r, c.weight_low, c.weight_high), 1.0f);
    loss = -w * a * t.logp;
    grad = -w * a;
    low = ratio_weight & mask_of(r < c.weight_low);
    high = ratio_weight & mask_of(r > c.weight_high);
  } else if (F == Form::sapo) {
    float tau = choose(mask_of(a > 0.0f), c.tau_positive, c.tau_negative), u = tau * (r - 1.0f);
    float e = exp_f32(u < 0.0f ? u : -u);  // at most 1: e^-u overflows where tau is large and r small
    float gate = choose(mask_of(u < 0.0f), e, 1.0f) / (1.0f + e);
    loss = -a * (4.0f / tau) * gate;
    grad = keep(~flat, -a * r * (4.0f * e / ((1.0f + e) * (1.0f + e))));
  } else if (F == Form::vespo) {
    float phi = choose(mask_of(a < 0.0f), t.phi_negative, t.phi_positive);
    r = exp_f32(t.sequence_x);
    loss = -phi * a * t.logp;
    grad = -phi * a;
  } else {
    q = c.rho * choose(mask_of(c.rover_response), t.sequence_x, x);
    next_q = keep(t.link, c.rho * (t.next_mean - t.next_old_mean));
    target = a + c.beta * next_q;
    low = mask_of(target < q) & mask_of(q < c.q_low);
    high = mask_of(target > q) & mask_of(q > c.q_high);
    float residual = choose(low, c.q_low, choose(high, c.q_high, q)) - target;
    loss = residual * residual;
    grad = keep(~(low | high), 2.0f * c.rho * residual);
  }

  float kl = 0.0f, weight = 1.0f;
  Mask over = 0;
  if (kExtras) {
    Mask tis = mask_of(c.tis != Level::none);
    float w = choose(mask_of(c.tis == Level::token), t.old_logp - t.behaviour_logp, t.tis_x);
    w = exp_f32(clamp_f32(w, -kMaxLogRatio, kMaxLogRatio));
    over = tis & mask_of(w > c.tis_cap);
    weight = choose(tis, choose(over, c.tis_mask ? 0.0f : c.tis_cap, w), 1.0f);
    if (F != Form::vespo) {
      loss *= weight;
      grad *= weight;
    }
    float d = t.logp - t.ref_logp;
    Excess k3 = bounded_k3(-d);
    Mask is_k1 = mask_of(c.kl == Kl::k1), is_k2 = mask_of(c.kl == Kl::k2), is_k3 = mask_of(c.kl == Kl::k3);
    Mask value_k1 = is_k1 | mask_of(c.kl == Kl::k1_straight), on = mask_of(c.kl != Kl::none);
    kl = keep(on, choose(value_k1, d, choose(is_k2, 0.5f * d * d, k3.value)));
    float slope = choose(is_k1, 1.0f, choose(is_k3, k3.slope, d));  // straight-through: the slope of k2
    Mask by_ratio = mask_of(c.kl_ratio);
    float factor = choose(by_ratio, ratio, 1.0f);
    slope = factor * (keep(on, slope) + keep(by_ratio & ~ratio_flat, kl));
    kl *= factor;
    loss += c.kl_coef * kl;
    grad += c.kl_coef * slope;
    loss -= c.entropy_coef * t.entropy;
  }

  TokenResult out;
  out.active = t.active;
  out.grad_logp = keep(t.active, t.coef * grad);  // bits, not a product: 0 * nan is nan
  out.grad_entropy = keep(t.active, -c.entropy_coef * t.coef);
  float* term = out.term;
  term[kLoss] = t.coef * loss;
  term[kTokens] = 1.0f;
  term[kClipLow] = count_of(low);
  term[kClipHigh] = count_of(high);
  term[kDualClip] = count_of(dual);
  term[kTisClipped] = count_of(over);
  term[kSelected] = count_of(selected);
  term[kRatio] = term[kRatioMax] = r;
  term[kLogRatio] = x;
  term[kLogRatioAbs] = term[kLogRatioAbsMax] = x < 0.0f ? -x : x;
  term[kOldK3] = exp_excess(bounded);
  term[kKl] = kl;
  term[kEntropy] = t.entropy;
  term[kTisWeight] = term[kTisWeightMax] = weight;
  term[kTisWeightSquare] = weight * weight;
  term[kQ] = term[kQMax] = term[kQMin] = q;
  term[kNextQ] = term[kNextQMax] = term[kNextQMin] = next_q;
  term[kTarget] = term[kTargetMax] = term[kTargetMin] = target;
  term[kQAbove] = count_of(mask_of(a > 0.0f) & mask_of(q > a));
  term[kQBelow] = count_of(mask_of(a < 0.0f) & mask_of(q < a));
  return out;
}

HD float combine_terms(int k, float a, float b) {
  if (k < kSums) return a + b;
  if (k < kMaxima) return a > b ? a : b;
  return a < b ? a : b;
}

// Adds term K of a token to a running value, where the form has it and the token counts.
template <Form F, bool kExtras, int K>
HD void add_term(float& own, const TokenResult& r) {
  if constexpr (term_used(F, kExtras, K)) own = combine_terms(K, own, K < kSums ? keep(r.active, r.term[K]) : choose(r.active, r.term[K], term_identity(K)));
}

HD bool token_active(const PolicyLossParams& p, int64_t n) { return (!p.mask || p.mask[n]) && p.coef[n] != 0.0f; }

HD double clamp_f64(double x, double lo, double hi) { return x < lo ? lo : (x > hi ? hi : x); }

// Sums of one sequence, in double: a 20,000-token sequence sums log-ratios of 1e-3.
struct SequenceSums {
  double x = 0, tis = 0, tokens = 0;
};

HD void sequence_add(const PolicyLossParams& p, int64_t n, SequenceSums& s) {
  if (!token_active(p, n)) return;
  float old_logp = p.old_logp ? p.old_logp[n] : p.logp[n];
  double x = static_cast<double>(p.logp[n]) - old_logp, tis = 0;
  if (p.behaviour_logp) tis = static_cast<double>(old_logp) - p.behaviour_logp[n];
  if (p.config.form == Form::vespo) {  // the weight of the sampler is a factor of w, token by token
    bool over = tis > p.config.log_tis_cap;
    tis = over ? (p.config.tis_mask ? kMinWeightLogRatio : p.config.log_tis_cap) : tis;
    x = clamp_f64(x, -kMaxLogRatio, kMaxLogRatio) + clamp_f64(tis, kMinWeightLogRatio, kMaxLogRatio);
  }
  s.x += x;
  s.tis += tis;
  s.tokens += 1;
}

// What the token pass needs to know of a sequence.
struct SequenceValues {
  float x;     // log s, rover's mean of x, or log w of vespo
  float gain;  // (ds/dlogp)/s; vespo: phi where A >= 0
  float tis;   // log TIS weight; vespo: phi where A < 0
};

HD SequenceValues sequence_values(const PolicyLossConfig& c, const SequenceSums& s) {
  double tokens = s.tokens > 0 ? s.tokens : 1.0;
  if (c.form == Form::vespo) {  // in double, once a sequence: phi = e^(k log w + lambda (1 - w)) has slope k - lambda w
    double log_w = clamp_f64(s.x, kMinWeightLogRatio, kMaxLogRatio), rest = 1.0 - exp(log_w);
    return {static_cast<float>(log_w), static_cast<float>(exp(c.k_positive * log_w + c.lambda_positive * rest)),
            static_cast<float>(exp(c.k_negative * log_w + c.lambda_negative * rest))};
  }
  return {static_cast<float>(c.sequence_mean ? s.x / tokens : s.x),
          c.sequence_mean ? 1.0f : static_cast<float>(tokens),
          static_cast<float>(c.tis == Level::geometric ? s.tis / tokens : s.tis)};
}

HD void sequence_write(const PolicyLossParams& p, int64_t n, const SequenceValues& v) {
  p.sequence_work[n] = v.x;
  p.sequence_work[p.n + n] = v.gain;
  p.sequence_work[2 * p.n + n] = v.tis;
}

}  // namespace pymathrl
