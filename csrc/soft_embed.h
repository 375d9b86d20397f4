// soft_embed: a row of logits as one input vector of the model instead of a token (soft tokens, arXiv 2509.19170).
//   p = softmax(z/T), over the vocabulary or the k largest logits;  h = sum_j p_j e_j,  e_j the rows of the table
//   h~ = h + sigma eps,  eps ~ N(0, 1) per coordinate;  logp = -|h~ - h|^2 / (2 sigma^2), its density up to a constant
// eps is a function of (seed, uid, step, coordinate): pair k of coordinates takes two words of the Philox block with
// counter (step, uid, stream + 256 floor(k/2)) through Box and Muller. h~ can be given instead: logp is then that of it.
// Backward, h~ a constant: u = (h~ - h) / sigma^2;  dlogp/dz_j = (p_j / T) (e_j.u - sum_k p_k e_k.u);
// dlogp/de_j = p_j u. The products e_j.u are a `linear` with the table as its weight, made by the caller.
// h sums in the order of j: kMixBlock tokens in fp32, these sums in order. A p_j of 0 adds nothing, so it is skipped, and
// top-k or a T near 0 cost what they keep. No bit of a row depends on other rows or on threads.
// N rows, V vocabulary, D coordinates. Flops 2NVD (2NKD with K tokens kept); bytes 8NV + VD s + 8ND, s of the table:
// N=64 V=49152 D=576 fp32: 138 MB, 41 us at 3.35 TB/s, and 3.6 GFLOP: bound by arithmetic on both processors.
#pragma once
#include "common/philox.h"
#include "common/row_softmax.h"
#include "common/tensor.h"

namespace pymathrl {

constexpr int64_t kMixBlock = 128;  // tokens that h adds up in one chain

struct SoftEmbedParams {
  const float* logits;   // [N,V], rows `row_stride` elements apart
  const void* table;     // [V,D] of `dtype`
  DType dtype;           // of table and inputs: f32; on a GPU also bf16
  const int64_t* uid;    // [N] which sample a row belongs to; null: inputs are given
  const int64_t* step;   // [N] the number of the draw in its sample; its low 32 bits count
  float* weights;        // [N,V] out: p, rows `weight_stride` elements apart; may be `logits` itself
  float* mean;           // [N,D] out: h
  void* inputs;          // [N,D] of `dtype`: h~, out where uid is given, else in
  int64_t* ids;          // [N] out: the most probable token, lowest index of equals; -1 without a distribution
  float* logp;           // [N] out, nats; 0 at sigma = 0
  float* entropy;        // [N] out, nats: of p
  float* mean_logp;      // [N] out, nats: mean of ln p over the tokens kept
  float* kept_mass;      // [N] out: the share of the probability that top-k left
  int64_t rows, width, columns, row_stride, weight_stride;
  uint64_t seed;
  uint32_t stream;
  double temperature;    // > 0
  double sigma;          // >= 0; where inputs are given > 0
  int64_t top_k;         // 0 = off
};

struct SoftEmbedGradParams {
  const float* weights;    // [N,V] p of the forward, rows `weight_stride` elements apart
  float* dots;             // [N,V] in: e_j.u, out: dz; rows `dot_stride` elements apart
  const float* grad_logp;  // [N]; a row with 0 gets exact zeros
  int64_t rows, width, weight_stride, dot_stride;
  double temperature;
};

void soft_embed_cpu(const SoftEmbedParams& p);
void soft_embed_cuda(const SoftEmbedParams& p, int device, void* stream);
void soft_embed_backward_cpu(const SoftEmbedGradParams& p);
void soft_embed_backward_cuda(const SoftEmbedGradParams& p, int device, void* stream);

HD bool soft_by_top_k(const SoftEmbedParams& p) { return p.top_k > 0 && p.top_k < p.width; }

// eps of coordinates 2 pair and 2 pair + 1 of a row. In double: the logarithm and the cosine of one library then round
// to the fp32 of another, but for one in 10^8.
HD void soft_noise(const SoftEmbedParams& p, int64_t row, int64_t pair, float* eps) {
  const uint64_t uid = static_cast<uint64_t>(p.uid[row]);
  const Philox4 r = philox4x32_10(static_cast<uint32_t>(p.step[row]), static_cast<uint32_t>(uid),
                                  static_cast<uint32_t>(uid >> 32), p.stream + 256u * static_cast<uint32_t>(pair / 2),
                                  static_cast<uint32_t>(p.seed), static_cast<uint32_t>(p.seed >> 32));
  const int first = pair % 2 ? 2 : 0;
  const double unit = 2.3283064365386963e-10;  // 2^-32; half a step keeps the uniform off 0
  const double radius = sqrt(-2.0 * log((r.x[first] + 0.5) * unit));
  const double angle = 6.283185307179586 * ((r.x[first + 1] + 0.5) * unit);
  eps[0] = static_cast<float>(radius * cos(angle));
  eps[1] = static_cast<float>(radius * sin(angle));
}

// Writes h~ of a pair of coordinates where it is drawn; returns the share of the two in |h~ - h|^2, of what is stored.
template <class T> HD double soft_pair(const SoftEmbedParams& p, int64_t row, int64_t pair) {
  const float* mean = p.mean + row * p.columns;
  T* inputs = static_cast<T*>(p.inputs) + row * p.columns;
  float eps[2] = {0.0f, 0.0f};
  if (p.uid && p.sigma > 0.0) soft_noise(p, row, pair, eps);
  double square = 0.0;
  for (int i = 0; i < 2; ++i) {
    const int64_t d = 2 * pair + i;
    if (d >= p.columns) continue;
    if (p.uid) inputs[d] = from_f32<T>(mean[d] + static_cast<float>(p.sigma) * eps[i]);
    const float distance = to_f32(inputs[d]) - mean[d];
    square += static_cast<double>(distance) * distance;
  }
  return square;
}

// At sigma = 0 the factor is 0: logp is 0, or nan where the row is.
HD float soft_logp(const SoftEmbedParams& p, double square) {
  const double factor = p.sigma > 0.0 ? 0.5 / (p.sigma * p.sigma) : 0.0;
  return static_cast<float>(0.0 - factor * square);
}

// Writes the numbers of p: `sums` of the whole row, `kept` of what top-k left.
HD void soft_embed_numbers(const SoftEmbedParams& p, int64_t row, int64_t id, const RowSums& sums, const RowSums& kept) {
  const RowStats stats = finish_row(kept, 1.0 / p.temperature);
  const double share = kept.e / sums.e;
  p.ids[row] = id;
  p.entropy[row] = stats.entropy;
  p.mean_logp[row] = stats.mean_logp;
  p.kept_mass[row] = has_distribution(sums) ? static_cast<float>(share < 1.0 ? share : 1.0) : stats.entropy;
}

}  // namespace pymathrl
