// The gradient of one head of one sequence, by products of matrices over blocks of at most kBlock tokens, from the last
// block to the first. With X [q,P], dY [q,P], B and C [q,N] of a block, S [N,P] before it, dS after it, and the decays
//   L_ij = a_{j+1}..a_i (j <= i),  e_i = a_0..a_i,  w_j = a_{j+1}..a_{q-1},  f = e_{q-1}:
//   G = L*(C B^T),  M = L*(dY X^T)*delta_j  (the gradient of C B^T),  all three lower triangles
//   dX' = G^T dY + w*(B dS)          dX = delta*dX' + D dY
//   dC = M B + e*(dY S^T)            dB = M^T C + w*delta*(X dS^T)
//   dS before the block = f dS + C^T (e*dY);  S after it = f S + B^T (w*delta*X)
// The gradient of ln a_k gathers all that passed token k: with T_ij = M_ij (C B^T)_ij,
//   da_k = sum_{j<k<=i} T_ij + sum_{i>=k} u_i + sum_{j<k} v_j + f <S,dS>,  u_i = e_i <C_i, dY_i S^T>,
//   v_j = w_j delta_j <X_j, B_j dS>
// (sums without a difference: rowsum T - colsum T, the form of the paper, cancels the large terms of near tokens),
//   ddelta = <dX', X> + A da,  ddt = ddelta s(dt + dt_bias),  da_log = A sum_k delta_k da_k.
// Decays are products of the a themselves, not e^(difference of two sums): at sums of 300 fp32 has 3e-5 as last digit.
// A chunk has the state before its first token; the states before its other blocks are made again.
//
// The mathematics stands once; a Team runs the steps: a thread with vectors (ssd.cpp) or a block of a GPU (ssd.cu).
//   grid(rows, columns, f)     f(i, j) for all, in any order
//   columns(rows, columns, f)  f(i, j) for i rising in each column j
//   row_sums(rows, columns, out, f)  out[i] = sum_j f(i, j)
//   once(f)                    f() by one thread
//   pack(from, stride, rows, columns, to, to_stride, to_rows, to_columns)  to fp32, with zeros around
//   unpack(from, from_stride, rows, columns, to, stride)
//   transpose(from, from_stride, rows, columns, to, to_stride)
//   multiply(Product)
// Each step sees what those before it wrote.
#pragma once
#include "ssd.h"

namespace pymathrl {

constexpr int64_t kBlock = 64;            // a block's matrices fit the second-level cache
constexpr int64_t kSquare = kBlock + 16;  // floats from row to row: not 256 bytes, where rows share few cache sets
constexpr float kNegligible = 1e-30f;     // decays below become 0: products in the subnormals are slow

HD int64_t round_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// out = factor * from + a b, with a [rows,depth], element (i,k) at a[i * a_row + k * a_step], b [depth,columns] and out
// and from [rows,columns] with contiguous rows. factor 0: from is not read. Rows and columns are multiples of kLanes.
struct Product {
  // What is 0 in a: above the diagonal (lower), below it (upper); or what is not needed in out: above the diagonal.
  enum Kind { full, lower, upper, lower_out } kind;
  float* out;
  int64_t stride;  // of out and from
  const float* from;
  float factor;
  int64_t rows, columns, depth;
  const float* a;
  int64_t a_row, a_step;
  const float* b;
  int64_t b_stride;
};

// A worker's memory. Sizes are rounded up to lanes; what lies outside is 0.
struct SsdWork {
  int64_t n, p, n_stride, p_stride, size = 0;
  float *states, *dstate;      // [blocks][n,p]: S before each block of a chunk; [n,p]
  float *x, *dy, *dx;          // [kBlock,p]
  float *b, *c, *db, *dc;      // [kBlock,n]
  float *cb, *m, *decay;       // [kBlock,kBlock]: C B^T, then G; M; L, then T
  float* turned;               // a transposed matrix
  float *delta, *slope, *a;    // [kBlock]: slope = s(dt + dt_bias)
  float *e, *w;                // [kBlock]
  float *da, *u, *v;           // [kBlock]
  float *ddelta, *x_dy;        // [kBlock]: <dX',X>, then ddt; <X,dY>
  float* dots;                 // [n]: <S,dS> by rows

