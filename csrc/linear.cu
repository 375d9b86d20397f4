#include "common/cuda.cuh"
#include "linear.h"

namespace pymathrl {
namespace {

constexpr int kTile = 64;   // rows and columns of y of a block
constexpr int kDepth = 16;  // elements of K in shared memory at a time
constexpr int kSide = 16;   // threads of a block: kSide x kSide, each with kEach x kEach elements of y
constexpr int kEach = kTile / kSide;

// Rows [first, first + kTile) and elements [k, k + kDepth) of a matrix, turned; zeros outside it.
template <class T>
__device__ void load_tile(float (*tile)[kTile + 1], const T* matrix, int64_t stride, int64_t first, int64_t rows,
                          int64_t k, int64_t depth) {
  for (int i = threadIdx.x; i < kTile * kDepth; i += kSide * kSide) {
    const int64_t row = first + i / kDepth, column = k + i % kDepth;
    tile[i % kDepth][i / kDepth] = row < rows && column < depth ? to_f32(matrix[row * stride + column]) : 0.0f;
  }
}

// An element of y belongs to one thread, which walks K in order: no other row, and no number of rows, changes its bits.
template <class T> __global__ void __launch_bounds__(kSide * kSide) linear_kernel(LinearParams p) {
  __shared__ float x[kDepth][kTile + 1], w[kDepth][kTile + 1];
  const int64_t row_tiles = (p.rows + kTile - 1) / kTile;
  const int64_t first_row = blockIdx.x % row_tiles * kTile, first_column = blockIdx.x / row_tiles * kTile;
  const int row = threadIdx.x / kSide, column = threadIdx.x % kSide;
  float sum[kEach][kEach];
  for (int i = 0; i < kEach; ++i)
    for (int j = 0; j < kEach; ++j) {
      const int64_t n = first_column + j * kSide + column;
      sum[i][j] = p.bias && n < p.columns ? p.bias[n] : 0.0f;
    }
  for (int64_t k = 0; k < p.depth; k += kDepth) {
    load_tile(x, static_cast<const T*>(p.x), p.x_stride, first_row, p.rows, k, p.depth);
    load_tile(w, static_cast<const T*>(p.w), p.depth, first_column, p.columns, k, p.depth);
    __syncthreads();
    for (int d = 0; d < kDepth; ++d)
      for (int i = 0; i < kEach; ++i)
        for (int j = 0; j < kEach; ++j)
          sum[i][j] = fmaf(x[d][i * kSide + row], w[d][j * kSide + column], sum[i][j]);
    __syncthreads();
  }
  for (int i = 0; i < kEach; ++i)
    for (int j = 0; j < kEach; ++j) {
      const int64_t m = first_row + i * kSide + row, n = first_column + j * kSide + column;
      if (m < p.rows && n < p.columns) p.y[m * p.y_stride + n] = sum[i][j];
    }
}

}  // namespace

void linear_cuda(const LinearParams& p, int device, void* stream) {
  const int64_t tiles = (p.rows + kTile - 1) / kTile * ((p.columns + kTile - 1) / kTile);
  if (tiles == 0) return;
  DeviceGuard guard(device, "linear");
  auto kernel = p.dtype == DType::bf16 ? linear_kernel<bf16> : linear_kernel<float>;
  kernel<<<static_cast<unsigned>(tiles), kSide * kSide, 0, static_cast<cudaStream_t>(stream)>>>(p);
  check_cuda(cudaGetLastError(), "linear");
}

}  // namespace pymathrl
