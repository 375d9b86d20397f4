// The search of one row of logits by one block: the last token that top-k or top-p keeps, the inverse CDF, the support.
// top-k and top-p find their last token by histograms: 1024 bins of the logit's distance from the maximum, then of its
// bits within the bin, until one value is left; equal values are then cut by index in the same way. Counts and masses are
// integers (mass: fixed point), so shared-memory atomics give the same sum in any order.
#pragma once
#include "common/row_softmax.cuh"
#include "sample_token.h"

namespace pymathrl {

using Mass = unsigned long long;  // of e, in fixed point: 1 is mass_one

constexpr int kBins = 1024;       // of a histogram, and chunks of the inverse CDF at most
constexpr int kPerLane = kBins / 32;
constexpr int kChunk = 32 * kVec;  // elements that a warp sums at a time
constexpr float kBinsPerBit = 16.0f;

struct Min {
  template <class T> __device__ T operator()(T a, T b) const { return a < b ? a : b; }
};

// What warp 0 finds in a histogram, for everybody.
struct Found {
  int64_t above_count;  // tokens before the bin
  Mass above_mass;
  Mass total_mass;      // of this histogram
  int64_t bin_count;
  int bin;
};

struct Shared {
  float reduce[3 * 32];
  int64_t reduce_index[2 * 32];
  uint32_t count[kBins];
  Mass mass[kBins];
  float chunk[kBins];
  Found found;
  int64_t id;
};

// Unsigned integers in the order of the floats; -0 and +0 are equal, as in a comparison.
__device__ __forceinline__ uint32_t order_key(float z) {
  uint32_t bits = as_bits(z + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float key_value(uint32_t key) {
  return as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// The fixed-point 1 of a row's masses: a power of two, so large that their sum still fits 63 bits.
__device__ __forceinline__ float mass_unit(int64_t width) {
  const int width_bits = 64 - __clzll(width), mass_bits = width_bits > 18 ? 62 - width_bits : 44;
  return as_float(static_cast<uint32_t>(127 + mass_bits) << 23);
}

// The search of one row, by one block; compiled once for all dtypes and team sizes.
struct RowSearch {
  const void* z;
  DType dtype;
  int64_t width;
  bool aligned;
  float max, scale;
  float mass_one;  // mass_unit(width)
  Shared* shared;

  __device__ __forceinline__ void load(int64_t j, float* x) const {
    const int count = vec_count(j, width);
    if (dtype == DType::f32)
      load_vec(static_cast<const float*>(z) + j, count, aligned, -kInf, x);
    else if (dtype == DType::bf16)
      load_vec(static_cast<const bf16*>(z) + j, count, aligned, -kInf, x);
    else
      load_vec(static_cast<const f16*>(z) + j, count, aligned, -kInf, x);
  }

  // Calls visit(value, index) for every element of the row, each by one thread.
  template <class Visit> __device__ void sweep(const Visit& visit) const {
    const int64_t step = static_cast<int64_t>(blockDim.x) * kVec;
    for (int64_t j = static_cast<int64_t>(threadIdx.x) * kVec; j < width; j += step) {
      const int count = vec_count(j, width);
      float x[kVec];
      load(j, x);
#pragma unroll
      for (int i = 0; i < kVec; ++i)
        if (i < count) visit(x[i], j + i);
    }
  }

  __device__ Mass mass_of(float value) const {
    return __float2ull_rz(row_exp2(value, max, scale) * mass_one);
  }

  __device__ int distance_bin(float value) const {
    return static_cast<int>(fminf((max - value) * scale * kBinsPerBit, static_cast<float>(kBins - 1)));
  }

  // Fills the histogram: bin_of(value, index) gives a bin, or -1 for none. All threads call it; ends in a barrier.
  template <class BinOf> __device__ void histogram(const BinOf& bin_of) const {
    for (int b = threadIdx.x; b < kBins; b += blockDim.x) {
      shared->count[b] = 0;
      shared->mass[b] = 0;
    }
    __syncthreads();
    sweep([&](float value, int64_t j) {
      int bin = bin_of(value, j);
      if (bin < 0) return;
      atomicAdd(&shared->count[bin], 1u);
      atomicAdd(&shared->mass[bin], mass_of(value));
    });
    __syncthreads();
  }

  // The first non-empty bin with above + (bins up to it) >= the target, of count or of mass. A target above everything
  // gives the last non-empty bin. share >= 0: the target is that share of the histogram's own mass, less kTie. All threads
  // call it and get the result; ends in a barrier.
  __device__ __noinline__ Found locate(bool by_mass, int64_t above_count, Mass above_mass, int64_t target_count,
                                       Mass target_mass, double share) const {
    if (threadIdx.x < 32) {
      const int lane = threadIdx.x, first = lane * kPerLane;
      int64_t count = 0;
      Mass mass = 0;
      for (int i = 0; i < kPerLane; ++i) {
        count += shared->count[first + i];
        mass += shared->mass[first + i];
      }
      int64_t counts = count;  // inclusive scans over lanes
      Mass masses = mass;
      for (int offset = 1; offset < 32; offset <<= 1) {
        int64_t c = __shfl_up_sync(0xffffffffu, counts, offset);
        Mass m = __shfl_up_sync(0xffffffffu, masses, offset);
        if (lane >= offset) {
          counts += c;
          masses += m;
        }
      }
      const Mass total = __shfl_sync(0xffffffffu, masses, 31);
      if (share >= 0.0) target_mass = static_cast<Mass>(share * (1.0 - kTie) * static_cast<double>(total));
      const bool reached = by_mass ? above_mass + masses >= target_mass : above_count + counts >= target_count;
      const unsigned some = __ballot_sync(0xffffffffu, count > 0);
      const unsigned hits = __ballot_sync(0xffffffffu, count > 0 && reached);
      const int chosen = hits ? __ffs(hits) - 1 : 31 - __clz(some | 1u);
      if (lane == chosen) {
        Found f{above_count + counts - count, above_mass + masses - mass, total, 0, first};
        int64_t c = f.above_count;
        Mass m = f.above_mass;
        for (int i = 0; i < kPerLane; ++i) {
          const int64_t here = shared->count[first + i];
          if (here == 0) continue;
          f.above_count = c;
          f.above_mass = m;
          f.bin_count = here;
          f.bin = first + i;
          c += here;
          m += shared->mass[first + i];
          if (by_mass ? m >= target_mass : c >= target_count) break;
        }
        shared->found = f;
      }
    }
    __syncthreads();
    Found f = shared->found;
    __syncthreads();  // everybody has read it before the next search writes it
    return f;
  }

  // The last token that top-k (by_mass = false) or top-p keeps among the tokens inside `limit`; kept_mass: the mass up to
  // and including it. target: k, or top_p times limit_mass (limit_mass 0: of the mass of all tokens).
  __device__ __noinline__ Cut boundary(bool by_mass, int64_t k, double top_p, Mass limit_mass, const Cut& limit,
                                       Mass* kept_mass) const {
    histogram([&](float value, int64_t j) { return limit.keeps(1.0f, value, j) ? distance_bin(value) : -1; });
    const bool own_total = by_mass && limit_mass == 0;
    Mass target = static_cast<Mass>(top_p * (1.0 - kTie) * static_cast<double>(limit_mass));
    Found f = locate(by_mass, 0, 0, k, target, own_total ? top_p : -1.0);
    if (own_total) target = static_cast<Mass>(top_p * (1.0 - kTie) * static_cast<double>(f.total_mass));
    const int distance = f.bin;
    uint32_t ends[2] = {0xffffffffu, 0xffffffffu};  // the smallest key of the bin, and the complement of the largest
    sweep([&](float value, int64_t j) {
      if (distance_bin(value) != distance || !limit.keeps(1.0f, value, j)) return;
      const uint32_t key = order_key(value);
      ends[0] = key < ends[0] ? key : ends[0];
      ends[1] = ~key < ends[1] ? ~key : ends[1];
    });
    team_reduce(ends, 0xffffffffu, reinterpret_cast<uint32_t*>(shared->reduce), Min(), blockDim.x);
    uint32_t low = ends[0], high = ~ends[1];
    while (low < high) {
      const int bits = 32 - __clz(high - low), shift = bits > 10 ? bits - 10 : 0;
      histogram([&](float value, int64_t j) {
        const uint32_t key = order_key(value);
        return key >= low && key <= high && limit.keeps(1.0f, value, j) ? static_cast<int>((high - key) >> shift) : -1;
      });
      f = locate(by_mass, f.above_count, f.above_mass, k, target, -1.0);
      high -= static_cast<uint32_t>(f.bin) << shift;
      const uint32_t span = (1u << shift) - 1u;
      low = high - low > span ? high - span : low;
    }
    Cut cut;
    cut.z = key_value(high);
    const Mass one = mass_of(cut.z);
    int64_t rank = k - f.above_count;  // how many of the equal values are kept, at least 1
    if (by_mass && (one == 0 || f.above_mass >= target)) rank = 1;
    if (by_mass && one != 0 && f.above_mass < target)
      rank = static_cast<int64_t>((target - f.above_mass + one - 1) / one);
    rank = rank < 1 ? 1 : (rank > f.bin_count ? f.bin_count : rank);
    *kept_mass = f.above_mass + static_cast<Mass>(rank) * one;
    cut.index = rank == f.bin_count ? limit_index(cut.z, limit) : equal_rank(cut.z, rank, limit);
    return cut;
  }

  // Where all equal values inside `limit` are kept: no cut by index but the limit's own.
  __device__ int64_t limit_index(float value, const Cut& limit) const {
    return value == limit.z ? limit.index : INT64_MAX;
  }

  // The index of the rank-th (from 1) element equal to `value` inside `limit`.
  __device__ __noinline__ int64_t equal_rank(float value, int64_t rank, const Cut& limit) const {
    int64_t low = 0, high = width - 1, before = 0;
    while (low < high) {
      const int bits = 64 - __clzll(high - low), shift = bits > 10 ? bits - 10 : 0;
      histogram([&](float z_j, int64_t j) {
        return z_j == value && j >= low && j <= high && limit.keeps(1.0f, z_j, j) ? static_cast<int>((j - low) >> shift)
                                                                                    : -1;
      });
      Found f = locate(false, before, 0, rank, 0, -1.0);
      before = f.above_count;
      low += static_cast<int64_t>(f.bin) << shift;
      const int64_t end = low + (static_cast<int64_t>(1) << shift) - 1;
      high = end < high ? end : high;
    }
    return low;
  }

  // The lowest index of an element equal to `value`.
  __device__ __noinline__ int64_t first_of(float value) const {
    int64_t first[1] = {INT64_MAX};
    sweep([&](float z_j, int64_t j) {
      if (z_j == value && j < first[0]) first[0] = j;
    });
    team_reduce(first, INT64_MAX, shared->reduce_index, Min(), blockDim.x);
    return first[0];
  }

  __device__ float kept(const Cut& cut, float value, int64_t j) const {
    const float e = row_exp2(value, max, scale);
    return cut.keeps(e, value, j) ? e : 0.0f;
  }

  // The logit of token j, -inf where it is cut.
  __device__ float kept_logit(const Cut& cut, float value, int64_t j) const {
    return cut.keeps(row_exp2(value, max, scale), value, j) ? value : -kInf;
  }

  // One byte per eight elements; past the row's end there is nothing but -inf.
  __device__ __noinline__ void write_support(const Cut& cut, uint8_t* support) const {
    static_assert(kVec == 8, "a vector of logits is a byte of the support");
    const int64_t step = static_cast<int64_t>(blockDim.x) * kVec;
    for (int64_t j = static_cast<int64_t>(threadIdx.x) * kVec; j < width; j += step) {
      float x[kVec];
      load(j, x);
      unsigned bits = 0;
#pragma unroll
      for (int i = 0; i < kVec; ++i) bits |= kept_logit(cut, x[i], j + i) > -kInf ? 1u << i : 0u;
      support[j / 8] = static_cast<uint8_t>(bits);
    }
  }

  // A warp's view of 256 elements from j on: its lane's eight kept e.
  __device__ float lane_part(const Cut& cut, int64_t j, float* e) const {
    float x[kVec], sum = 0.0f;
    load(j, x);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      e[i] = kept(cut, x[i], j + i);
      sum += e[i];
    }
    return sum;
  }

  // Inverse CDF in index order: sums of chunks, then the chunk, then the lane, then the element. Sets shared->id;
  // ends in a barrier.
  __device__ __noinline__ void draw(const Cut& cut, double u) const {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int64_t parts = (width + static_cast<int64_t>(kChunk) * kBins - 1) / (static_cast<int64_t>(kChunk) * kBins);
    const int64_t length = parts * kChunk;
    const int chunks = static_cast<int>((width + length - 1) / length);
    float e[kVec];
    for (int c = chunks + threadIdx.x; c < kBins; c += blockDim.x) shared->chunk[c] = 0.0f;
    for (int c = warp; c < chunks; c += blockDim.x / 32) {
      float sum = 0.0f;
      for (int64_t part = 0; part < parts; ++part)
        sum += lane_part(cut, c * length + part * kChunk + lane * kVec, e);
      for (int offset = 16; offset > 0; offset >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      if (lane == 0) shared->chunk[c] = sum;
    }
    __syncthreads();
    if (warp == 0) {
      const int first = lane * kPerLane;
      double own = 0.0;
      for (int i = 0; i < kPerLane; ++i) own += shared->chunk[first + i];
      double upto = own;
      for (int offset = 1; offset < 32; offset <<= 1) {
        const double other = __shfl_up_sync(0xffffffffu, upto, offset);
        if (lane >= offset) upto += other;
      }
      const double total = __shfl_sync(0xffffffffu, upto, 31), target = u * total;
      const unsigned some = __ballot_sync(0xffffffffu, own > 0.0);
      const unsigned hits = __ballot_sync(0xffffffffu, own > 0.0 && upto > target);
      const int chosen = hits ? __ffs(hits) - 1 : 31 - __clz(some | 1u);
      int chunk = 0;
      double start = 0.0;
      if (lane == chosen) {
        double acc = upto - own;
        for (int i = 0; i < kPerLane; ++i) {
          const float sum = shared->chunk[first + i];
          if (!(sum > 0.0f)) continue;
          chunk = first + i;
          start = acc;
          acc += sum;
          if (acc > target) break;
        }
      }
      chunk = __shfl_sync(0xffffffffu, chunk, chosen);
      start = __shfl_sync(0xffffffffu, start, chosen);
      int64_t id = -1, last = -1;  // last: this lane's last token that can be drawn, for a target missed by rounding
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t j = chunk * length + part * kChunk + lane * kVec;
        const double sum = lane_part(cut, j, e);
        double incl = sum;
        for (int offset = 1; offset < 32; offset <<= 1) {
          const double other = __shfl_up_sync(0xffffffffu, incl, offset);
          if (lane >= offset) incl += other;
        }
        const unsigned hit = __ballot_sync(0xffffffffu, sum > 0.0 && start + incl > target);
        double acc = start + (incl - sum);
        int64_t here = -1;
#pragma unroll
        for (int i = 0; i < kVec; ++i)
          if (e[i] > 0.0f) {
            last = j + i;
            if (acc <= target || here < 0) here = j + i;
            acc += e[i];
          }
        if (hit) {
          id = __shfl_sync(0xffffffffu, here, __ffs(hit) - 1);
          break;
        }
        start += __shfl_sync(0xffffffffu, incl, 31);
      }
      for (int offset = 16; offset > 0; offset >>= 1) {
        const int64_t other = __shfl_xor_sync(0xffffffffu, last, offset);
        last = other > last ? other : last;
      }
      if (lane == 0) shared->id = id >= 0 ? id : last;
    }
    __syncthreads();
  }
};

}  // namespace pymathrl
