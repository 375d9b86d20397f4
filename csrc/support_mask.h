// support_mask: z[n,j] = -inf where token j is outside the support of row n, in place; the rest stays bit for bit.
// The support is what the sampler's top-k, top-p and min-p kept: the update masks its logits by it, and token_logprob then
// gives the log-prob of the distribution that the token was drawn from. One bit per token, bit j%8 of byte j/8: ids would
// take 32 times that per kept token, a threshold holds only while the weights are the sampler's.
// N rows, V vocabulary, logits of s bytes. Bytes: NV/8 read and sNV written at most (bytes of all ones write nothing).
// N=8192 V=151936 bf16: 2.6 GB, 0.79 ms at 3.35 TB/s. No arithmetic.
#pragma once
#include "common/half.h"
#include "common/tensor.h"

namespace pymathrl {

struct SupportMaskParams {
  void* logits;            // [N,V] of `dtype`, rows `row_stride` elements apart; in and out
  const uint8_t* support;  // [N, support_bytes(V)]; bits past V are not read
  int64_t rows, width, row_stride;
  DType dtype;
};

void support_mask_cpu(const SupportMaskParams& p);
void support_mask_cuda(const SupportMaskParams& p, int device, void* stream);

constexpr int kSupportTokens = 8;  // of one byte

HD int64_t support_bytes(int64_t width) { return (width + kSupportTokens - 1) / kSupportTokens; }

// The bits of a byte's first `count` tokens: what is beyond the row counts as kept.
HD unsigned support_byte(uint8_t byte, int64_t count) {
  return count < kSupportTokens ? byte | (0xffu << count & 0xffu) : byte;
}

}  // namespace pymathrl
