// linear: y[m,n] = bias[n] + sum_k x[m,k] w[n,k]   (x: M rows, w: N rows, both contiguous along K), summed in fp32.
// The bits of a row of y follow from that row of x, w and bias alone: not from M, the rows beside it, the threads or
// the alignment (a library's product takes another kernel, with another order of the sum, for another M). For every M:
//   K is cut into linear_chunks(K) pieces of equal length. In a piece, lane l of the processor's vector sums the
//   products of the elements k = l mod lanes in order, by fused multiply-adds where the processor has them; a fixed
//   tree adds the lanes; y starts as the bias, or 0, and the pieces are added to it in order.
// The number of lanes and the fusing belong to the processor level: two levels differ in the last bits, as two
// processors do under any BLAS; a process has one level. The CUDA twin adds in the order of k, on every device.
// Flops 2MNK; bytes 4(MK + NK + MN): on a CPU memory-bound below M = 12 or so, where w is read once.
#pragma once
#include "common/half.h"
#include "common/tensor.h"

namespace pymathrl {

constexpr int64_t kLinearChunk = 576;  // longest piece: the 7 rows of a register tile fit 32 KB of first-level cache
constexpr int64_t kLinearAlign = 16;   // pieces are multiples of this, the widest vector

struct LinearParams {
  DType dtype;       // of x and w: f32; on a GPU also bf16
  const void* x;     // [M,K], rows x_stride elements apart
  const void* w;     // [N,K]
  const float* bias; // [N] or null
  float* y;          // [M,N] out, rows y_stride elements apart; overlaps neither x nor w
  int64_t rows, depth, columns, x_stride, y_stride;  // M, K, N
};

void linear_cpu(const LinearParams& p);
void linear_cuda(const LinearParams& p, int device, void* stream);

HD int64_t linear_chunks(int64_t depth) { return (depth + kLinearChunk - 1) / kLinearChunk; }

}  // namespace pymathrl
