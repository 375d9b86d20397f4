// The loops over rows of logits that token_logprob, sample_token and soft_embed run on a CPU, for the processor at hand.
// All levels give the same bits: the lanes of a sum are fixed in the code (kLanes), and nothing is contracted to a fused multiply-add.
#pragma once
#include "sample_token.h"
#include "token_logprob.h"

namespace pymathrl {

constexpr int kMixRows = 4;  // rows of a tile of `mix`: with 16 columns its sums are 8 of the 16 registers of AVX2

struct RowKernels {
  // Largest element (nan is passed over; -inf where nothing is above it).
  float (*max)(const void* row, DType dtype, int64_t width);

  // The sums of row_softmax.h, given the maximum. threshold: of `kept`. block_sum: [row_blocks(width)] sums of e, or null;
  // e: [width] every e_j, or null. next: the row that this thread reads after this one, or null; it is fetched into the
  // cache meanwhile, so that its maximum need not wait for the memory (20 to 30 % of a row's time). None of them changes
  // a bit of the sums.
  RowSums (*sums)(const void* row, DType dtype, int64_t width, float max, float inverse_t, float threshold,
                  float* block_sum, float* e, const void* next);

  // Sets e to 0 where it is cut. The sums, and block sums, of what stays: bit for bit what `sums` gives for the row with
  // -inf in place of the logits that are cut. support: [support_bytes(width)] the tokens that stay, or null.
  RowSums (*filter)(const void* row, DType dtype, int64_t width, const Cut& cut, float max, float inverse_t, float* e,
                    float* block_sum, uint8_t* support);

  // The first j < count at which acc + e_0 + ... + e_j exceeds target, and e_j > 0: groups of kLanes first, then within
  // the group. The groups add up to the block's sum only within rounding: where the target is not met, the last e_j > 0.
  int64_t (*find)(const float* e, int64_t count, double acc, double target);

  // One row of token_logprob's backward.
  void (*gradient)(const TokenLogprobGradParams& p, int64_t row);

  // out[r][c] += sum over i < count of weights[kMixRows i + r] entries[i][c], summed in order of i from 0, for
  // c < columns and r < kMixRows.
  void (*mix)(const float* weights, const float* const* entries, int64_t count, int64_t columns, float* const* out);

  // sum over j < width of a_j b_j, in the order of the sums above; a_j = 0 adds 0 whatever b_j is.
  double (*dot)(const float* a, const float* b, int64_t width);
};

// The kernels of the best level that this processor has, or of PYMATHRL_SIMD=base|v3|v4 (tests compare the levels).
const RowKernels& row_kernels();
const char* simd_level();  // its name: "base", "v3" (AVX2) or "v4" (AVX-512)

}  // namespace pymathrl
