#include "group_advantage.h"

#include "common/tensor.h"

namespace pymathrl {

// One thread: even 100,000 rewards take under a millisecond.
void group_advantage_cpu(const GroupAdvantageParams& p) {
  bool rising = p.offsets[0] == 0 && p.offsets[p.groups] == p.samples;
  for (int64_t g = 0; g < p.groups; ++g) rising = rising && p.offsets[g] <= p.offsets[g + 1];
  if (!rising)
    fail("group_advantage: offsets must rise from 0 to B=", p.samples, ", got ", p.offsets[0], " ... ",
         p.offsets[p.groups], "; give the first sample of each group and B");
  for (int64_t g = 0; g < p.groups; ++g) group_centre(p, g);
  if (p.scale == Scale::none || p.scale == Scale::group_std) return;
  Moments m = batch_start(p);
  for (int64_t i = 0; i < p.samples; ++i) batch_moment(p, i, m);
  for (int64_t i = 0; i < p.samples; ++i) p.advantage[i] = batch_scale(p, m, p.advantage[i]);
}

}  // namespace pymathrl
