#include "common/packed.cuh"
#include "common/row_softmax.cuh"
#include "ssd_backward.h"

namespace pymathrl {
namespace {

// Forward. A thread has every fourth float4 of the N states of one channel in registers; 4 threads share a channel and a
// warp has 8, so that a state [N,P] is read in whole sectors and the sum over n ends with two shuffles. A block walks
// through the tokens of one run and head over kChannels channels; B and C come through shared memory. Scan and step are
// the same walk.
constexpr int kShare = 4, kChannels = 32, kThreads = kShare * kChannels, kTile = 8;

struct Walk {
  int64_t first, count;   // tokens
  const float* initial;   // [N,P] of the head, or null: 0
  float* final;           // [N,P]
  float* starts;          // [chunks,H,N,P] from the first chunk of the run and the head on, or null
  int64_t chunk;
};

template <int kN> struct State {
  float value[kN / kShare];
};

// The states that register i of this thread stands for: n = 16 (i/4) + 4 share + i%4.
__device__ __forceinline__ int state_of(int i, int share) { return i / 4 * 16 + share * 4 + i % 4; }

template <int kN>
__device__ void store_states(const State<kN>& s, const SsdInputs& in, int64_t channel, int share, float* to) {
  if (channel >= in.width) return;
#pragma unroll
  for (int i = 0; i < kN / kShare; ++i)
    if (state_of(i, share) < in.states) to[state_of(i, share) * in.width + channel] = s.value[i];
}

template <class T, int kN>
__device__ void walk(const SsdInputs& in, void* y, int64_t head, int64_t slice, const Walk& run) {
  __shared__ float4 b_tile[kTile][kN / 4], c_tile[kTile][kN / 4];
  __shared__ float delta_tile[kTile], a_tile[kTile];
  const int lane = threadIdx.x % 32, share = lane / 8;
  const int64_t channel = slice * kChannels + threadIdx.x / 32 * 8 + lane % 8;
  const bool inside = channel < in.width;
  const float rate = ssd_rate(in.a_log[head]), bias = in.dt_bias[head], d = in.d[head];
  const int64_t column = ssd_group(in, head) * in.states, matrix = in.states * in.width;
  State<kN> s;
#pragma unroll
  for (int i = 0; i < kN / kShare; ++i) {
    const int n = state_of(i, share);
    s.value[i] = run.initial && inside && n < in.states ? run.initial[n * in.width + channel] : 0.0f;
  }
  for (int64_t tile = 0; tile < run.count; tile += kTile) {
    const int tokens = run.count - tile < kTile ? static_cast<int>(run.count - tile) : kTile;
    __syncthreads();  // the last tile has been read
    for (int i = threadIdx.x; i < tokens * kN; i += kThreads) {
      const int n = i % kN;
      const int64_t t = run.first + tile + i / kN;
      const bool there = n < in.states;
      reinterpret_cast<float*>(b_tile)[i] =
          there ? to_f32(static_cast<const T*>(in.b)[t * in.b_stride + column + n]) : 0.0f;
      reinterpret_cast<float*>(c_tile)[i] =
          there ? to_f32(static_cast<const T*>(in.c)[t * in.c_stride + column + n]) : 0.0f;
    }
    if (threadIdx.x < tokens) {
      const int64_t t = run.first + tile + threadIdx.x;
      const float delta = ssd_delta(to_f32(static_cast<const T*>(in.dt)[t * in.dt_stride + head]), bias);
      delta_tile[threadIdx.x] = delta;
      a_tile[threadIdx.x] = ssd_decay(delta, rate);
    }
    __syncthreads();
    for (int i = 0; i < tokens; ++i) {
      if (run.starts && (tile + i) % run.chunk == 0)
        store_states(s, in, channel, share, run.starts + (tile + i) / run.chunk * in.heads * matrix);
      const int64_t t = run.first + tile + i;
      const float x = inside ? to_f32(static_cast<const T*>(in.x)[t * in.x_stride + head * in.width + channel]) : 0.0f;
      const float a = a_tile[i], dx = delta_tile[i] * x;
      float sum = share == 0 ? d * x : 0.0f;
#pragma unroll
      for (int q = 0; q < kN / 16; ++q) {
        const float4 b = b_tile[i][q * kShare + share], c = c_tile[i][q * kShare + share];
        ssd_update(s.value[4 * q], sum, a, dx, b.x, c.x);
        ssd_update(s.value[4 * q + 1], sum, a, dx, b.y, c.y);
        ssd_update(s.value[4 * q + 2], sum, a, dx, b.z, c.z);
        ssd_update(s.value[4 * q + 3], sum, a, dx, b.w, c.w);
      }
      sum += __shfl_xor_sync(0xffffffffu, sum, 8);
      sum += __shfl_xor_sync(0xffffffffu, sum, 16);
      if (share == 0 && inside) static_cast<T*>(y)[(t * in.heads + head) * in.width + channel] = from_f32<T>(sum);
    }
  }
  store_states(s, in, channel, share, run.final);
}

// Grid: sequences, heads, slices of channels.
template <class T, int kN> __global__ void __launch_bounds__(kThreads) scan_kernel(SsdScanParams p) {
  const int64_t sequence = blockIdx.x, head = blockIdx.y, matrix = p.in.states * p.in.width;
  const int64_t begin = p.offsets[sequence], at = (sequence * p.in.heads + head) * matrix;
  const int64_t start = first_tile(p.offsets, sequence, p.chunk) * p.in.heads + head;
  walk<T, kN>(p.in, p.y, head, blockIdx.z,
              {begin, p.offsets[sequence + 1] - begin, p.initial ? p.initial + at : nullptr, p.final + at,
               p.starts ? p.starts + start * matrix : nullptr, p.chunk});
}

// Grid: rows, heads, slices of channels. The block of a run's first row does the run.
template <class T, int kN> __global__ void __launch_bounds__(kThreads) step_kernel(SsdStepParams p) {
  const int64_t r = blockIdx.x, head = blockIdx.y;
  if (p.row[r] < 0) {
    const int64_t channel = blockIdx.z * kChannels + threadIdx.x;
    if (threadIdx.x < kChannels && channel < p.in.width)
      static_cast<T*>(p.y)[(r * p.in.heads + head) * p.in.width + channel] = from_f32<T>(0.0f);
    return;
  }
  if (!run_starts(p.row, r)) return;
  const int64_t count = run_end(p.row, p.in.tokens, r) - r;
  float* state = p.state + (p.row[r] * p.in.heads + head) * p.in.states * p.in.width;
  walk<T, kN>(p.in, p.y, head, blockIdx.z, {r, count, p.position[r] == 0 ? nullptr : state, state, nullptr, 1});
}

// f(kN) with the smallest kN that holds the states.
template <class F> void with_states(int64_t states, F f) {
  if (states <= 16) return f(std::integral_constant<int, 16>());
  if (states <= 32) return f(std::integral_constant<int, 32>());
  if (states <= 64) return f(std::integral_constant<int, 64>());
  if (states <= 128) return f(std::integral_constant<int, 128>());
  f(std::integral_constant<int, 256>());
}

dim3 grid_of(int64_t runs, const SsdInputs& in) {
  return dim3(static_cast<unsigned>(runs), static_cast<unsigned>(in.heads),
              static_cast<unsigned>((in.width + kChannels - 1) / kChannels));
}

template <class T>
void clear_padding(void* out, const SsdScanParams& p, int64_t width, cudaStream_t queue) {
  clear_padding_cuda<T>(p.offsets, p.sequences, p.in.tokens, out, width, queue);
}

// Backward: the steps of ssd_backward.h by a block. Products by 16 x 16 threads, 4 x 4 sums each, through shared memory.
constexpr int kSide = 16, kTeam = kSide * kSide, kSums = 4, kOut = kSide * kSums, kDepth = 16;

struct Shared {
  float a[kDepth][kOut], b[kDepth][kOut];
};

struct Block {
  Shared& shared;

