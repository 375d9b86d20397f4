// The last step of a weight's gradient: sums of blocks of rows, added up without atomics.
#pragma once
#include "common/cuda.cuh"

namespace pymathrl {

// Row 0 becomes the sum of rows 1..blocks of `rows` [1+blocks, width]. One warp per column, in double: lane l adds rows
// 1+l, 33+l, ..., then the lanes add up, so the order follows from the number of blocks alone.
static __global__ void sum_blocks_kernel(float* rows, int64_t blocks, int64_t width) {
  double sum = 0;
  for (int64_t block = 1 + threadIdx.x; block <= blocks; block += 32) sum += rows[block * width + blockIdx.x];
  for (int offset = 16; offset > 0; offset >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (threadIdx.x == 0) rows[blockIdx.x] = static_cast<float>(sum);
}

inline void sum_blocks_cuda(float* rows, int64_t blocks, int64_t width, cudaStream_t queue) {
  if (width) sum_blocks_kernel<<<static_cast<unsigned>(width), 32, 0, queue>>>(rows, blocks, width);
}

}  // namespace pymathrl
