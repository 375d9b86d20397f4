#include "token_logprob.h"

#include "common/parallel.h"
#include "row_kernels.h"

namespace pymathrl {
namespace {

constexpr int64_t kGrainElements = 32768;  // about 20 us of work: below that a second thread costs more than it saves

// Rows that one thread takes at a time: enough work, and for wide rows a successor to prefetch, while there are many.
int64_t row_grain(int64_t rows, int64_t width) {
  if (width < kGrainElements) return kGrainElements / width;
  return rows >= 64 ? 4 : 1;
}

void check_ids(const int64_t* ids, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row)
    if (ids[row] < 0 || ids[row] >= width)
      fail("token_logprob: ids must be in [0, V=", width, "), got ", ids[row], " in row ", row,
           "; give rows without a token any valid id and gradient 0");
}

}  // namespace

void token_logprob_cpu(const TokenLogprobParams& p) {
  check_ids(p.ids, p.rows, p.width);
  const RowKernels& kernels = row_kernels();
  float inverse_t = static_cast<float>(1.0 / p.temperature);
  parallel_for(p.rows, row_grain(p.rows, p.width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const void* z = row_at(p.logits, p.dtype, row * p.row_stride);
      float max = kernels.max(z, p.dtype, p.width);
      const void* next = row + 1 < end ? row_at(p.logits, p.dtype, (row + 1) * p.row_stride) : nullptr;
      RowSums sums =
          kernels.sums(z, p.dtype, p.width, max, inverse_t, min_p_threshold(p.min_p), nullptr, nullptr, next);
      float z_y = row_element(z, p.dtype, p.ids[row]);
      token_logprob_finish(p, row, sums, z_y, exp_row(row_distance(z_y, max, inverse_t)));
    }
  });
}

void token_logprob_backward_cpu(const TokenLogprobGradParams& p) {
  check_ids(p.ids, p.rows, p.width);
  const RowKernels& kernels = row_kernels();
  parallel_for(p.rows, row_grain(p.rows, p.width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) kernels.gradient(p, row);
  });
}

}  // namespace pymathrl
