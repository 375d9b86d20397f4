// Causal attention with grouped queries and rotary positions, straight from the projection, and its one-token step:
//   [q | k | v] = qkv[b,s,:],  s_ij = scale (R_i q_i) . (R_j k_j),  out_i = sum_{j<=i} softmax_j(s_ij) v_j
//   dv_j = sum_i p_ij do_i,  ds_ij = p_ij (do_i . v_j - do_i . out_i),  dq_i = scale R_i^T sum_j ds_ij R_j k_j,
//   dk_j = R_j^T sum_i ds_ij scale R_i q_i.   R_p turns the pair (2c, 2c+1) of a head by the angle of position p.
// B rows, S columns, H query heads, K key/value heads (K divides H), E head size, fp32. Column c of row b is position
// c - pad[b]; columns before pad[b] are no part of the row: their outputs are 0. Padding on the right needs no mask.
// The softmax runs online (Milakov & Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135): nothing of size
// S x S is stored, and the backward recovers p from lse. One order for every query, in training, prefill and decode
// (CPU): keys in blocks of kKeyBlock from position 0; in a block the maximum first, then sums over keys in order.
// Flops per (query head, query, visible key): forward 4E, backward 10E. Bytes: forward 4(2H+3K)E, backward about twice
// that, per token: compute-bound on a CPU from a few dozen tokens on. Decode reads 8KE bytes per cached token.
#pragma once
#include "common/row_softmax.h"

namespace pymathrl {

constexpr int kKeyBlock = 16;     // keys between two updates of the running maximum
constexpr int kMaxHead = 256;     // largest E; E is a multiple of 8

struct AttentionParams {
  const float* qkv;      // [B,S,(H+2K)E] before the rotation
  const float* angle;    // [S,E/2,2] cos and sin of each position's angles
  const int64_t* pad;    // [B] in [0,S], or null: none
  float* keys;           // [B,K,S,E] rotated keys: out in the forward, in for the backward
  float* out;            // [B,S,H*E]: out in the forward, in for the backward
  float* lse;            // [B,H,S] nats, logsumexp_j s_ij: out in the forward, in for the backward
  const float* dout;     // [B,S,H*E], backward only
  float* dqkv;           // [B,S,(H+2K)E] out, backward only
  int64_t rows, columns, heads, kv_heads, head_dim;
  float scale;
};

struct DecodeAttentionParams {
  const float* qkv;      // [B,(H+2K)E] of the newest token, before the rotation
  const float* angle;    // [>= column+1, E/2, 2]
  const int64_t* pad;    // [B] in [0,column]
  float* cache;          // [2,B,K,C,E] rotated keys, then values; this token's are written at `column`
  float* out;            // [B,H*E] out
  int64_t rows, capacity, column, heads, kv_heads, head_dim;
  float scale;
};

void attention_cpu(const AttentionParams& p);
void attention_cuda(const AttentionParams& p, int device, void* stream);
void attention_backward_cpu(const AttentionParams& p);
void attention_backward_cuda(const AttentionParams& p, int device, void* stream);
void decode_attention_cpu(const DecodeAttentionParams& p);
void decode_attention_cuda(const DecodeAttentionParams& p, int device, void* stream);

// Element e of the turned head x. direction: +1 turns by the angle, -1 back.
HD float rotate_element(const float* x, const float* angle, int64_t e, float direction) {
  float cosine = angle[e & ~int64_t{1}], sine = angle[e | 1] * direction;
  return e & 1 ? x[e] * cosine + x[e - 1] * sine : x[e] * cosine + x[e + 1] * -sine;
}

// Where things are. `first` = pad of the row; i and j count positions from there.
struct AttentionRow {
  const AttentionParams& p;
  int64_t b, first, count, width;

  HD AttentionRow(const AttentionParams& params, int64_t row)
      : p(params), b(row), first(params.pad ? params.pad[row] : 0), count(params.columns - first),
        width((params.heads + 2 * params.kv_heads) * params.head_dim) {}
  HD int64_t token(int64_t i) const { return b * p.columns + first + i; }
  HD int64_t q(int64_t h, int64_t i) const { return token(i) * width + h * p.head_dim; }
  HD int64_t k(int64_t c, int64_t i) const { return q(p.heads + c, i); }
  HD int64_t v(int64_t c, int64_t i) const { return q(p.heads + p.kv_heads + c, i); }
  HD int64_t key(int64_t c, int64_t i) const { return ((b * p.kv_heads + c) * p.columns + first + i) * p.head_dim; }
  HD int64_t out(int64_t h, int64_t i) const { return (token(i) * p.heads + h) * p.head_dim; }
  HD int64_t lse(int64_t h, int64_t i) const { return (b * p.heads + h) * p.columns + first + i; }
  HD const float* angle(int64_t i) const { return p.angle + i * p.head_dim; }
};

}  // namespace pymathrl
