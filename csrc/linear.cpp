#include "linear.h"

#include <algorithm>
#include <utility>

#include "common/parallel.h"
#include "common/simd.h"

namespace pymathrl {
inline namespace PYMATHRL_LEVEL {
namespace {

// The sums of a tile of kRowTile x kColumnTile, a register each, its rows of x and one row of w at a time fill the
// registers: 16, or 32 on AVX-512. Lanes run along k, so w needs no second copy and every M has the same order.
constexpr int kRowTile = kNative == 16 ? 6 : 3;
constexpr int kColumnTile = 4;
constexpr int64_t kRowBlock = 48;            // rows of x that meet a strip of w while it is in the first-level cache
constexpr int64_t kColumnBlock = 64;         // rows of w that stay in the second-level cache while the blocks of x pass
constexpr int64_t kRowPart = 8 * kRowBlock;  // rows of a task
constexpr int64_t kTasks = 16;               // tasks are narrower where there are fewer: the threads end together
constexpr int64_t kStripGrain = 8;           // strips of a task where all rows are one block: 5 us of memory at M = 1

typedef float f32x4 __attribute__((vector_size(16)));

// The elements of a step of k; the rest of a row, `count` of them, is filled with zeros.
template <bool whole> HD native_f32 load(const float* p, int64_t count) {
  native_f32 x;
  if constexpr (whole) {
    memcpy(&x, p, sizeof x);
  } else {
    for (int lane = 0; lane < kNative; ++lane) x[lane] = lane < count ? p[lane] : 0.0f;
  }
  return x;
}

// As assembly: from sum += a * b, gcc 12 makes the forms that overwrite a or b as well, and then spills sums inside the
// loop (measured 60 against 85 GFLOP/s).
HD void multiply_add(native_f32& sum, native_f32 a, native_f32 b) {
#ifdef __FMA__
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#else
  sum += a * b;
#endif
}

// One step of k for the tile; sum: [kColumnTile][rows]. Index packs and not loops: the sums must be in registers.
template <bool whole, int... I>
HD void step(native_f32* sum, const float* const* w, const float* x, int64_t stride, int64_t k, int64_t count,
             std::integer_sequence<int, I...>) {
  constexpr int rows = sizeof...(I);
  const native_f32 a[] = {load<whole>(x + I * stride + k, count)...};
  native_f32 b = load<whole>(w[0] + k, count);
  (multiply_add(sum[I], a[I], b), ...);
  b = load<whole>(w[1] + k, count);
  (multiply_add(sum[rows + I], a[I], b), ...);
  b = load<whole>(w[2] + k, count);
  (multiply_add(sum[2 * rows + I], a[I], b), ...);
  b = load<whole>(w[3] + k, count);
  (multiply_add(sum[3 * rows + I], a[I], b), ...);
}

// The sums of the lanes of a, b, c and d: in each group of four lanes (0 + 2) + (1 + 3), then the halves of the groups.
template <int... L>
HD f32x4 sum_lanes(native_f32 a, native_f32 b, native_f32 c, native_f32 d, std::integer_sequence<int, L...>) {
#define PAIR(x, y, first) __builtin_shufflevector(x, y, (L / 4 * 4 + L % 4 / 2 + first + L % 2 * kNative)...)
#define FOUR(x, y, first) __builtin_shufflevector(x, y, (L / 4 * 4 + L % 2 + first + L % 4 / 2 * kNative)...)
  native_f32 ab = PAIR(a, b, 0) + PAIR(a, b, 2), cd = PAIR(c, d, 0) + PAIR(c, d, 2);  // a0+a2, b0+b2, a1+a3, b1+b3, ...
  native_f32 all = FOUR(ab, cd, 0) + FOUR(ab, cd, 2);
#undef PAIR
#undef FOUR
  f32x4 group[kNative / 4];
  memcpy(group, &all, sizeof all);
  for (int width = kNative / 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) group[i] += group[i + width];
  return group[0];
}

// kColumnTile columns of y for some rows, over one piece of K.
struct Strip {
  const float* w[kColumnTile];
  const float *x, *from;  // y = from + sum: the bias, or y itself
  float* y;
  int64_t x_stride, from_stride, y_stride, length;
  const char* next;       // memory that is needed soon, fetched into the cache on the way:
  int64_t advance;        // so many bytes in a step
};

template <int... I>
HD void strip(Strip s, int64_t tiles, std::integer_sequence<int, I...> rows) {
  constexpr int R = sizeof...(I);
  for (; tiles > 0; --tiles) {
    native_f32 sum[kColumnTile * R] = {};
    int64_t k = 0;
    for (; k <= s.length - kNative; k += kNative) {
      __builtin_prefetch(s.next);
      s.next += s.advance;
      step<true>(sum, s.w, s.x, s.x_stride, k, 0, rows);
    }
    if (k < s.length) step<false>(sum, s.w, s.x, s.x_stride, k, s.length - k, rows);
    auto put = [&](int row, f32x4 value) __attribute__((always_inline)) {
      f32x4 from;
      memcpy(&from, s.from + row * s.from_stride, sizeof from);
      from += value;
      memcpy(s.y + row * s.y_stride, &from, sizeof from);
    };
    constexpr auto lanes = std::make_integer_sequence<int, kNative>();
    (put(I, sum_lanes(sum[I], sum[R + I], sum[2 * R + I], sum[3 * R + I], lanes)), ...);
    s.x += R * s.x_stride;
    s.from += R * s.from_stride;
    s.y += R * s.y_stride;
  }
}
template <int R> __attribute__((noinline)) void strip(const Strip& s, int64_t tiles) {
  strip(s, tiles, std::make_integer_sequence<int, R>());
}

// The same for any number of rows, in tiles as equal in height as can be: one of a single row beside full ones would
// keep the multipliers half busy (4 sums in flight, and they take 8).
void rows_of_strip(Strip s, int64_t rows) {
  static constexpr void (*kStrip[])(const Strip&, int64_t) = {nullptr,  strip<1>, strip<2>, strip<3>,
#ifdef __AVX512F__
                                                              strip<4>, strip<5>, strip<6>
#endif
  };
  const int64_t tiles = (rows + kRowTile - 1) / kRowTile, height = rows / tiles, higher = rows % tiles;
  s.advance /= tiles;
  if (higher) {
    kStrip[height + 1](s, higher);
    s.x += higher * (height + 1) * s.x_stride;
    s.from += higher * (height + 1) * s.from_stride;
    s.y += higher * (height + 1) * s.y_stride;
  }
  kStrip[height](s, tiles - higher);
}

// Rows [m0,m1) and columns [n0,n1) of y.
void block(const LinearParams& p, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  static constexpr float kZero[kColumnTile] = {};
  const int64_t chunks = linear_chunks(p.depth);
  const int64_t length = ((p.depth + chunks - 1) / chunks + kLinearAlign - 1) / kLinearAlign * kLinearAlign;
  // Rows of x are brought together where K is cut: apart, by 4 KB in the worst case, they compete for the same few
  // lines of the first-level cache, and every row starts a new stream (M, K, N = 2304, 1024, 1536: 64 GFLOP/s, together
  // 74).
  alignas(64) float packed[kRowBlock * (kLinearChunk + kLinearAlign)];
  for (int64_t k = 0; k < p.depth; k += length) {
    for (int64_t m = m0; m < m1; m += kRowBlock) {
      const int64_t rows = std::min(kRowBlock, m1 - m);
      const float* x = static_cast<const float*>(p.x) + m * p.x_stride + k;
      int64_t x_stride = p.x_stride;
      if (chunks > 1 && n1 - n0 > kColumnTile) {
        x_stride = length + kLinearAlign;
        for (int64_t i = 0; i < rows; ++i)
          memcpy(packed + i * x_stride, x + i * p.x_stride, std::min(length, p.depth - k) * sizeof(float));
        x = packed;
      }
      for (int64_t n = n0; n < n1; n += kColumnTile) {
        const int64_t columns = std::min<int64_t>(kColumnTile, n1 - n);
        const float* w = static_cast<const float*>(p.w) + n * p.depth;
        Strip s{};
        for (int j = 0; j < kColumnTile; ++j) s.w[j] = w + std::min<int64_t>(j, columns - 1) * p.depth + k;
        s.x = x;
        s.x_stride = x_stride;
        s.y = p.y + m * p.y_stride + n;
        s.y_stride = p.y_stride;
        s.from = k ? s.y : p.bias ? p.bias + n : kZero;
        s.from_stride = k ? p.y_stride : 0;
        s.length = std::min(length, p.depth - k);
        // The next rows of w come from memory the first time: this piece's share of them, spread over its tiles.
        s.next = reinterpret_cast<const char*>(m == m0 ? w + kColumnTile * (p.depth + k) : w);
        s.advance = m == m0 ? kColumnTile * kNative * sizeof(float) : 0;
        if (columns == kColumnTile) {
          rows_of_strip(s, rows);
          continue;
        }
        float narrow[kRowBlock][kColumnTile] = {};  // strips are whole: the last one's columns pass through here
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < columns; ++j) narrow[i][j] = s.from[i * s.from_stride + j];
        float* y = s.y;
        s.from = s.y = narrow[0];
        s.from_stride = s.y_stride = kColumnTile;
        rows_of_strip(s, rows);
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < columns; ++j) y[i * p.y_stride + j] = narrow[i][j];
      }
    }
  }
}

}  // namespace

void linear_cpu(const LinearParams& p) {
  if (p.rows == 0 || p.columns == 0) return;
  if (p.rows <= kRowBlock) {  // w is read once, strip by strip
    const int64_t strips = (p.columns + kColumnTile - 1) / kColumnTile;
    parallel_for(strips, kStripGrain, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        block(p, 0, p.rows, n * kColumnTile, std::min((n + 1) * kColumnTile, p.columns));
    });
    return;
  }
  const int64_t parts = (p.rows + kRowPart - 1) / kRowPart;
  const int64_t blocks = (p.columns + kColumnBlock - 1) / kColumnBlock;
  const int64_t width = parts * blocks < kTasks ? kColumnBlock / 2 : kColumnBlock;
  parallel_for(parts * ((p.columns + width - 1) / width), 1, [&](int64_t task, int64_t) {
    const int64_t m = task % parts * kRowPart, n = task / parts * width;
    block(p, m, std::min(m + kRowPart, p.rows), n, std::min(n + width, p.columns));
  });
}

}  // namespace PYMATHRL_LEVEL
}  // namespace pymathrl
