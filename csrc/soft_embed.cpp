#include "soft_embed.h"

#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "row_kernels.h"

namespace pymathrl {
namespace {

constexpr int64_t kGrainElements = 32768;  // about 20 us of work: below that a second thread costs more than it saves
constexpr int64_t kNoiseGrain = 512;       // coordinates: one costs as much as 60 logits
constexpr int64_t kTaskRows = 32;       // rows that meet a block of the table while it is in the second-level cache
constexpr int64_t kTaskColumns = 256;   // of the table: kMixBlock times these are 128 KB

int64_t grain(int64_t elements, int64_t width) { return width < elements ? elements / width : 1; }

int64_t first_of(const float* z, float value) {
  int64_t j = 0;
  while (z[j] != value) ++j;
  return j;
}

struct Scratch {  // per thread; grows to the row's width once
  std::vector<float> e, block_sum;
};

// p and its numbers. Through a copy of the row, because the sums may read the logits twice and p may overwrite them.
void weigh_row(const SoftEmbedParams& p, int64_t row, float inverse_t, Scratch& s) {
  const RowKernels& kernels = row_kernels();
  const float* z = p.logits + row * p.row_stride;
  float* weights = p.weights + row * p.weight_stride;
  const float max = kernels.max(z, DType::f32, p.width);
  const RowSums sums = kernels.sums(z, DType::f32, p.width, max, inverse_t, 0.0f, nullptr, s.e.data(), nullptr);
  if (!has_distribution(sums)) {
    std::fill(weights, weights + p.width, NAN);
    return soft_embed_numbers(p, row, -1, sums, sums);
  }
  RowSums kept = sums;
  if (soft_by_top_k(p)) {
    const Cut cut = top_k_cut(z, DType::f32, p.width, p.top_k);
    kept = kernels.filter(z, DType::f32, p.width, cut, max, inverse_t, s.e.data(), s.block_sum.data(), nullptr);
  }
  soft_embed_numbers(p, row, first_of(z, max), sums, kept);
  const float share = static_cast<float>(1.0 / kept.e);
  for (int64_t j = 0; j < p.width; ++j) weights[j] = s.e[static_cast<size_t>(j)] * share;
}

// h of rows [row, end) and columns [column, column + columns).
void mix_task(const SoftEmbedParams& p, int64_t row, int64_t end, int64_t column, int64_t columns) {
  const RowKernels& kernels = row_kernels();
  const float* table = static_cast<const float*>(p.table) + column;
  float spare[kTaskColumns] = {};  // of the rows that the last tile lacks
  for (int64_t r = row; r < end; ++r) std::fill_n(p.mean + r * p.columns + column, columns, 0.0f);
  for (int64_t begin = 0; begin < p.width; begin += kMixBlock) {
    const int64_t stop = std::min(begin + kMixBlock, p.width);
    for (int64_t r = row; r < end; r += kMixRows) {
      const float* weights[kMixRows];
      float* out[kMixRows];
      static constexpr float kZeros[kMixBlock] = {};
      for (int i = 0; i < kMixRows; ++i) {
        const bool exists = r + i < end;
        weights[i] = exists ? p.weights + (r + i) * p.weight_stride + begin : kZeros;
        out[i] = exists ? p.mean + (r + i) * p.columns + column : spare;
      }
      float packed[kMixBlock * kMixRows];
      const float* entries[kMixBlock];
      int64_t count = 0;
      for (int64_t j = begin; j < stop; ++j) {
        bool any = false;
        for (int i = 0; i < kMixRows; ++i) {
          packed[count * kMixRows + i] = weights[i][j - begin];
          any |= weights[i][j - begin] != 0.0f;
        }
        entries[count] = table + j * p.columns;
        count += any;
      }
      if (count) kernels.mix(packed, entries, count, columns, out);
    }
  }
}

void finish_soft_row(const SoftEmbedParams& p, int64_t row) {
  double square = 0.0;
  for (int64_t pair = 0; 2 * pair < p.columns; ++pair) square += soft_pair<float>(p, row, pair);
  p.logp[row] = soft_logp(p, square);
}

}  // namespace

void soft_embed_cpu(const SoftEmbedParams& p) {
  if (p.rows == 0) return;
  const float inverse_t = static_cast<float>(1.0 / p.temperature);
  parallel_for(p.rows, grain(kGrainElements, p.width), [&](int64_t begin, int64_t end) {
    static thread_local Scratch s;
    s.e.resize(static_cast<size_t>(p.width));
    s.block_sum.resize(static_cast<size_t>(row_blocks(p.width)));
    for (int64_t row = begin; row < end; ++row) weigh_row(p, row, inverse_t, s);
  });
  const int64_t parts = (p.rows + kTaskRows - 1) / kTaskRows, strips = (p.columns + kTaskColumns - 1) / kTaskColumns;
  const int64_t work = std::min(p.rows, kTaskRows) * p.width;  // of a task, in elements of the softmax
  parallel_for(parts * strips, grain(kGrainElements, work), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task % parts * kTaskRows, column = task / parts * kTaskColumns;
      mix_task(p, row, std::min(row + kTaskRows, p.rows), column, std::min(kTaskColumns, p.columns - column));
    }
  });
  parallel_for(p.rows, grain(kNoiseGrain, p.columns), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) finish_soft_row(p, row);
  });
}

void soft_embed_backward_cpu(const SoftEmbedGradParams& p) {
  parallel_for(p.rows, grain(kGrainElements, p.width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* weights = p.weights + row * p.weight_stride;
      float* dots = p.dots + row * p.dot_stride;
      const float scale = static_cast<float>(p.grad_logp[row] / p.temperature);
      if (scale == 0.0f) {
        std::fill(dots, dots + p.width, 0.0f);
        continue;
      }
      const float centre = static_cast<float>(row_kernels().dot(weights, dots, p.width));
      for (int64_t j = 0; j < p.width; ++j) dots[j] = scale * weights[j] * (dots[j] - centre);
    }
  });
}

}  // namespace pymathrl
