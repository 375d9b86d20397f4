// The rows of padding of a packed batch, on a GPU.
#pragma once
#include "common/cuda.cuh"
#include "common/half.h"
#include "common/packed.h"

namespace pymathrl {

constexpr int kClearBlocks = 32;

// Zeroes rows offsets[B] .. tokens-1 of [tokens,width]. The host does not know how many these are: mostly none.
template <class T>
__global__ void clear_padding_kernel(const int64_t* offsets, int64_t sequences, int64_t tokens, T* rows, int64_t width) {
  for (int64_t t = offsets[sequences] + blockIdx.x; t < tokens; t += kClearBlocks)
    for (int64_t j = threadIdx.x; j < width; j += blockDim.x) rows[t * width + j] = from_f32<T>(0.0f);
}

template <class T>
void clear_padding_cuda(const int64_t* offsets, int64_t sequences, int64_t tokens, void* rows, int64_t width,
                        cudaStream_t queue) {
  if (rows)
    clear_padding_kernel<<<kClearBlocks, 256, 0, queue>>>(offsets, sequences, tokens, static_cast<T*>(rows), width);
}

}  // namespace pymathrl
