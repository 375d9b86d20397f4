#include "common/cuda.cuh"
#include "group_advantage.h"

namespace pymathrl {
namespace {

constexpr int kThreads = 256;

__global__ void centre_kernel(GroupAdvantageParams p) {
  int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t g = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; g < p.groups; g += stride)
    group_centre(p, g);
}

// One block: a batch is at most some 100,000 samples, and one block keeps the order of the sums fixed.
__global__ void batch_kernel(GroupAdvantageParams p) {
  __shared__ double shared[33];
  Moments own = batch_start(p);
  for (int64_t i = threadIdx.x; i < p.samples; i += blockDim.x) batch_moment(p, i, own);
  Moments all;
  all.origin = own.origin;
  all.weight = block_reduce(own.weight, 0.0, shared, Add());
  all.sum = block_reduce(own.sum, 0.0, shared, Add());
  all.square = block_reduce(own.square, 0.0, shared, Add());
  for (int64_t i = threadIdx.x; i < p.samples; i += blockDim.x)
    p.advantage[i] = batch_scale(p, all, p.advantage[i]);
}

}  // namespace

void group_advantage_cuda(const GroupAdvantageParams& p, int device, void* stream) {
  if (p.groups == 0) return;
  DeviceGuard guard(device, "group_advantage");
  auto s = static_cast<cudaStream_t>(stream);
  int64_t blocks = (p.groups + kThreads - 1) / kThreads;
  centre_kernel<<<static_cast<unsigned>(blocks < 1024 ? blocks : 1024), kThreads, 0, s>>>(p);
  if (p.scale == Scale::batch_std || p.scale == Scale::batch_whiten || p.scale == Scale::token_whiten)
    batch_kernel<<<1, 1024, 0, s>>>(p);
  check_cuda(cudaGetLastError(), "group_advantage");
}

}  // namespace pymathrl
