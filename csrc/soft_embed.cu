#include "common/row_search.cuh"
#include "soft_embed.h"

namespace pymathrl {
namespace {

constexpr int kTile = 32;   // rows, and columns, of h of a block
constexpr int kDepth = 32;  // tokens in shared memory at a time; divides kMixBlock
constexpr int kSide = 16;   // threads of a block: kSide x kSide, each with kEach x kEach elements of h
constexpr int kEach = kTile / kSide;
constexpr int kFinishThreads = 128;
static_assert(kMixBlock % kDepth == 0, "a chain of h is whole pieces");

// One block per row. Each thread reads the logits that it writes the weights of, so that the two may be one tensor.
template <int kTeam> __global__ void __launch_bounds__(kTeam) weigh_kernel(SoftEmbedParams p, bool aligned) {
  __shared__ Shared shared;
  const float inverse_t = static_cast<float>(1.0 / p.temperature);
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const float* z = p.logits + row * p.row_stride;
    float* weights = p.weights + row * p.weight_stride;
    const RowSums sums = team_row_sums<float, kTeam>(z, p.width, aligned, inverse_t, threadIdx.x, shared.reduce);
    if (!has_distribution(sums)) {  // the same on every thread
      for (int64_t j = threadIdx.x; j < p.width; j += kTeam) weights[j] = __int_as_float(0x7fc00000);
      if (threadIdx.x == 0) soft_embed_numbers(p, row, -1, sums, sums);
      continue;
    }
    RowSearch search{z, DType::f32, p.width, aligned, sums.max, inverse_t * kLog2E, mass_unit(p.width), &shared};
    Cut cut;
    RowSums kept = sums;
    if (soft_by_top_k(p)) {
      Mass mass = 0;
      cut = search.boundary(false, p.top_k, 0.0, 0, Cut{}, &mass);
      kept = team_row_sums<float, kTeam>(z, p.width, aligned, inverse_t, threadIdx.x, shared.reduce,
                                         [&](float value, int64_t j) { return search.kept_logit(cut, value, j); });
    }
    const int64_t id = search.first_of(sums.max);
    if (threadIdx.x == 0) soft_embed_numbers(p, row, id, sums, kept);
    const float share = static_cast<float>(1.0 / kept.e);
    __syncthreads();  // nobody reads a logit of another thread any more
    for (int64_t j = threadIdx.x; j < p.width; j += kTeam) weights[j] = search.kept(cut, z[j], j) * share;
  }
}

// An element of h belongs to one thread, which adds the tokens in the order of the CPU's. A piece of tokens that none of
// the block's rows weighs is not read: its products are zeros, which change no sum.
template <class T> __global__ void __launch_bounds__(kSide* kSide) mix_kernel(SoftEmbedParams p) {
  __shared__ float weight[kDepth][kTile + 1], entry[kDepth][kTile + 1];
  const int64_t row_tiles = (p.rows + kTile - 1) / kTile;
  const int64_t first_row = blockIdx.x % row_tiles * kTile, first_column = blockIdx.x / row_tiles * kTile;
  const int row = threadIdx.x / kSide, column = threadIdx.x % kSide;
  const T* table = static_cast<const T*>(p.table);
  float sum[kEach][kEach] = {}, chain[kEach][kEach] = {};
  for (int64_t j = 0; j < p.width; j += kDepth) {
    bool any = false;
    for (int i = threadIdx.x; i < kTile * kDepth; i += kSide * kSide) {
      const int64_t m = first_row + i / kDepth, token = j + i % kDepth;
      const float w = m < p.rows && token < p.width ? p.weights[m * p.weight_stride + token] : 0.0f;
      weight[i % kDepth][i / kDepth] = w;
      any |= w != 0.0f;
    }
    if (__syncthreads_or(any)) {
      for (int i = threadIdx.x; i < kTile * kDepth; i += kSide * kSide) {
        const int64_t token = j + i / kTile, d = first_column + i % kTile;
        entry[i / kTile][i % kTile] = token < p.width && d < p.columns ? to_f32(table[token * p.columns + d]) : 0.0f;
      }
      __syncthreads();
      for (int t = 0; t < kDepth; ++t)
        for (int a = 0; a < kEach; ++a)
          for (int b = 0; b < kEach; ++b)
            chain[a][b] += weight[t][a * kSide + row] * entry[t][b * kSide + column];
    }
    if ((j + kDepth) % kMixBlock == 0 || j + kDepth >= p.width)
      for (int a = 0; a < kEach; ++a)
        for (int b = 0; b < kEach; ++b) {
          sum[a][b] += chain[a][b];
          chain[a][b] = 0.0f;
        }
    __syncthreads();  // before the next piece overwrites the tiles
  }
  for (int a = 0; a < kEach; ++a)
    for (int b = 0; b < kEach; ++b) {
      const int64_t m = first_row + a * kSide + row, d = first_column + b * kSide + column;
      if (m < p.rows && d < p.columns) p.mean[m * p.columns + d] = sum[a][b];
    }
}

template <class T> __global__ void __launch_bounds__(kFinishThreads) finish_kernel(SoftEmbedParams p) {
  __shared__ double shared[33];
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    double square = 0.0;
    for (int64_t pair = threadIdx.x; 2 * pair < p.columns; pair += kFinishThreads) square += soft_pair<T>(p, row, pair);
    square = block_reduce(square, 0.0, shared, Add());
    if (threadIdx.x == 0) p.logp[row] = soft_logp(p, square);
  }
}