  HD SsdWork(float* base, int64_t states_count, int64_t width, int64_t chunk)
      : n(round_up(states_count)), p(round_up(width)), n_stride(n + 16), p_stride(p + 16) {
    const auto take = [&](int64_t count) {
      float* at = base ? base + size : nullptr;
      size += count;
      return at;
    };
    states = take((chunk + kBlock - 1) / kBlock * n * p_stride);
    dstate = take(n * p_stride);
    x = take(kBlock * p_stride), dy = take(kBlock * p_stride), dx = take(kBlock * p_stride);
    b = take(kBlock * n_stride), c = take(kBlock * n_stride);
    db = take(kBlock * n_stride), dc = take(kBlock * n_stride);
    cb = take(kBlock * kSquare), m = take(kBlock * kSquare), decay = take(kBlock * kSquare);
    const int64_t longer = n > p ? n : p, state = p * n_stride, block = longer * kSquare;
    turned = take(state > block ? state : block);
    delta = take(kBlock), slope = take(kBlock), a = take(kBlock), e = take(kBlock), w = take(kBlock);
    da = take(kBlock), u = take(kBlock), v = take(kBlock), ddelta = take(kBlock), x_dy = take(kBlock);
    dots = take(n);
  }
};

// Floats of a worker, rounded up so that each worker's begin on a cache line.
HD int64_t ssd_work_size(int64_t states, int64_t width, int64_t chunk) {
  return round_up(SsdWork(nullptr, states, width, chunk).size);
}

HD float ssd_product(float decay, float a) {
  const float product = decay * a;
  return product < kNegligible ? 0.0f : product;
}

// Tokens first..first+count-1 of a head.
template <class E> struct SsdBlock {
  const SsdInputs& in;
  int64_t head, first, count;

  HD int64_t rows() const { return round_up(count); }
  HD const E* x() const { return static_cast<const E*>(in.x) + first * in.x_stride + head * in.width; }
  HD const E* dt() const { return static_cast<const E*>(in.dt) + first * in.dt_stride + head; }
  HD const E* b() const { return static_cast<const E*>(in.b) + first * in.b_stride + ssd_group(in, head) * in.states; }
  HD const E* c() const { return static_cast<const E*>(in.c) + first * in.c_stride + ssd_group(in, head) * in.states; }
  HD int64_t at_x() const { return (first * in.heads + head) * in.width; }   // in dense tensors [T,H*P],
  HD int64_t at_b() const { return (first * in.heads + head) * in.states; }  // [T,H*N],
  HD int64_t at_dt() const { return first * in.heads + head; }               // [T,H]
};

template <class E, class Team> HD void pack_inputs(const SsdBlock<E>& block, Team& team, const SsdWork& work) {
  const SsdInputs& in = block.in;
  const float bias = in.dt_bias[block.head], rate = ssd_rate(in.a_log[block.head]);
  team.pack(block.x(), in.x_stride, block.count, in.width, work.x, work.p_stride, block.rows(), work.p);
  team.pack(block.b(), in.b_stride, block.count, in.states, work.b, work.n_stride, block.rows(), work.n);
  team.pack(block.dt(), in.dt_stride, block.count, 1, work.delta, 1, block.rows(), 1);
  team.grid(1, block.rows(), [&](int64_t, int64_t i) {
    const float dt = work.delta[i] + bias;
    work.slope[i] = sigmoid(dt).s;
    work.delta[i] = softplus(dt);
    work.a[i] = ssd_decay(work.delta[i], rate);
  });
  team.once([&] {
    float decay = 1.0f;
    for (int64_t i = 0; i < block.rows(); ++i)
      work.e[i] = i < block.count ? decay = ssd_product(decay, work.a[i]) : 0.0f;
    decay = 1.0f;
    for (int64_t i = block.rows() - 1; i >= 0; --i) {
      work.w[i] = i < block.count ? decay : 0.0f;
      if (i < block.count) decay = ssd_product(decay, work.a[i]);
    }
  });
}

// G, M and the part of da that stays within the block.
template <class Team> HD void block_triangles(int64_t rows, Team& team, const SsdWork& work) {
  team.transpose(work.b, work.n_stride, rows, work.n, work.turned, kSquare);
  team.multiply({Product::lower_out, work.cb, kSquare, nullptr, 0.0f, rows, rows, work.n, work.c, work.n_stride, 1,
                 work.turned, kSquare});
  team.transpose(work.x, work.p_stride, rows, work.p, work.turned, kSquare);
  team.multiply({Product::lower_out, work.m, kSquare, nullptr, 0.0f, rows, rows, work.p, work.dy, work.p_stride, 1,
                 work.turned, kSquare});
  team.columns(rows, rows, [&](int64_t i, int64_t j) {
    const float above = i ? work.decay[(i - 1) * kSquare + j] : 0.0f;
    work.decay[i * kSquare + j] = j < i ? ssd_product(above, work.a[i]) : j == i ? 1.0f : 0.0f;
  });
  team.grid(rows, rows, [&](int64_t i, int64_t j) {
    const int64_t at = i * kSquare + j;
    const float decay = work.decay[at], cb = j <= i ? work.cb[at] : 0.0f;
    const float m = j <= i ? work.m[at] * decay * work.delta[j] : 0.0f;
    work.m[at] = m;
    work.decay[at] = j < i ? m * cb : 0.0f;
    work.cb[at] = cb * decay;
  });
  team.columns(rows - 1, rows, [&](int64_t r, int64_t j) {  // column sums from row i on
    float* at = work.decay + (rows - 2 - r) * kSquare + j;
    *at += at[kSquare];
  });
  team.row_sums(rows, rows, work.da, [&](int64_t i, int64_t j) {
    return j < i ? work.decay[i * kSquare + j] : 0.0f;
  });
}

struct SsdSums {
  double a, d, bias;
};

// state: S before the block. work.dstate: dS after it, becomes dS before it.
template <class E, class Team>
HD void backward_block(const SsdGradParams& g, const SsdBlock<E>& block, const float* state, Team& team,
                       const SsdWork& work, SsdSums& sums) {
  const SsdInputs& in = block.in;
  const int64_t rows = block.rows();
  const float rate = ssd_rate(in.a_log[block.head]), d = in.d[block.head], f = work.e[block.count - 1];
  team.pack(block.c(), in.c_stride, block.count, in.states, work.c, work.n_stride, rows, work.n);
  team.pack(static_cast<const E*>(g.dy) + block.at_x(), in.heads * in.width, block.count, in.width, work.dy,
            work.p_stride, rows, work.p);
  block_triangles(rows, team, work);

  team.multiply({Product::full, work.dx, work.p_stride, nullptr, 0.0f, rows, work.p, work.n, work.b, work.n_stride, 1,
                 work.dstate, work.p_stride});
  team.grid(rows, work.p, [&](int64_t i, int64_t j) { work.dx[i * work.p_stride + j] *= work.w[i]; });
  team.row_sums(rows, work.p, work.v, [&](int64_t i, int64_t j) {
    return work.x[i * work.p_stride + j] * work.dx[i * work.p_stride + j];
  });
  team.multiply({Product::upper, work.dx, work.p_stride, work.dx, 1.0f, rows, work.p, rows, work.cb, 1, kSquare,
                 work.dy, work.p_stride});

  team.transpose(state, work.p_stride, work.n, work.p, work.turned, work.n_stride);
  team.multiply({Product::full, work.dc, work.n_stride, nullptr, 0.0f, rows, work.n, work.p, work.dy, work.p_stride, 1,
                 work.turned, work.n_stride});
  team.grid(rows, work.n, [&](int64_t i, int64_t j) { work.dc[i * work.n_stride + j] *= work.e[i]; });
  team.row_sums(rows, work.n, work.u, [&](int64_t i, int64_t j) {
    return work.c[i * work.n_stride + j] * work.dc[i * work.n_stride + j];
  });
  team.multiply({Product::lower, work.dc, work.n_stride, work.dc, 1.0f, rows, work.n, rows, work.m, kSquare, 1, work.b,
                 work.n_stride});

  team.transpose(work.dstate, work.p_stride, work.n, work.p, work.turned, work.n_stride);
  team.multiply({Product::full, work.db, work.n_stride, nullptr, 0.0f, rows, work.n, work.p, work.x, work.p_stride, 1,
                 work.turned, work.n_stride});
  team.grid(rows, work.n, [&](int64_t i, int64_t j) {
    work.db[i * work.n_stride + j] *= work.w[i] * work.delta[i];
  });
  team.multiply({Product::upper, work.db, work.n_stride, work.db, 1.0f, rows, work.n, rows, work.m, 1, kSquare, work.c,
                 work.n_stride});

  team.row_sums(rows, work.p, work.ddelta, [&](int64_t i, int64_t j) {
    return work.x[i * work.p_stride + j] * work.dx[i * work.p_stride + j];
  });
  team.row_sums(rows, work.p, work.x_dy, [&](int64_t i, int64_t j) {
    return work.x[i * work.p_stride + j] * work.dy[i * work.p_stride + j];
  });
  team.row_sums(work.n, work.p, work.dots, [&](int64_t i, int64_t j) {
    return state[i * work.p_stride + j] * work.dstate[i * work.p_stride + j];
  });
  team.once([&] {
    float passing = 0.0f;
    for (int64_t i = block.count - 1; i >= 0; --i) work.da[i] += passing += work.u[i];
    passing = 0.0f;
    for (int64_t i = 0; i < work.n; ++i) passing += work.dots[i];
    passing *= f;
    for (int64_t i = 0; i < block.count; ++i) {
      work.da[i] += passing;
      passing += work.v[i] * work.delta[i];
      work.ddelta[i] = (work.ddelta[i] + rate * work.da[i]) * work.slope[i];
      sums.a += static_cast<double>(work.delta[i]) * work.da[i];
      sums.d += work.x_dy[i];
      sums.bias += work.ddelta[i];
    }
  });
  team.grid(rows, work.p, [&](int64_t i, int64_t j) {
    const int64_t at = i * work.p_stride + j;
    work.dx[at] = work.delta[i] * work.dx[at] + d * work.dy[at];
    work.dy[at] *= work.e[i];
  });
  team.unpack(work.dx, work.p_stride, block.count, in.width, static_cast<E*>(g.dx) + block.at_x(),
              in.heads * in.width);
  team.unpack(work.ddelta, 1, block.count, 1, static_cast<E*>(g.ddt) + block.at_dt(), in.heads);
  team.unpack(work.db, work.n_stride, block.count, in.states, g.db + block.at_b(), in.heads * in.states);
  team.unpack(work.dc, work.n_stride, block.count, in.states, g.dc + block.at_b(), in.heads * in.states);
  team.multiply({Product::full, work.dstate, work.p_stride, work.dstate, f, work.n, work.p, rows, work.c, 1,
                 work.n_stride, work.dy, work.p_stride});
}

template <class E, class Team>
HD void backward_head(const SsdGradParams& g, int64_t sequence, int64_t head, Team& team, float* memory) {
  const SsdScanParams& forward = g.forward;
  const SsdInputs& in = forward.in;
  const SsdWork work(memory, in.states, in.width, forward.chunk < in.tokens ? forward.chunk : in.tokens);
  const int64_t begin = forward.offsets[sequence], end = forward.offsets[sequence + 1], chunk = forward.chunk;
  const int64_t matrix = in.states * in.width, at_head = sequence * in.heads + head;
  SsdSums sums{};
  if (g.dfinal)
    team.pack(g.dfinal + at_head * matrix, in.width, in.states, in.width, work.dstate, work.p_stride, work.n, work.p);
  else
    team.grid(work.n, work.p, [&](int64_t i, int64_t j) { work.dstate[i * work.p_stride + j] = 0.0f; });
  for (int64_t k = (end - begin + chunk - 1) / chunk - 1; k >= 0; --k) {
    const int64_t first = begin + k * chunk, count = end - first < chunk ? end - first : chunk;
    const int64_t blocks = (count + kBlock - 1) / kBlock, size = work.n * work.p_stride;
    const auto block = [&](int64_t i) {
      const int64_t rest = count - i * kBlock;
      return SsdBlock<E>{in, head, first + i * kBlock, rest < kBlock ? rest : kBlock};
    };
    const int64_t start = first_tile(forward.offsets, sequence, chunk) + k;
    team.pack(forward.starts + (start * in.heads + head) * matrix, in.width, in.states, in.width, work.states,
              work.p_stride, work.n, work.p);
    for (int64_t i = 0; i + 1 < blocks; ++i) {
      pack_inputs(block(i), team, work);
      team.grid(kBlock, work.p, [&](int64_t r, int64_t j) {
        work.x[r * work.p_stride + j] *= work.w[r] * work.delta[r];
      });
      const float* before = work.states + i * size;
      team.multiply({Product::full, work.states + (i + 1) * size, work.p_stride, before, work.e[kBlock - 1], work.n,
                     work.p, kBlock, work.b, 1, work.n_stride, work.x, work.p_stride});
    }
    for (int64_t i = blocks - 1; i >= 0; --i) {
      pack_inputs(block(i), team, work);
      backward_block(g, block(i), work.states + i * size, team, work, sums);
    }
  }
  if (g.dinitial)
    team.unpack(work.dstate, work.p_stride, in.states, in.width, g.dinitial + at_head * matrix, in.width);
  team.once([&] {
    const int64_t all = forward.sequences * in.heads;
    g.sums[at_head] = static_cast<float>(sums.a * ssd_rate(in.a_log[head]));
    g.sums[all + at_head] = static_cast<float>(sums.d);
    g.sums[2 * all + at_head] = static_cast<float>(sums.bias);
  });
}

}  // namespace pymathrl
