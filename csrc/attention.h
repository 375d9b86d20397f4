// Causal attention with grouped queries, straight from the projection, over packed sequences and over a paged cache:
//   [q | k | v] = qkv[t,:],  s_ij = q_i . k_j,  out_i = sum_{j<=i} softmax_j(s_ij) v_j   (i, j within one sequence)
//   dv_j = sum_i p_ij do_i,  ds_ij = p_ij (do_i . v_j - do_i . out_i),  dq_i = sum_j ds_ij k_j,  dk_j = sum_i ds_ij q_i
// T tokens or R rows, H query heads, K key/value heads (K divides H), E head size. q comes scaled, q and k turned: the
// op rotary does that for training, paged_attention does it itself, by the same function (rotary.h).
// The softmax runs online (Milakov & Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135): nothing of size
// T x T is stored, and the backward recovers p from lse. One order for every query, in training, prefill and decode
// (CPU): keys in blocks of kPage from position 0; in a block the maximum first, then sums over keys in order.
// Flops per (query head, query, visible key): forward 4E, backward 10E. Bytes (fp32): forward 4(2H+2K)E per token,
// backward twice that: compute-bound on a CPU from a few dozen tokens on. Decode reads 8KE bytes per cached token.
#pragma once
#include "rotary.h"

namespace pymathrl {

constexpr int kPage = 16;      // keys of a page, and keys between two updates of the running maximum
constexpr int kMaxHead = 256;  // largest E; E is a multiple of 8

struct AttentionParams {
  DType dtype;             // of qkv, out, dout, dqkv: f32, on a GPU also bf16
  const void* qkv;         // [T,(H+2K)E]
  const int64_t* offsets;  // [B+1]: sequence b is tokens offsets[b]..offsets[b+1]-1; what follows the last is padding
  void* out;               // [T,H*E]: out in the forward, in for the backward; 0 in the padding
  float* lse;              // [T,H] nats, logsumexp_j s_ij: out in the forward, in for the backward
  const void* dout;        // [T,H*E], backward only
  void* dqkv;              // [T,(H+2K)E] out, backward only; 0 in the padding
  int64_t tokens, sequences, heads, kv_heads, head_dim;
};

struct PagedAttentionParams {
  DType dtype;              // of qkv, keys, values, out
  const void* qkv;          // [R,(H+2K)E] of the new tokens, before norm and rotation
  const int64_t* position;  // [R]
  const int64_t* slot;      // [R]: row of `table`, or -1: a row of padding
  const int32_t* table;     // [S,C]: page of the positions 16c..16c+15 of the sequence in slot s
  const float* rope;        // [P,E]: cosines of a position, then sines
  const float* q_norm;      // [E] or null
  const float* k_norm;      // [E] or null
  void* keys;               // [pages,K,E,16] in and out: keys lie across lanes
  void* values;             // [pages,K,16,E] in and out
  void* out;                // [R,H*E] out
  int64_t rows, slots, columns, positions, pages, heads, kv_heads, head_dim;
  float scale, eps;
};

void attention_cpu(const AttentionParams& p);
void attention_cuda(const AttentionParams& p, int device, void* stream);
void attention_backward_cpu(const AttentionParams& p);
void attention_backward_cuda(const AttentionParams& p, int device, void* stream);
void paged_attention_cpu(const PagedAttentionParams& p);
void paged_attention_cuda(const PagedAttentionParams& p, int device, void* stream);

// Row r goes on with the run of row r-1: the next token of the same sequence.
HD bool continues_run(const PagedAttentionParams& p, int64_t r) {
  return r > 0 && p.slot[r] == p.slot[r - 1] && p.position[r] == p.position[r - 1] + 1;
}

}  // namespace pymathrl
