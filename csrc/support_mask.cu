#include "common/row_softmax.cuh"
#include "support_mask.h"

namespace pymathrl {
namespace {

static_assert(kVec == kSupportTokens, "a thread takes the eight logits of one byte");

// blockDim: x threads share a row, y rows per block, as in token_logprob's backward.
template <class T> __global__ void __launch_bounds__(kLargeTeam) mask_kernel(SupportMaskParams p, bool aligned) {
  const int64_t step = static_cast<int64_t>(blockDim.x) * kVec, first_row = static_cast<int64_t>(blockIdx.x) * blockDim.y;
  for (int64_t row = first_row + threadIdx.y; row < p.rows; row += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    T* z = static_cast<T*>(p.logits) + row * p.row_stride;
    const uint8_t* support = p.support + row * support_bytes(p.width);
    for (int64_t j = static_cast<int64_t>(threadIdx.x) * kVec; j < p.width; j += step) {
      const int count = vec_count(j, p.width);
      const unsigned bits = support_byte(support[j / kVec], count);
      if (bits == 0) {  // almost every byte of a filtered row
        float x[kVec];
#pragma unroll
        for (int i = 0; i < kVec; ++i) x[i] = -kInf;
        store_vec(z + j, count, aligned, x);
      } else if (bits != 0xffu) {
        for (int i = 0; i < count; ++i)
          if (!(bits >> i & 1u)) z[j + i] = from_f32<T>(-kInf);
      }
    }
  }
}

}  // namespace

void support_mask_cuda(const SupportMaskParams& p, int device, void* stream) {
  if (p.rows == 0) return;
  DeviceGuard guard(device, "support_mask");
  bool aligned = rows_aligned(p.logits, p.row_stride, p.dtype);
  with_logits(p.dtype, [&](auto element) {
    with_team(p.width, [&](auto team) {
      constexpr int kTeam = decltype(team)::value;
      dim3 block(kTeam, team_threads<kTeam>() / kTeam);
      mask_kernel<decltype(element)>
          <<<team_grid<kTeam>(p.rows), block, 0, static_cast<cudaStream_t>(stream)>>>(p, aligned);
    });
  });
  check_cuda(cudaGetLastError(), "support_mask");
}

}  // namespace pymathrl
