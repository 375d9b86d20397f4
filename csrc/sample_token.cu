// One block per row, of the team size that token_logprob uses for this width, so that both compute the same bits.
// The filters' cut comes from row_search.cuh, the numbers from token_logprob's own sweep over the row, with -inf for what
// was cut.
#include "common/row_search.cuh"
#include "sample_token.h"

namespace pymathrl {
namespace {

template <class T, int kTeam> __global__ void __launch_bounds__(kTeam) sample_kernel(SampleTokenParams p, bool aligned) {
  __shared__ Shared shared;
  const float inverse_t = static_cast<float>(1.0 / sample_temperature(p));
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T* z = static_cast<const T*>(p.logits) + row * p.row_stride;
    const RowSums sums = team_row_sums<T, kTeam>(z, p.width, aligned, inverse_t, threadIdx.x, shared.reduce);
    if (!has_distribution(sums)) {  // the same on every thread
      if (threadIdx.x == 0) sample_token_fail(p, row);
      continue;
    }
    RowSearch search{z, p.dtype, p.width, aligned, sums.max, inverse_t * kLog2E, mass_unit(p.width), &shared};
    Cut cut;
    RowSums kept = sums;
    if (filtered(p)) {
      Mass mass = 0;
      if (by_top_k(p)) cut = search.boundary(false, p.top_k, 0.0, 0, Cut{}, &mass);
      if (by_top_p(p)) cut = search.boundary(true, 0, p.top_p, mass, Cut{cut}, &mass);
      cut.floor = min_p_threshold(p.min_p);
      kept = team_row_sums<T, kTeam>(z, p.width, aligned, inverse_t, threadIdx.x, shared.reduce,
                                     [&](float value, int64_t j) { return search.kept_logit(cut, value, j); });
    }
    if (p.support) search.write_support(cut, support_row(p, row));
    int64_t id;
    if (p.temperature == 0.0) {
      id = search.first_of(sums.max);
    } else {
      search.draw(cut, sample_uniform(p, row));
      id = shared.id;
    }
    if (threadIdx.x == 0) sample_token_finish(p, row, id, to_f32(z[id]), sums, kept);
  }
}

}  // namespace

void sample_token_cuda(const SampleTokenParams& p, int device, void* stream) {
  if (p.rows == 0) return;
  DeviceGuard guard(device, "sample_token");
  bool aligned = rows_aligned(p.logits, p.row_stride, p.dtype);
  unsigned blocks = static_cast<unsigned>(p.rows < (1 << 30) ? p.rows : (1 << 30));
  with_logits(p.dtype, [&](auto element) {
    with_team(p.width, [&](auto team) {
      constexpr int kTeam = decltype(team)::value;
      sample_kernel<decltype(element), kTeam><<<blocks, kTeam, 0, static_cast<cudaStream_t>(stream)>>>(p, aligned);
    });
  });
  check_cuda(cudaGetLastError(), "sample_token");
}

}  // namespace pymathrl
