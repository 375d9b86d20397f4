#include "sample_token.h"

#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "row_kernels.h"

namespace pymathrl {
namespace {

constexpr int64_t kGrainElements = 32768;  // about 20 us of work: below that a second thread costs more than it saves
constexpr int64_t kPiece = 64;             // top-k bounds its threshold by the maxima of pieces of this many logits

int64_t row_grain(int64_t width) { return width < kGrainElements ? kGrainElements / width : 1; }

struct Candidate {
  float z, e;
  int64_t index;
};
bool before(const Candidate& a, const Candidate& b) { return a.z > b.z || (a.z == b.z && a.index < b.index); }

// Per thread; grows to the row's width once.
struct Scratch {
  std::vector<float> e, block_sum, piece_max;
  std::vector<Candidate> candidates;
};

struct Row {
  const void* z;
  DType dtype;
  int64_t width;
  const RowKernels& kernels;
  float element(int64_t j) const { return row_element(z, dtype, j); }
};

// Inverse CDF in index order; `block` gives the e of the block it settles on.
template <class Block>
int64_t draw(const RowKernels& kernels, const float* block_sum, int64_t width, double target, const Block& block) {
  double acc = 0;
  int64_t chosen = -1;
  double start = 0;
  for (int64_t b = 0; b < row_blocks(width); ++b) {
    if (!(block_sum[b] > 0.0f)) continue;
    chosen = b;
    start = acc;
    acc += block_sum[b];
    if (acc > target) break;
  }
  int64_t first = chosen * kRowBlock;
  return first + kernels.find(block(chosen), std::min(kRowBlock, width - first), start, target);
}

// The largest z that at least k logits reach, or less: the k-th largest of the pieces' maxima.
float top_k_bound(const Row& row, int64_t k, std::vector<float>& piece_max) {
  int64_t pieces = (row.width + kPiece - 1) / kPiece;
  if (pieces < k) return -kInf;
  piece_max.resize(static_cast<size_t>(pieces));
  for (int64_t i = 0; i < pieces; ++i)
    piece_max[static_cast<size_t>(i)] = row.kernels.max(row_at(row.z, row.dtype, i * kPiece), row.dtype,
                                                        std::min(kPiece, row.width - i * kPiece));
  std::nth_element(piece_max.begin(), piece_max.begin() + (k - 1), piece_max.end(), std::greater<float>());
  return piece_max[static_cast<size_t>(k - 1)];
}

// How many of the candidates, in order, top-p keeps. Halves the undecided range around its median, so that only the
// neighbourhood of the cut is ever sorted.
size_t top_p_count(std::vector<Candidate>& c, double target) {
  size_t low = 0, high = c.size();
  double mass = 0;
  while (high - low > 32) {
    size_t middle = low + (high - low) / 2;
    std::nth_element(c.begin() + low, c.begin() + middle, c.begin() + high, before);
    double part = 0;
    for (size_t i = low; i < middle; ++i) part += c[i].e;
    if (mass + part >= target) {
      high = middle;
    } else {
      mass += part;
      low = middle;
    }
  }
  std::sort(c.begin() + low, c.begin() + high, before);
  size_t count = low;
  while (count < high && (count == 0 || mass < target)) mass += c[count++].e;
  return count;
}

// The first k logits in the order of the filters, the last of them at the end.
void take_top_k(const Row& row, int64_t k, const float* e, Scratch& s) {
  auto& c = s.candidates;
  c.clear();
  const float bound = top_k_bound(row, k, s.piece_max);
  for (int64_t j = 0; j < row.width; ++j)
    if (float z = row.element(j); z >= bound) c.push_back({z, e ? e[j] : 0.0f, j});
  std::nth_element(c.begin(), c.begin() + (k - 1), c.end(), before);
  c.resize(static_cast<size_t>(k));
}

Cut find_cut(const SampleTokenParams& p, const Row& row, const float* e, double sum, Scratch& s) {
  Cut cut;
  if (!filtered(p)) return cut;
  cut.floor = min_p_threshold(p.min_p);
  if (!by_top_k(p) && !by_top_p(p)) return cut;
  auto& c = s.candidates;
  if (by_top_k(p)) {
    take_top_k(row, p.top_k, e, s);
    if (!by_top_p(p)) {
      cut.z = c.back().z;
      cut.index = c.back().index;
      return cut;
    }
    sum = 0;
    for (const Candidate& one : c) sum += one.e;
  } else {
    c.clear();
    // All tokens below this together hold at most (1 - top_p) of the mass: none of them is kept.
    float bound = static_cast<float>((1.0 - p.top_p) * sum / static_cast<double>(row.width)) * 0.999f;
    for (int64_t j = 0; j < row.width; ++j)
      if (e[j] >= bound) c.push_back({row.element(j), e[j], j});
  }
  const Candidate& last = c[top_p_count(c, top_p_target(p, sum)) - 1];
  cut.z = last.z;
  cut.index = last.index;
  return cut;
}

int64_t first_of(const Row& row, float value) {
  int64_t j = 0;
  while (row.element(j) != value) ++j;
  return j;
}

// Whether a row goes through the filters' pass, which also writes the support.
bool through_filter(const SampleTokenParams& p) { return filtered(p) || p.support; }

void sample_row(const SampleTokenParams& p, int64_t index, float inverse_t, Scratch& s) {
  Row row{row_at(p.logits, p.dtype, index * p.row_stride), p.dtype, p.width, row_kernels()};
  const RowKernels& kernels = row.kernels;
  bool cuts = through_filter(p), keep_e = cuts || p.width <= kRowBlock;
  float max = kernels.max(row.z, row.dtype, row.width);
  RowSums sums = kernels.sums(row.z, row.dtype, row.width, max, inverse_t, 0.0f, s.block_sum.data(),
                              keep_e ? s.e.data() : nullptr, nullptr);
  if (!has_distribution(sums)) return sample_token_fail(p, index);
  RowSums kept = sums;
  if (cuts) {
    Cut cut = find_cut(p, row, s.e.data(), sums.e, s);
    kept = kernels.filter(row.z, row.dtype, row.width, cut, max, inverse_t, s.e.data(), s.block_sum.data(),
                          support_row(p, index));
  }
  int64_t id;
  if (p.temperature == 0.0) {
    id = first_of(row, max);
  } else {
    id = draw(kernels, s.block_sum.data(), p.width, sample_uniform(p, index) * kept.e, [&](int64_t b) {
      int64_t first = b * kRowBlock;
      if (keep_e) return static_cast<const float*>(s.e.data() + first);
      kernels.sums(row_at(row.z, row.dtype, first), row.dtype, std::min(kRowBlock, p.width - first), max, inverse_t,
                   0.0f, nullptr, s.e.data(), nullptr);
      return static_cast<const float*>(s.e.data());
    });
  }
  sample_token_finish(p, index, id, row.element(id), sums, kept);
}

}  // namespace

Cut top_k_cut(const void* row, DType dtype, int64_t width, int64_t k) {
  static thread_local Scratch s;
  take_top_k({row, dtype, width, row_kernels()}, k, nullptr, s);
  Cut cut;
  cut.z = s.candidates.back().z;
  cut.index = s.candidates.back().index;
  return cut;
}

void sample_token_cpu(const SampleTokenParams& p) {
  float inverse_t = static_cast<float>(1.0 / sample_temperature(p));
  int64_t scratch = through_filter(p) ? p.width : std::min(p.width, kRowBlock);
  parallel_for(p.rows, row_grain(p.width), [&](int64_t begin, int64_t end) {
    static thread_local Scratch s;
    s.block_sum.resize(static_cast<size_t>(row_blocks(p.width)));
    s.e.resize(static_cast<size_t>(scratch));
    for (int64_t row = begin; row < end; ++row) sample_row(p, row, inverse_t, s);
  });
}

}  // namespace pymathrl
