// group_advantage: rewards of ragged groups -> one advantage per sample.
//   centre   a = r | r - mean(group) | r - mean(others of the group) | r - baseline
//   scale    a | a / (std(r in group) + eps) | a / (std(r in batch) + eps)
//              | (a - mean(a)) / (std(a) + eps)  over samples | (a - mean(a)) / sqrt(var(a) + eps)  over tokens
// P groups, B samples. Bytes: 8B + 8P, a few microseconds of launch on a GPU: the value is no host sync.
#pragma once
#include "common/hd.h"

namespace pymathrl {

enum class Centre : int { none = 0, group_mean = 1, leave_one_out = 2, baseline = 3 };
enum class Scale : int { none = 0, group_std = 1, batch_std = 2, batch_whiten = 3, token_whiten = 4 };

struct GroupAdvantageParams {
  const float* reward;     // [B]
  const int64_t* offsets;  // [P+1] first sample of each group; the last entry is B
  const float* baseline;   // [B] for Centre::baseline, else null
  const int64_t* tokens;   // [B] sampled tokens of each sample, for Scale::token_whiten, else null
  float* advantage;        // [B] out
  uint8_t* equal;          // [P] out: 1 where all rewards of the group are the same number
  int64_t groups, samples;
  Centre centre;
  Scale scale;
  float eps;
  int ddof;  // 1: unbiased variance, 0: population
};

void group_advantage_cpu(const GroupAdvantageParams& p);
void group_advantage_cuda(const GroupAdvantageParams& p, int device, void* stream);

// Sums in double: a batch has up to 1e6 samples, and fp32 sums of 0/1 rewards stop being exact at 2^24. Measured from
// `origin`, a value of the sample, so that the variance does not cancel where the mean is much larger than the spread.
struct Moments {
  double origin = 0, weight = 0, sum = 0, square = 0;
  HD void add(double value, double w) {
    value -= origin;
    weight += w;
    sum += w * value;
    square += w * value * value;
  }
  HD double mean() const { return origin + (weight > 0 ? sum / weight : 0.0); }
  HD double variance(int ddof) const {
    if (weight <= ddof) return 0.0;
    double v = (square - sum * sum / weight) / (weight - ddof);
    return v < 0 ? 0.0 : v;  // rounding may leave -1e-17; nan stays nan
  }
};

// Centres one group, and scales it where the scale is the group's own.
HD void group_centre(const GroupAdvantageParams& p, int64_t group) {
  int64_t begin = p.offsets[group], end = p.offsets[group + 1], n = end - begin;
  if (n <= 0) {
    p.equal[group] = 1;
    return;
  }
  // Measured from the group's first reward: sixteen rewards of 0.1 then give exactly 0, where the plain z-score gives
  // 0.0074 (the mean rounds, and the std is as small as the rounding error).
  float first = p.reward[begin];
  Moments m;
  bool equal = true;
  for (int64_t i = begin; i < end; ++i) {
    m.add(static_cast<double>(p.reward[i]) - first, 1.0);
    equal = equal && p.reward[i] == first;
  }
  p.equal[group] = equal ? 1 : 0;
  double inverse = 1.0;
  if (p.scale == Scale::group_std) inverse = equal ? 0.0 : 1.0 / (sqrt(m.variance(p.ddof)) + p.eps);
  for (int64_t i = begin; i < end; ++i) {
    double shifted = static_cast<double>(p.reward[i]) - first, a;
    if (p.centre == Centre::none)
      a = p.reward[i];
    else if (p.centre == Centre::baseline)
      a = static_cast<double>(p.reward[i]) - p.baseline[i];
    else if (equal)
      a = 0.0;
    else if (p.centre == Centre::group_mean)
      a = shifted - m.mean();
    else
      a = (shifted - m.mean()) * (static_cast<double>(n) / static_cast<double>(n - 1));
    p.advantage[i] = static_cast<float>(a * inverse);
  }
}

// What the batch-wide scales measure: the rewards, or the centred advantages.
HD Moments batch_start(const GroupAdvantageParams& p) {
  Moments m;
  if (p.samples > 0) m.origin = p.scale == Scale::batch_std ? p.reward[0] : p.advantage[0];
  return m;
}

HD void batch_moment(const GroupAdvantageParams& p, int64_t i, Moments& m) {
  float value = p.scale == Scale::batch_std ? p.reward[i] : p.advantage[i];
  m.add(value, p.scale == Scale::token_whiten ? static_cast<double>(p.tokens[i]) : 1.0);
}

HD float batch_scale(const GroupAdvantageParams& p, const Moments& m, float a) {
  if (p.scale == Scale::batch_std) return static_cast<float>(a / (sqrt(m.variance(p.ddof)) + p.eps));
  double centred = a - m.mean();
  if (p.scale == Scale::batch_whiten) return static_cast<float>(centred / (sqrt(m.variance(p.ddof)) + p.eps));
  return static_cast<float>(centred / sqrt(m.variance(p.ddof) + p.eps));
}

}  // namespace pymathrl
