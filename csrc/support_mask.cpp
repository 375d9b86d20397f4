#include "support_mask.h"

#include "common/parallel.h"

namespace pymathrl {
namespace {

constexpr int64_t kGrainElements = 131072;  // about 20 us of work: below that a second thread costs more than it saves

// Bits: the logits as patterns. A byte with some tokens kept is blended without a branch: one per token would be
// mispredicted as often as not (measured 6 ns per token).
template <class Bits> void mask_row(Bits* z, const uint8_t* support, int64_t width, Bits outside) {
  for (int64_t j = 0; j < width; j += kSupportTokens) {
    const int64_t count = width - j < kSupportTokens ? width - j : kSupportTokens;
    const unsigned bits = support_byte(support[j / kSupportTokens], count);
    if (bits == 0) {  // almost every byte of a filtered row
      for (int i = 0; i < kSupportTokens; ++i) z[j + i] = outside;
    } else if (bits != 0xffu) {
      for (int64_t i = 0; i < count; ++i) {
        const Bits keep = static_cast<Bits>(0u - (bits >> i & 1u));
        z[j + i] = static_cast<Bits>((z[j + i] & keep) | (outside & ~keep));
      }
    }
  }
}

template <class Bits> void mask_rows(const SupportMaskParams& p, Bits outside) {
  const int64_t grain = p.width < kGrainElements ? kGrainElements / p.width : 1;
  parallel_for(p.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      mask_row(static_cast<Bits*>(p.logits) + row * p.row_stride, p.support + row * support_bytes(p.width), p.width,
               outside);
  });
}

}  // namespace

void support_mask_cpu(const SupportMaskParams& p) {
  if (p.dtype == DType::f32)
    mask_rows<uint32_t>(p, as_bits(-kInf));
  else if (p.dtype == DType::bf16)
    mask_rows<uint16_t>(p, from_f32<bf16>(-kInf).bits);
  else
    mask_rows<uint16_t>(p, from_f32<f16>(-kInf).bits);
}

}  // namespace pymathrl
