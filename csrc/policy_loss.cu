#include <utility>

#include "common/cuda.cuh"
#include "policy_loss.h"

namespace pymathrl {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int64_t kMaxGrid = 1 << 20;  // blocks past it are taken by the stride loops

// One block per sequence. Tokens outside [0, N) are never touched, whatever offsets holds.
__global__ void __launch_bounds__(kThreads) sequence_kernel(PolicyLossParams p) {
  __shared__ double shared[33];
  for (int64_t s = blockIdx.x; s < p.sequences; s += gridDim.x) {
    int64_t begin = p.offsets[s], end = p.offsets[s + 1];
    begin = begin < 0 ? 0 : begin;
    end = end > p.n ? p.n : end;
    SequenceSums own, all;
    for (int64_t n = begin + threadIdx.x; n < end; n += kThreads) sequence_add(p, n, own);
    all.x = block_reduce(own.x, 0.0, shared, Add());
    all.tis = block_reduce(own.tis, 0.0, shared, Add());
    all.tokens = block_reduce(own.tokens, 0.0, shared, Add());
    SequenceValues values = sequence_values(p.config, all);
    for (int64_t n = begin + threadIdx.x; n < end; n += kThreads) sequence_write(p, n, values);
  }
}

template <Form F, bool kExtras>
__device__ __forceinline__ Token load_token(const PolicyLossParams& p, int64_t n) {
  Token t{};
  t.logp = p.logp[n];
  t.old_logp = p.old_logp ? p.old_logp[n] : t.logp;
  t.advantage = p.advantage[n];
  t.coef = p.coef[n];
  t.active = mask_of(token_active(p, n));
  if (F == Form::rover && p.mean_logp) {
    t.link = mask_of(p.link[n] != 0);
    // A link past the rows given is the caller's error, found on the CPU by a check that would be a host sync here:
    // it becomes nan, which the loss carries to whoever looks.
    bool inside = n + 1 < p.mean_rows;
    t.next_mean = inside ? p.mean_logp[n + 1] : __int_as_float(0x7fc00000);
    t.next_old_mean = inside ? p.old_mean_logp[n + 1] : 0.0f;
  }
  if (F == Form::lp_reg) {
    t.proxy_logp = p.proxy_logp[n];
    t.selected = mask_of(p.selected[n] != 0);
  }
  bool over_sequence = F == Form::sequence || F == Form::vespo || (F == Form::rover && p.config.rover_response);
  if (over_sequence) t.sequence_x = p.sequence_work[n];
  if (F == Form::sequence) t.sequence_gain = p.sequence_work[p.n + n];
  if (F == Form::vespo) {
    t.phi_positive = p.sequence_work[p.n + n];
    t.phi_negative = p.sequence_work[2 * p.n + n];
  }
  if (kExtras) {
    if (p.ref_logp) t.ref_logp = p.ref_logp[n];
    if (p.entropy) t.entropy = p.entropy[n];
    if (p.behaviour_logp) t.behaviour_logp = p.behaviour_logp[n];
    if (p.sequence_work) t.tis_x = p.sequence_work[2 * p.n + n];
  }
  return t;
}

// Reduces term K over the warp and leaves it in shared[K][warp].
template <int K>
__device__ __forceinline__ void warp_term(float value, float (*shared)[kWarps]) {
  for (int offset = 16; offset > 0; offset >>= 1)
    value = combine_terms(K, value, __shfl_xor_sync(0xffffffffu, value, offset));
  if ((threadIdx.x & 31) == 0) shared[K][threadIdx.x >> 5] = value;
}

template <Form F, bool kExtras, int... K>
__device__ __forceinline__ void add_terms(float* own, const TokenResult& r, std::integer_sequence<int, K...>) {
  (add_term<F, kExtras, K>(own[K], r), ...);
}

template <Form F, bool kExtras, int... K>
__device__ __forceinline__ void warp_terms(const float* own, float (*shared)[kWarps], std::integer_sequence<int, K...>) {
  ((term_used(F, kExtras, K) ? warp_term<K>(own[K], shared) : void()), ...);
}

// Partial sums of block b of kCudaBlock tokens go to partial[k * blocks + b].
template <Form F, bool kExtras>
__global__ void __launch_bounds__(kThreads) token_kernel(PolicyLossParams p, int64_t blocks) {
  __shared__ float shared[kTerms][kWarps];
  constexpr auto kAll = std::make_integer_sequence<int, kTerms>();
  for (int64_t b = blockIdx.x; b < blocks; b += gridDim.x) {
    float own[kTerms];
#pragma unroll
    for (int k = 0; k < kTerms; ++k) own[k] = term_identity(k);
    int64_t end = (b + 1) * kCudaBlock < p.n ? (b + 1) * kCudaBlock : p.n;
    for (int64_t n = b * kCudaBlock + threadIdx.x; n < end; n += kThreads) {
      TokenResult r = policy_token<F, kExtras>(p.config, load_token<F, kExtras>(p, n));
      p.grad_logp[n] = r.grad_logp;
      if (kExtras && p.grad_entropy) p.grad_entropy[n] = r.grad_entropy;
      add_terms<F, kExtras>(own, r, kAll);
    }
    warp_terms<F, kExtras>(own, shared, kAll);
    __syncthreads();
    if (threadIdx.x < kTerms) {
      int k = threadIdx.x;
      float value = term_identity(k);
      if (term_used(F, kExtras, k))
        for (int warp = 0; warp < kWarps; ++warp) value = combine_terms(k, value, shared[k][warp]);
      p.partial[k * blocks + b] = value;
    }
    __syncthreads();  // the readers of shared are done before the next block's writers
  }
}

// One warp per term; lane i takes partial sums i, i+32, ..., then a tree: the order is a function of N only.
__global__ void __launch_bounds__(32) result_kernel(PolicyLossParams p, int64_t blocks) {
  int k = blockIdx.x;
  double sum = 0.0;
  float extreme = term_identity(k);
  for (int64_t b = threadIdx.x; b < blocks; b += 32) {
    float value = p.partial[k * blocks + b];
    if (k < kSums) sum += value;
    else extreme = combine_terms(k, extreme, value);
  }
  for (int offset = 16; offset > 0; offset >>= 1) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    extreme = combine_terms(k, extreme, __shfl_xor_sync(0xffffffffu, extreme, offset));
  }
  if (threadIdx.x == 0) p.result[k] = k < kSums ? static_cast<float>(sum) : extreme;
}

