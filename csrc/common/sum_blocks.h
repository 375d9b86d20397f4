// The last step of a weight's gradient on a CPU: sums of blocks of rows, added up in order. On a GPU: sum_blocks.cuh.
#pragma once
#include "common/hd.h"

namespace pymathrl {

// Row 0 becomes the sum of rows 1..blocks, each column in double and in order.
HD void sum_blocks(float* rows, int64_t blocks, int64_t width) {
  const auto add = [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
    double sum[kLanes] = {};
    for (int64_t block = 1; block <= blocks; ++block)
      for (int64_t j = 0; j < count; ++j) sum[j] += rows[block * width + begin + j];
    for (int64_t j = 0; j < count; ++j) rows[begin + j] = static_cast<float>(sum[j]);
  };
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) add(j, kLanes);
  if (j < width) add(j, width - j);
}

}  // namespace pymathrl
