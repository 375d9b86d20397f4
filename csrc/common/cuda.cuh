// What every CUDA twin needs around its kernels: the device, the launch check, block-wide sums in a fixed order.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "common/hd.h"

namespace pymathrl {

inline void check_cuda(cudaError_t status, const char* op) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(status));
}

// The stream handed over by the caller belongs to this device, which need not be the thread's current one.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* op) {
    check_cuda(cudaGetDevice(&previous_), op);
    if (device != previous_) check_cuda(cudaSetDevice(device), op);
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

// Sum over the block, the same on every thread. The order is a function of blockDim only, so a sum is reproducible.
// `shared` holds 33 elements of T. Every thread of the block must call it.
template <class T, class Op>
__device__ __forceinline__ T block_reduce(T value, T identity, T* shared, Op op) {
  for (int offset = 16; offset > 0; offset >>= 1) value = op(value, __shfl_xor_sync(0xffffffffu, value, offset));
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = (blockDim.x + 31) >> 5;
  __syncthreads();  // the previous call's readers are done with `shared`
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  if (warp == 0) {
    value = lane < warps ? shared[lane] : identity;
    for (int offset = 16; offset > 0; offset >>= 1) value = op(value, __shfl_xor_sync(0xffffffffu, value, offset));
    if (lane == 0) shared[32] = value;
  }
  __syncthreads();
  return shared[32];
}

struct Add {
  template <class T> __device__ T operator()(T a, T b) const { return a + b; }
};
struct Max {
  template <class T> __device__ T operator()(T a, T b) const { return a > b ? a : b; }
};

}  // namespace pymathrl