  template <class F> __device__ void grid(int64_t rows, int64_t columns, F f) {
    const int count = static_cast<int>(rows * columns), width = static_cast<int>(columns);
    for (int i = threadIdx.x; i < count; i += kTeam) f(i / width, i % width);
    __syncthreads();
  }
  template <class F> __device__ void columns(int64_t rows, int64_t count, F f) {
    for (int64_t j = threadIdx.x; j < count; j += kTeam)
      for (int64_t i = 0; i < rows; ++i) f(i, j);
    __syncthreads();
  }
  template <class F> __device__ void row_sums(int64_t rows, int64_t columns, float* out, F f) {
    for (int64_t i = threadIdx.x / 32; i < rows; i += kTeam / 32) {
      float sum = 0.0f;
      for (int64_t j = threadIdx.x % 32; j < columns; j += 32) sum += f(i, j);
      for (int offset = 16; offset > 0; offset >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      if (threadIdx.x % 32 == 0) out[i] = sum;
    }
    __syncthreads();
  }
  template <class F> __device__ void once(F f) {
    if (threadIdx.x == 0) f();
    __syncthreads();
  }
  template <class T>
  __device__ void pack(const T* from, int64_t stride, int64_t rows, int64_t columns, float* to, int64_t to_stride,
                       int64_t to_rows, int64_t to_columns) {
    grid(to_rows, to_columns, [=](int64_t i, int64_t j) {
      to[i * to_stride + j] = i < rows && j < columns ? to_f32(from[i * stride + j]) : 0.0f;
    });
  }
  template <class T>
  __device__ void unpack(const float* from, int64_t from_stride, int64_t rows, int64_t columns, T* to,
                         int64_t stride) {
    grid(rows, columns, [=](int64_t i, int64_t j) { to[i * stride + j] = from_f32<T>(from[i * from_stride + j]); });
  }
  __device__ void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                            int64_t to_stride) {
    grid(rows, columns, [=](int64_t i, int64_t j) { to[j * to_stride + i] = from[i * from_stride + j]; });
  }
  // What a has of zeros is multiplied as well, but for whole tiles.
  __device__ __noinline__ void multiply(const Product& p) {
    const int row = threadIdx.x / kSide * kSums, column = threadIdx.x % kSide * kSums;
    for (int64_t i = 0; i < p.rows; i += kOut)
      for (int64_t j = 0; j < p.columns; j += kOut) {
        float sum[kSums][kSums] = {};
        const int64_t begin = p.kind == Product::upper ? i : 0;
        const int64_t end = p.kind == Product::lower && i + kOut < p.depth ? i + kOut : p.depth;
        for (int64_t k = begin; k < end; k += kDepth) {
          for (int e = threadIdx.x; e < kDepth * kOut; e += kTeam) {
            const int64_t depth = k + e / kOut, at = e % kOut;
            const bool there = depth < end;
            shared.a[e / kOut][at] = there && i + at < p.rows ? p.a[(i + at) * p.a_row + depth * p.a_step] : 0.0f;
            shared.b[e / kOut][at] = there && j + at < p.columns ? p.b[depth * p.b_stride + j + at] : 0.0f;
          }
          __syncthreads();
#pragma unroll
          for (int depth = 0; depth < kDepth; ++depth)
#pragma unroll
            for (int r = 0; r < kSums; ++r)
#pragma unroll
              for (int c = 0; c < kSums; ++c) sum[r][c] += shared.a[depth][row + r] * shared.b[depth][column + c];
          __syncthreads();
        }
        for (int r = 0; r < kSums && i + row + r < p.rows; ++r)
          for (int c = 0; c < kSums && j + column + c < p.columns; ++c) {
            const int64_t at = (i + row + r) * p.stride + j + column + c;
            p.out[at] = p.factor == 0.0f ? sum[r][c] : p.from[at] * p.factor + sum[r][c];
          }
      }
    __syncthreads();
  }
};

// Grid: workers. Each has its memory and takes every gridDim.x-th head of a sequence.
template <class T> __global__ void __launch_bounds__(kTeam) backward_kernel(SsdGradParams g) {
  __shared__ Shared shared;
  Block team{shared};
  const int64_t heads = g.forward.in.heads;
  for (int64_t i = blockIdx.x; i < g.forward.sequences * heads; i += gridDim.x)
    backward_head<T>(g, i / heads, i % heads, team, g.work + blockIdx.x * g.work_size);
}

}  // namespace

void ssd_scan_cuda(const SsdScanParams& p, int device, void* stream) {
  DeviceGuard guard(device, "ssd_scan");
  auto queue = static_cast<cudaStream_t>(stream);
  with_activations(p.in.dtype, [&](auto element) {
    using T = decltype(element);
    clear_padding<T>(p.y, p, p.in.heads * p.in.width, queue);
    if (p.sequences == 0) return;
    with_states(p.in.states, [&](auto states) {
      scan_kernel<T, decltype(states)::value><<<grid_of(p.sequences, p.in), kThreads, 0, queue>>>(p);
    });
  });
  check_cuda(cudaGetLastError(), "ssd_scan");
}

void ssd_scan_backward_cuda(const SsdGradParams& g, int device, void* stream) {
  DeviceGuard guard(device, "ssd_scan_backward");
  auto queue = static_cast<cudaStream_t>(stream);
  const SsdScanParams& p = g.forward;
  with_activations(p.in.dtype, [&](auto element) {
    using T = decltype(element);
    clear_padding<T>(g.dx, p, p.in.heads * p.in.width, queue);
    clear_padding<T>(g.ddt, p, p.in.heads, queue);
    clear_padding<float>(g.db, p, p.in.heads * p.in.states, queue);
    clear_padding<float>(g.dc, p, p.in.heads * p.in.states, queue);
    if (g.workers == 0) return;
    backward_kernel<T><<<static_cast<unsigned>(g.workers), kTeam, 0, queue>>>(g);
  });
  check_cuda(cudaGetLastError(), "ssd_scan_backward");
}

void ssd_step_cuda(const SsdStepParams& p, int device, void* stream) {
  if (p.in.tokens == 0) return;
  DeviceGuard guard(device, "ssd_step");
  with_activations(p.in.dtype, [&](auto element) {
    with_states(p.in.states, [&](auto states) {
      step_kernel<decltype(element), decltype(states)::value>
          <<<grid_of(p.in.tokens, p.in), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
    });
  });
  check_cuda(cudaGetLastError(), "ssd_step");
}

}  // namespace pymathrl
