#include "policy_loss.h"

#include <cstring>
#include <utility>

#include "common/parallel.h"
#include "common/tensor.h"

namespace pymathrl {
namespace {

// Inputs of a block, from its first token. One that was not given reads as zeros, so that the loop has no branch per
// input. Truth values come as Mask: a byte in the loop would make gcc count in vectors of bytes.
enum Input { kLogp, kOldLogp, kAdvantage, kCoef, kNextMean, kNextOldMean, kProxy, kRef, kEntropyIn, kBehaviour,
             kSequenceX, kSequenceGain, kTisX, kInputs };
enum Flag { kActive, kLink, kCandidate, kFlags };

struct Block {
  const float* in[kInputs];
  const Mask* flag[kFlags];
  float *grad_logp, *grad_entropy;
};

const float kZeros[kCpuBlock] = {};
const Mask kNone[kCpuBlock] = {};

using Lanes = float[kTerms][kLanes];

template <Form F, bool kExtras, int... K>
HD void add_terms(Lanes& lanes, int lane, const TokenResult& r, std::integer_sequence<int, K...>) {
  (add_term<F, kExtras, K>(lanes[K][lane], r), ...);
}

template <Form F, bool kExtras>
HD void one_token(const PolicyLossConfig& c, const Block& b, int64_t i, int lane, Lanes& lanes) {
  Token t{};
  t.logp = b.in[kLogp][i];
  t.old_logp = b.in[kOldLogp][i];
  t.advantage = b.in[kAdvantage][i];
  t.coef = b.in[kCoef][i];
  t.active = b.flag[kActive][i];
  if (F == Form::rover) {
    t.next_mean = b.in[kNextMean][i];
    t.next_old_mean = b.in[kNextOldMean][i];
    t.link = b.flag[kLink][i];
  }
  if (F == Form::lp_reg) {
    t.proxy_logp = b.in[kProxy][i];
    t.selected = b.flag[kCandidate][i];
  }
  if (F == Form::sequence || F == Form::vespo || F == Form::rover) t.sequence_x = b.in[kSequenceX][i];
  if (F == Form::sequence) t.sequence_gain = b.in[kSequenceGain][i];
  if (F == Form::vespo) {
    t.phi_positive = b.in[kSequenceGain][i];
    t.phi_negative = b.in[kTisX][i];
  }
  if (kExtras) {
    t.ref_logp = b.in[kRef][i];
    t.entropy = b.in[kEntropyIn][i];
    t.behaviour_logp = b.in[kBehaviour][i];
    t.tis_x = b.in[kTisX][i];
  }
  TokenResult r = policy_token<F, kExtras>(c, t);
  b.grad_logp[i] = r.grad_logp;
  if (kExtras) b.grad_entropy[i] = r.grad_entropy;
  add_terms<F, kExtras>(lanes, lane, r, std::make_integer_sequence<int, kTerms>());
}

// `count` is a multiple of kLanes. Adds the block's terms to `sums`.
template <Form F, bool kExtras>
HD void run_block(const PolicyLossConfig& config, const Block& block, int64_t count, Lanes& sums) {
  const PolicyLossConfig c = config;  // local copies: stores to the gradient cannot alias them
  const Block b = block;
  alignas(64) Lanes lanes;
  std::memcpy(lanes, sums, sizeof lanes);
  for (int64_t i = 0; i < count; i += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) one_token<F, kExtras>(c, b, i + lane, lane, lanes);
  }
  std::memcpy(sums, lanes, sizeof lanes);
}

SIMD_CLONES void dispatch_block(const PolicyLossConfig& c, bool extras, const Block& b, int64_t count, Lanes& sums) {
#define PYMATHRL_FORM(F)                                                    \
  case Form::F:                                                             \
    return extras ? run_block<Form::F, true>(c, b, count, sums)          \
                  : run_block<Form::F, false>(c, b, count, sums)
  switch (c.form) {
    PYMATHRL_FORM(clip);
    PYMATHRL_FORM(weighted);
    PYMATHRL_FORM(sequence);
    PYMATHRL_FORM(rover);
    PYMATHRL_FORM(lp_reg);
    PYMATHRL_FORM(sapo);
    PYMATHRL_FORM(vespo);
  }
#undef PYMATHRL_FORM
}

// The last `rest` tokens of a block, filled up with inactive ones to a full set of lanes.
void tail_lanes(const PolicyLossParams& p, const Block& b, int64_t whole, int64_t rest, Lanes& sums) {
  float in[kInputs][kLanes] = {}, grad[2][kLanes];
  Mask flag[kFlags][kLanes] = {};
  Block tail;
  for (int k = 0; k < kInputs; ++k) {
    std::memcpy(in[k], b.in[k] + whole, sizeof(float) * rest);
    tail.in[k] = in[k];
  }
  for (int k = 0; k < kFlags; ++k) {
    std::memcpy(flag[k], b.flag[k] + whole, sizeof(Mask) * rest);
    tail.flag[k] = flag[k];
  }
  tail.grad_logp = grad[0];
  tail.grad_entropy = grad[1];
  dispatch_block(p.config, p.extras(), tail, kLanes, sums);
  std::memcpy(b.grad_logp + whole, grad[0], sizeof(float) * rest);
  if (p.grad_entropy) std::memcpy(b.grad_entropy + whole, grad[1], sizeof(float) * rest);
}

void token_block(const PolicyLossParams& p, int64_t index) {
  int64_t begin = index * kCpuBlock, count = p.n - begin < kCpuBlock ? p.n - begin : kCpuBlock;
  const float* work = p.sequence_work;
  const float* given[kInputs] = {p.logp, p.old_logp ? p.old_logp : p.logp, p.advantage, p.coef, nullptr, nullptr,
                                 p.proxy_logp, p.ref_logp, p.entropy, p.behaviour_logp,
                                 work, work ? work + p.n : nullptr, work ? work + 2 * p.n : nullptr};
  Block b;
  for (int k = 0; k < kInputs; ++k) b.in[k] = given[k] ? given[k] + begin : kZeros;

  Mask active[kCpuBlock], other[kCpuBlock];
  for (int64_t i = 0; i < count; ++i) active[i] = mask_of(b.in[kCoef][i] != 0.0f);
  if (p.mask)
    for (int64_t i = 0; i < count; ++i) active[i] &= mask_of(p.mask[begin + i] != 0);
  const uint8_t* bits = p.link ? p.link : p.selected;  // a form has one of the two
  if (bits)
    for (int64_t i = 0; i < count; ++i) other[i] = mask_of(bits[begin + i] != 0);
  b.flag[kActive] = active;
  b.flag[kLink] = p.link ? other : kNone;
  b.flag[kCandidate] = p.selected ? other : kNone;

  float mean[kCpuBlock], old_mean[kCpuBlock];  // row n+1; past the last row there is no link (see check)
  if (p.mean_logp) {
    int64_t rows = p.mean_rows - begin - 1 < count ? p.mean_rows - begin - 1 : count;
    std::memcpy(mean, p.mean_logp + begin + 1, sizeof(float) * rows);
    std::memcpy(old_mean, p.old_mean_logp + begin + 1, sizeof(float) * rows);
    if (rows < count) mean[rows] = old_mean[rows] = 0.0f;
    b.in[kNextMean] = mean;
    b.in[kNextOldMean] = old_mean;
  }

  float unused[kCpuBlock];
  b.grad_logp = p.grad_logp + begin;
  b.grad_entropy = p.grad_entropy ? p.grad_entropy + begin : unused;
  Lanes sums;
  for (int k = 0; k < kTerms; ++k)
    for (float& lane : sums[k]) lane = term_identity(k);
  int64_t whole = count / kLanes * kLanes;
  dispatch_block(p.config, p.extras(), b, whole, sums);
  if (whole < count) tail_lanes(p, b, whole, count - whole, sums);
  for (int k = 0; k < kTerms; ++k) {
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int lane = 0; lane < width; ++lane) sums[k][lane] = combine_terms(k, sums[k][lane], sums[k][lane + width]);
    p.partial[index * kTerms + k] = sums[k][0];
  }
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
        SequenceValues values = sequence_values(p.config, sums);
        for (int64_t n = p.offsets[s]; n < p.offsets[s + 1]; ++n) sequence_write(p, n, values);
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