template <int kTeam> __global__ void __launch_bounds__(kTeam) backward_kernel(SoftEmbedGradParams p) {
  __shared__ float shared[33];
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const float* weights = p.weights + row * p.weight_stride;
    float* dots = p.dots + row * p.dot_stride;
    const float scale = static_cast<float>(p.grad_logp[row] / p.temperature);
    if (scale == 0.0f) {
      for (int64_t j = threadIdx.x; j < p.width; j += kTeam) dots[j] = 0.0f;
      continue;
    }
    float centre = 0.0f;
    for (int64_t j = threadIdx.x; j < p.width; j += kTeam) centre += weights[j] > 0.0f ? weights[j] * dots[j] : 0.0f;
    centre = block_reduce(centre, 0.0f, shared, Add());
    for (int64_t j = threadIdx.x; j < p.width; j += kTeam) dots[j] = scale * weights[j] * (dots[j] - centre);
  }
}

unsigned row_grid(int64_t rows) { return static_cast<unsigned>(rows < (1 << 30) ? rows : (1 << 30)); }

}  // namespace

void soft_embed_cuda(const SoftEmbedParams& p, int device, void* stream) {
  if (p.rows == 0) return;
  DeviceGuard guard(device, "soft_embed");
  auto queue = static_cast<cudaStream_t>(stream);
  const bool aligned = rows_aligned(p.logits, p.row_stride, DType::f32);
  with_team(p.width, [&](auto team) {
    constexpr int kTeam = decltype(team)::value;
    weigh_kernel<kTeam><<<row_grid(p.rows), kTeam, 0, queue>>>(p, aligned);
  });
  const int64_t tiles = (p.rows + kTile - 1) / kTile * ((p.columns + kTile - 1) / kTile);
  with_activations(p.dtype, [&](auto element) {
    using T = decltype(element);
    mix_kernel<T><<<static_cast<unsigned>(tiles), kSide * kSide, 0, queue>>>(p);
    finish_kernel<T><<<row_grid(p.rows), kFinishThreads, 0, queue>>>(p);
  });
  check_cuda(cudaGetLastError(), "soft_embed");
}

void soft_embed_backward_cuda(const SoftEmbedGradParams& p, int device, void* stream) {
  if (p.rows == 0) return;
  DeviceGuard guard(device, "soft_embed_backward");
  with_team(p.width, [&](auto team) {
    constexpr int kTeam = decltype(team)::value;
    backward_kernel<kTeam><<<row_grid(p.rows), kTeam, 0, static_cast<cudaStream_t>(stream)>>>(p);
  });
  check_cuda(cudaGetLastError(), "soft_embed_backward");
}

}  // namespace pymathrl
