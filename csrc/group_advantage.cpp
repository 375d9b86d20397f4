#include "group_advantage.h"

namespace pymathrl {

// One thread: even 100,000 rewards take under a millisecond.
void group_advantage_cpu(const GroupAdvantageParams& p) {
  for (int64_t g = 0; g < p.groups; ++g) group_centre(p, g);
  if (p.scale == Scale::none || p.scale == Scale::group_std) return;
  Moments m = batch_start(p);
  for (int64_t i = 0; i < p.samples; ++i) batch_moment(p, i, m);
  for (int64_t i = 0; i < p.samples; ++i) p.advantage[i] = batch_scale(p, m, p.advantage[i]);
}

}  // namespace pymathrl
