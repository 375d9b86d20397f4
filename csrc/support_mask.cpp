#include "support_mask.h"

#include "common/parallel.h"

namespace pymathrl {
namespace {

constexpr int64_t kGrainElements = 131072;  // about 20 us of work: below that a second thread costs more than it saves

template <class T> void mask_row(T* z, const uint8_t* support, int64_t width) {
  const T outside = from_f32<T>(-kInf);
  for (int64_t j = 0; j < width; j += kSupportTokens) {
    const int64_t count = width - j < kSupportTokens ? width - j : kSupportTokens;
    const unsigned bits = support_byte(support[j / kSupportTokens], count);
    if (bits == 0)  // almost every byte of a filtered row
      for (int i = 0; i < kSupportTokens; ++i) z[j + i] = outside;
    else if (bits != 0xffu)
      for (int64_t i = 0; i < count; ++i)
        if (!(bits >> i & 1u)) z[j + i] = outside;
  }
}

template <class T> void mask_rows(const SupportMaskParams& p) {
  const int64_t grain = p.width < kGrainElements ? kGrainElements / p.width : 1;
  parallel_for(p.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      mask_row(static_cast<T*>(p.logits) + row * p.row_stride, p.support + row * support_bytes(p.width), p.width);
  });
}

}  // namespace

void support_mask_cpu(const SupportMaskParams& p) {
  if (p.dtype == DType::f32)
    mask_rows<float>(p);
  else if (p.dtype == DType::bf16)
    mask_rows<bf16>(p);
  else
    mask_rows<f16>(p);
}

}  // namespace pymathrl