static_assert(kTerms <= kThreads, "token_kernel finishes one term per thread");

template <Form F>
void launch_tokens(const PolicyLossParams& p, int64_t blocks, cudaStream_t stream) {
  auto grid = static_cast<unsigned>(blocks < kMaxGrid ? blocks : kMaxGrid);
  if (p.extras()) token_kernel<F, true><<<grid, kThreads, 0, stream>>>(p, blocks);
  else token_kernel<F, false><<<grid, kThreads, 0, stream>>>(p, blocks);
}

}  // namespace

void policy_loss_cuda(const PolicyLossParams& p, int device, void* stream) {
  DeviceGuard guard(device, "policy_loss");
  auto s = static_cast<cudaStream_t>(stream);
  int64_t blocks = policy_loss_blocks(p.n, true);
  if (p.config.sequence_pass() && p.sequences > 0)
    sequence_kernel<<<static_cast<unsigned>(p.sequences < kMaxGrid ? p.sequences : kMaxGrid), kThreads, 0, s>>>(p);
  if (blocks > 0) switch (p.config.form) {
      case Form::clip: launch_tokens<Form::clip>(p, blocks, s); break;
      case Form::weighted: launch_tokens<Form::weighted>(p, blocks, s); break;
      case Form::sequence: launch_tokens<Form::sequence>(p, blocks, s); break;
      case Form::rover: launch_tokens<Form::rover>(p, blocks, s); break;
      case Form::lp_reg: launch_tokens<Form::lp_reg>(p, blocks, s); break;
      case Form::sapo: launch_tokens<Form::sapo>(p, blocks, s); break;
      case Form::vespo: launch_tokens<Form::vespo>(p, blocks, s); break;
    }
  result_kernel<<<kTerms, 32, 0, s>>>(p, blocks);
  check_cuda(cudaGetLastError(), "policy_loss");
}

}  // namespace pymathrl
