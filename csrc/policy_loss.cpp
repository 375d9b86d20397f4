#include "policy_loss.h"

#include <utility>

#include "common/parallel.h"
#include "common/tensor.h"

namespace pymathrl {
namespace {

// An input that was not given reads as zeros (or ones), so that the loop below has no branch per input.
struct Constants {
  float zero[kCpuBlock] = {};
  uint8_t none[kCpuBlock] = {};
  uint8_t all[kCpuBlock];
  Constants() {
    for (uint8_t& one : all) one = 1;
  }
};
const Constants kConstant;

// One block of tokens, from element 0.
struct Block {
  const float *logp, *old_logp, *advantage, *coef, *next_mean, *next_old_mean, *proxy_logp, *ref_logp, *entropy,
      *behaviour_logp, *sequence_x, *sequence_gain, *tis_x;
  const uint8_t *mask, *link, *selected;
  float *grad_logp, *grad_entropy;
};

using Lanes = float[kTerms][kLanes];

template <Form F, bool kExtras, int K>
HD void add_term(Lanes& lanes, int lane, const TokenResult& r) {
  if constexpr (term_used(F, kExtras, K)) lanes[K][lane] = combine_terms(K, lanes[K][lane], r.term[K]);
}

template <Form F, bool kExtras, int... K>
HD void add_terms(Lanes& lanes, int lane, const TokenResult& r, std::integer_sequence<int, K...>) {
  (add_term<F, kExtras, K>(lanes, lane, r), ...);
}

template <Form F, bool kExtras>
HD void one_token(const PolicyLossConfig& c, const Block& b, int64_t i, int lane, Lanes& lanes) {
  Token t{};
  t.logp = b.logp[i];
  t.old_logp = b.old_logp[i];
  t.advantage = b.advantage[i];
  t.coef = b.coef[i];
  t.active = (b.mask[i] != 0) & (t.coef != 0.0f);
  if (F == Form::rover) {
    t.next_mean = b.next_mean[i];
    t.next_old_mean = b.next_old_mean[i];
    t.link = b.link[i] != 0;
  }
  if (F == Form::lp_reg) {
    t.proxy_logp = b.proxy_logp[i];
    t.selected = b.selected[i] != 0;
  }
  if (F == Form::sequence) {
    t.sequence_x = b.sequence_x[i];
    t.sequence_gain = b.sequence_gain[i];
  }
  if (kExtras) {
    t.ref_logp = b.ref_logp[i];
    t.entropy = b.entropy[i];
    t.behaviour_logp = b.behaviour_logp[i];
    t.tis_x = b.tis_x[i];
  }
  TokenResult r = policy_token<F, kExtras>(c, t);
  b.grad_logp[i] = r.grad_logp;
  if (kExtras) b.grad_entropy[i] = r.grad_entropy;
  add_terms<F, kExtras>(lanes, lane, r, std::make_integer_sequence<int, kTerms>());
}

template <Form F, bool kExtras>
HD void run_block(const PolicyLossConfig& config, const Block& block, int64_t count, float* partial) {
  const PolicyLossConfig c = config;  // local copies: stores to the gradient cannot alias them
  const Block b = block;
  alignas(64) Lanes lanes;
  for (int k = 0; k < kTerms; ++k)
    for (int lane = 0; lane < kLanes; ++lane) lanes[k][lane] = term_identity(k);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) one_token<F, kExtras>(c, b, i + lane, lane, lanes);
  }
  for (int lane = 0; i + lane < count; ++lane) one_token<F, kExtras>(c, b, i + lane, lane, lanes);
  for (int k = 0; k < kTerms; ++k) {
    float value = lanes[k][0];
    if (k < kSums) value = sum_lanes(lanes[k]);
    else
      for (int lane = 1; lane < kLanes; ++lane) value = combine_terms(k, value, lanes[k][lane]);
    partial[k] = value;
  }
}

SIMD_CLONES void dispatch_block(const PolicyLossConfig& c, bool extras, const Block& b, int64_t count, float* partial) {
#define PYMATHRL_FORM(F)                                                    \
  case Form::F:                                                             \
    return extras ? run_block<Form::F, true>(c, b, count, partial)          \
                  : run_block<Form::F, false>(c, b, count, partial)
  switch (c.form) {
    PYMATHRL_FORM(clip);
    PYMATHRL_FORM(weighted);
    PYMATHRL_FORM(sequence);
    PYMATHRL_FORM(rover);
    PYMATHRL_FORM(lp_reg);
  }
#undef PYMATHRL_FORM
}

void token_block(const PolicyLossParams& p, int64_t index) {
  int64_t begin = index * kCpuBlock, count = p.n - begin < kCpuBlock ? p.n - begin : kCpuBlock;
  auto at = [begin](const float* x) { return x ? x + begin : kConstant.zero; };
  float unused[kCpuBlock], mean[kCpuBlock], old_mean[kCpuBlock];
  Block b;
  b.logp = p.logp + begin;
  b.old_logp = p.old_logp ? p.old_logp + begin : b.logp;
  b.advantage = p.advantage + begin;
  b.coef = p.coef + begin;
  b.mask = p.mask ? p.mask + begin : kConstant.all;
  b.next_mean = b.next_old_mean = kConstant.zero;
  b.link = p.mean_logp ? p.link + begin : kConstant.none;
  if (p.mean_logp && begin + count < p.mean_rows) {
    b.next_mean = p.mean_logp + begin + 1;
    b.next_old_mean = p.old_mean_logp + begin + 1;
  } else if (p.mean_logp) {  // the last row has no successor here; policy_loss_cpu checked that it has no link
    for (int64_t i = 0; i < count; ++i) {
      bool last = begin + i + 1 == p.mean_rows;
      mean[i] = last ? 0.0f : p.mean_logp[begin + i + 1];
      old_mean[i] = last ? 0.0f : p.old_mean_logp[begin + i + 1];
    }
    b.next_mean = mean;
    b.next_old_mean = old_mean;
  }
  b.proxy_logp = at(p.proxy_logp);
  b.selected = p.selected ? p.selected + begin : kConstant.none;
  b.ref_logp = at(p.ref_logp);
  b.entropy = at(p.entropy);
  b.behaviour_logp = at(p.behaviour_logp);
  b.sequence_x = at(p.sequence_work);
  b.sequence_gain = at(p.sequence_work ? p.sequence_work + p.n : nullptr);
  b.tis_x = at(p.sequence_work ? p.sequence_work + 2 * p.n : nullptr);
  b.grad_logp = p.grad_logp + begin;
  b.grad_entropy = p.grad_entropy ? p.grad_entropy + begin : unused;
  dispatch_block(p.config, p.extras(), b, count, p.partial + index * kTerms);
}

void check(const PolicyLossParams& p) {
  if (p.mean_logp && p.mean_rows == p.n && p.n > 0 && p.link[p.n - 1])
    fail("policy_loss: link is 1 at the last row, but mean_logp and old_mean_logp end there; give them N+1 = ", p.n + 1,
         " rows (the extra one is the row after this chunk)");
  if (!p.offsets) return;
  bool rising = p.offsets[0] == 0 && p.offsets[p.sequences] == p.n;
  for (int64_t s = 0; s < p.sequences; ++s) rising = rising && p.offsets[s] <= p.offsets[s + 1];
  if (!rising)
    fail("policy_loss: offsets must rise from 0 to N = ", p.n, ", got ", p.offsets[0], " ... ", p.offsets[p.sequences],
         "; a chunk must hold whole sequences");
}

}  // namespace

void policy_loss_cpu(const PolicyLossParams& p) {
  check(p);
  if (p.config.sequence_pass())
    parallel_for(p.sequences, 16, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        SequenceSums sums;
        for (int64_t n = p.offsets[s]; n < p.offsets[s + 1]; ++n) sequence_add(p, n, sums);
        for (int64_t n = p.offsets[s]; n < p.offsets[s + 1]; ++n) sequence_write(p, n, sums);
      }
    });
  int64_t blocks = policy_loss_blocks(p.n, false);
  parallel_for(blocks, 8, [&](int64_t begin, int64_t end) {  // 8 blocks: some 10 us, more than waking a thread costs
    for (int64_t b = begin; b < end; ++b) token_block(p, b);
  });
  for (int k = 0; k < kTerms; ++k) {
    if (k < kSums) {
      double sum = 0;
      for (int64_t b = 0; b < blocks; ++b) sum += p.partial[b * kTerms + k];
      p.result[k] = static_cast<float>(sum);
    } else {
      float value = term_identity(k);
      for (int64_t b = 0; b < blocks; ++b) value = combine_terms(k, value, p.partial[b * kTerms + k]);
      p.result[k] = value;
    }
  }
}

}  // namespace pymathrl
