// The only file that knows Python. Each op: check the arguments, fill its Params, release the GIL, run CPU or CUDA.
#include <pybind11/pybind11.h>

#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "attention.h"
#include "causal_conv1d.h"
#include "common/parallel.h"
#include "common/tensor.h"
#include "group_advantage.h"
#include "linear.h"
#include "mamba_step.h"
#include "policy_loss.h"
#include "rms_norm.h"
#include "row_kernels.h"
#include "rotary.h"
#include "sample_token.h"
#include "selective_scan.h"
#include "soft_embed.h"
#include "ssd.h"
#include "ssd_backward.h"
#include "swiglu.h"
#include "token_logprob.h"

namespace py = pybind11;
using namespace pymathrl;

namespace {

Tensor make_tensor(uintptr_t data, int dtype, const py::tuple& sizes, const py::tuple& strides, int device) {
  Tensor t;
  if (sizes.size() > kMaxDims) fail("a tensor has ", sizes.size(), " dimensions; ops take at most ", kMaxDims);
  t.data = reinterpret_cast<void*>(data);
  t.dtype = static_cast<DType>(dtype);
  t.ndim = static_cast<int>(sizes.size());
  for (int d = 0; d < t.ndim; ++d) {
    t.size[d] = sizes[d].cast<int64_t>();
    t.stride[d] = strides[d].cast<int64_t>();
  }
  t.device = device;
  return t;
}

// The calls of a sequence of ops, recorded once and run many times: what a CUDA graph is on a GPU. A recorded call keeps
// pointers: its tensors must stay where they are, and what it computes follows from what they then hold.
class Program {
 public:
  void run() const {
    py::gil_scoped_release release;
    for (const auto& call : calls_) call();
  }
  size_t size() const { return calls_.size(); }
  void add(std::function<void()> call) { calls_.push_back(std::move(call)); }

 private:
  std::vector<std::function<void()>> calls_;
};

thread_local Program* recorder = nullptr;  // where this thread's ops go instead of running

#ifdef PYMATHRL_CUDA
#define CUDA_TWIN(function) function
#else
#define CUDA_TWIN(function) nullptr
#endif

// The end of every binding: runs the op where its tensors are, without the GIL, or records it (CPU only).
template <class Params, class CudaTwin>
void launch(const Args& args, uintptr_t stream, const Params& p, void (*cpu)(const Params&), CudaTwin cuda) {
  const bool on_gpu = args.use_cuda();
  if (recorder) {
    if (on_gpu) fail("a Program records ops on the CPU, got tensors on a GPU; use a CUDA graph there");
    return recorder->add([cpu, p] { cpu(p); });
  }
  py::gil_scoped_release release;
  if constexpr (std::is_null_pointer_v<CudaTwin>) {
    cpu(p);  // use_cuda has refused tensors on a GPU
  } else if (on_gpu) {
    cuda(p, args.device(), reinterpret_cast<void*>(stream));
  } else {
    cpu(p);
  }
}

void group_advantage(const Tensor& reward, const Tensor& offsets, const Tensor* baseline, const Tensor* tokens,
                     const Tensor& advantage, const Tensor& equal, int centre, int scale, float eps, int ddof,
                     uintptr_t stream) {
  Args args("group_advantage", reward);
  int64_t samples = reward.size[0], groups = equal.size[0];
  GroupAdvantageParams p{};
  p.reward = args.dense<float>("reward", reward, {samples});
  p.offsets = args.dense<int64_t>("offsets", offsets, {groups + 1});
  p.baseline = args.optional<float>("baseline", baseline, {samples});
  p.tokens = args.optional<int64_t>("tokens", tokens, {samples});
  p.advantage = args.dense<float>("advantage", advantage, {samples});
  p.equal = args.dense<uint8_t>("equal", equal, {groups});
  p.groups = groups;
  p.samples = samples;
  p.centre = static_cast<Centre>(centre);
  p.scale = static_cast<Scale>(scale);
  p.eps = eps;
  p.ddof = ddof;
  if (p.centre == Centre::baseline && !p.baseline) fail("group_advantage: centre 'baseline' needs baseline [B], got None");
  if (p.scale == Scale::token_whiten && !p.tokens) fail("group_advantage: scale 'token_whiten' needs tokens [B], got None");
  launch(args, stream, p, group_advantage_cpu, CUDA_TWIN(group_advantage_cuda));
}

PolicyLossConfig make_policy_loss_config(int form, float clip_low, float clip_high, float delta, float dual_clip,
                                         bool ratio_weight, float weight_low, float weight_high, bool sequence_mean,
                                         float rho, float beta, bool rover_response, float q_low, float q_high,
                                         float lp_reg_coef, std::pair<float, float> tau,
                                         std::pair<float, float> vespo_positive, std::pair<float, float> vespo_negative,
                                         int kl, bool kl_ratio, float kl_coef, float entropy_coef, int tis,
                                         bool tis_mask, float tis_cap, double log_tis_cap) {
  PolicyLossConfig c{};
  c.form = static_cast<Form>(form);
  c.clip_low = clip_low;
  c.clip_high = clip_high;
  c.delta = delta;
  c.dual_clip = dual_clip;
  c.ratio_weight = ratio_weight;
  c.weight_low = weight_low;
  c.weight_high = weight_high;
  c.sequence_mean = sequence_mean;
  c.rho = rho;
  c.beta = beta;
  c.rover_response = rover_response;
  c.q_low = q_low;
  c.q_high = q_high;
  c.lp_reg_coef = lp_reg_coef;
  std::tie(c.tau_positive, c.tau_negative) = tau;
  std::tie(c.k_positive, c.lambda_positive) = vespo_positive;
  std::tie(c.k_negative, c.lambda_negative) = vespo_negative;
  c.kl = static_cast<Kl>(kl);
  c.kl_ratio = kl_ratio;
  c.kl_coef = kl_coef;
  c.entropy_coef = entropy_coef;
  c.tis = static_cast<Level>(tis);
  c.tis_mask = tis_mask;
  c.tis_cap = tis_cap;
  c.log_tis_cap = log_tis_cap;
  return c;
}

// The names of the statistics: sums, maxima, minima, in the order of `result` after the loss.
py::tuple policy_loss_stats() {
  py::list sums, maxima, minima;
  for (int k = kLoss + 1; k < kTerms; ++k) (k < kSums ? sums : k < kMaxima ? maxima : minima).append(kTermNames[k]);
  return py::make_tuple(py::tuple(sums), py::tuple(maxima), py::tuple(minima));
}

void policy_loss(const PolicyLossConfig& config, const Tensor& logp, const Tensor* old_logp, const Tensor& advantage,
                 const Tensor& coef, const Tensor* mask, const Tensor* offsets, const Tensor* mean_logp,
                 const Tensor* old_mean_logp, const Tensor* link, const Tensor* proxy_logp, const Tensor* selected,
                 const Tensor* ref_logp, const Tensor* entropy, const Tensor* behaviour_logp, const Tensor& grad_logp,
                 const Tensor* grad_entropy, const Tensor* sequence_work, const Tensor& result, uintptr_t stream) {
  Args args("policy_loss", logp);
  int64_t n = logp.size[0];
  PolicyLossParams p{};
  p.config = config;
  p.n = n;
  p.logp = args.dense<float>("logp", logp, {n});
  p.old_logp = args.optional<float>("old_logp", old_logp, {n});
  p.advantage = args.dense<float>("advantage", advantage, {n});
  p.coef = args.dense<float>("coef", coef, {n});
  p.mask = args.optional<uint8_t>("mask", mask, {n});
  p.sequences = offsets ? offsets->size[0] - 1 : 0;
  if (offsets && p.sequences < 0) fail("policy_loss: offsets must have S+1 elements, got 0");
  p.offsets = args.optional<int64_t>("offsets", offsets, {p.sequences + 1});
  p.mean_rows = mean_logp && mean_logp->size[0] == n + 1 ? n + 1 : n;
  p.mean_logp = args.optional<float>("mean_logp", mean_logp, {p.mean_rows});
  p.old_mean_logp = args.optional<float>("old_mean_logp", old_mean_logp, {p.mean_rows});
  p.link = args.optional<uint8_t>("link", link, {n});
  p.proxy_logp = args.optional<float>("proxy_logp", proxy_logp, {n});
  p.selected = args.optional<uint8_t>("selected", selected, {n});
  p.ref_logp = args.optional<float>("ref_logp", ref_logp, {n});
  p.entropy = args.optional<float>("entropy", entropy, {n});
  p.behaviour_logp = args.optional<float>("behaviour_logp", behaviour_logp, {n});
  p.grad_logp = args.dense<float>("grad_logp", grad_logp, {n});
  p.grad_entropy = args.optional<float>("grad_entropy", grad_entropy, {n});
  p.sequence_work = args.optional<float>("sequence_work", sequence_work, {3 * n});
  // Row 0 is the result, the rest the partial sums of the blocks.
  p.result = args.dense<float>("result", result, {1 + policy_loss_blocks(n, args.cuda()), kTerms});
  p.partial = p.result + kTerms;
  launch(args, stream, p, policy_loss_cpu, CUDA_TWIN(policy_loss_cuda));
}

DType logit_dtype(const char* op, const Tensor& logits) {
  if (logits.dtype != DType::f32 && logits.dtype != DType::bf16 && logits.dtype != DType::f16)
    fail(op, ": logits must be float32, bfloat16 or float16, got ", dtype_name(logits.dtype), "; convert them with .to()");
  return logits.dtype;
}

void token_logprob(const Tensor& logits, const Tensor& ids, const Tensor& logp, const Tensor& entropy,
                   const Tensor& mean_logp, const Tensor& top_prob, const Tensor& lse, const Tensor* proxy_logp,
                   double temperature, double min_p, uintptr_t stream) {
  Args args("token_logprob", logits);
  TokenLogprobParams p{};
  p.dtype = logit_dtype("token_logprob", logits);
  p.row_stride = args.rows("logits", logits);
  p.rows = logits.size[0];
  p.width = logits.size[1];
  p.logits = logits.data;
  p.ids = args.dense<int64_t>("ids", ids, {p.rows});
  p.logp = args.dense<float>("logp", logp, {p.rows});
  p.entropy = args.dense<float>("entropy", entropy, {p.rows});
  p.mean_logp = args.dense<float>("mean_logp", mean_logp, {p.rows});
  p.top_prob = args.dense<float>("top_prob", top_prob, {p.rows});
  p.lse = args.dense<double>("lse", lse, {p.rows});
  p.proxy_logp = args.optional<float>("proxy_logp", proxy_logp, {p.rows});
  p.temperature = temperature;
  p.min_p = min_p;
  launch(args, stream, p, token_logprob_cpu, CUDA_TWIN(token_logprob_cuda));
}

void token_logprob_backward(const Tensor& logits, const Tensor& ids, const Tensor& lse, const Tensor* entropy,
                            const Tensor* grad_logp, const Tensor* grad_entropy, const Tensor& dlogits,
                            double temperature, uintptr_t stream) {
  Args args("token_logprob_backward", logits);
  TokenLogprobGradParams p{};
  p.dtype = logit_dtype("token_logprob_backward", logits);
  p.row_stride = args.rows("logits", logits);
  p.rows = logits.size[0];
  p.width = logits.size[1];
  p.logits = logits.data;
  p.ids = args.dense<int64_t>("ids", ids, {p.rows});
  p.lse = args.dense<double>("lse", lse, {p.rows});
  p.entropy = args.optional<float>("entropy", entropy, {p.rows});
  p.grad_logp = args.optional<float>("grad_logp", grad_logp, {p.rows});
  p.grad_entropy = args.optional<float>("grad_entropy", grad_entropy, {p.rows});
  args.check_dtype("dlogits", dlogits, p.dtype);
  p.grad_stride = args.rows("dlogits", dlogits);
  if (dlogits.size[0] != p.rows || dlogits.size[1] != p.width)
    fail("token_logprob_backward: dlogits must have shape ", shape_text(logits.size, 2), " like logits, got ",
         shape_text(dlogits.size, 2));
  p.dlogits = dlogits.data;
  p.temperature = temperature;
  if (p.grad_entropy && !p.entropy)
    fail("token_logprob_backward: grad_entropy needs the forward's entropy [N], got None");
  launch(args, stream, p, token_logprob_backward_cpu, CUDA_TWIN(token_logprob_backward_cuda));
}

void sample_token(const Tensor& logits, const Tensor& uid, const Tensor& step, const Tensor& ids, const Tensor& numbers,
                  uint64_t seed, uint32_t stream_id, double temperature, int64_t top_k, double top_p, double min_p,
                  const Tensor* support, uintptr_t stream) {
  Args args("sample_token", logits);
  SampleTokenParams p{};
  p.dtype = logit_dtype("sample_token", logits);
  p.row_stride = args.rows("logits", logits);
  p.rows = logits.size[0];
  p.width = logits.size[1];
  p.logits = logits.data;
  p.uid = args.dense<int64_t>("uid", uid, {p.rows});
  p.step = args.dense<int64_t>("step", step, {p.rows});
  p.ids = args.dense<int64_t>("ids", ids, {p.rows});
  p.logp = args.dense<float>("numbers", numbers, {4, p.rows});
  p.entropy = p.logp + p.rows;
  p.mean_logp = p.entropy + p.rows;
  p.kept_mass = p.mean_logp + p.rows;
  p.support = args.optional<uint8_t>("support", support, {p.rows, support_bytes(p.width)});
  p.seed = seed;
  p.stream = stream_id;
  p.temperature = temperature;
  p.top_k = top_k;
  p.top_p = top_p;
  p.min_p = min_p;
  launch(args, stream, p, sample_token_cpu, CUDA_TWIN(sample_token_cuda));
}

void soft_embed(const Tensor& logits, const Tensor& table, const Tensor* uid, const Tensor* step, const Tensor& weights,
                const Tensor& mean, const Tensor& inputs, const Tensor& ids, const Tensor& numbers, uint64_t seed,
                uint32_t stream_id, double temperature, double sigma, int64_t top_k, uintptr_t stream) {
  Args args("soft_embed", logits);
  args.check_dtype("logits", logits, DType::f32);
  SoftEmbedParams p{};
  p.row_stride = args.rows("logits", logits);
  p.rows = logits.size[0];
  p.width = logits.size[1];
  p.columns = table.size[1];
  p.logits = static_cast<const float*>(logits.data);
  p.dtype = args.activation_dtype("table", table);
  p.table = args.dense("table", table, p.dtype, {p.width, p.columns});
  p.uid = args.optional<int64_t>("uid", uid, {p.rows});
  p.step = args.optional<int64_t>("step", step, {p.rows});
  args.check_dtype("weights", weights, DType::f32);
  p.weight_stride = args.rows("weights", weights);
  if (weights.size[0] != p.rows || weights.size[1] != p.width)
    fail("soft_embed: weights must have shape ", shape_text(logits.size, 2), " like logits, got ",
         shape_text(weights.size, 2));
  p.weights = static_cast<float*>(weights.data);
  p.mean = args.dense<float>("mean", mean, {p.rows, p.columns});
  p.inputs = args.dense("inputs", inputs, p.dtype, {p.rows, p.columns});
  p.ids = args.dense<int64_t>("ids", ids, {p.rows});
  p.logp = args.dense<float>("numbers", numbers, {4, p.rows});
  p.entropy = p.logp + p.rows;
  p.mean_logp = p.entropy + p.rows;
  p.kept_mass = p.mean_logp + p.rows;
  p.seed = seed;
  p.stream = stream_id;
  p.temperature = temperature;
  p.sigma = sigma;
  p.top_k = top_k;
  launch(args, stream, p, soft_embed_cpu, CUDA_TWIN(soft_embed_cuda));
}

void soft_embed_backward(const Tensor& weights, const Tensor& dots, const Tensor& grad_logp, double temperature,
                         uintptr_t stream) {
  Args args("soft_embed_backward", weights);
  SoftEmbedGradParams p{};
  args.check_dtype("weights", weights, DType::f32);
  args.check_dtype("dots", dots, DType::f32);
  p.weight_stride = args.rows("weights", weights);
  p.dot_stride = args.rows("dots", dots);
  p.rows = weights.size[0];
  p.width = weights.size[1];
  if (dots.size[0] != p.rows || dots.size[1] != p.width)
    fail("soft_embed_backward: dots must have shape ", shape_text(weights.size, 2), " like weights, got ",
         shape_text(dots.size, 2));
  p.weights = static_cast<const float*>(weights.data);
  p.dots = static_cast<float*>(dots.data);
  p.grad_logp = args.dense<float>("grad_logp", grad_logp, {p.rows});
  p.temperature = temperature;
  launch(args, stream, p, soft_embed_backward_cpu, CUDA_TWIN(soft_embed_backward_cuda));
}

void philox_uniforms(const Tensor& uid, const Tensor& step, const Tensor& out, uint64_t seed, uint32_t stream_id) {
  Args args("philox_uniform", uid);
  if (args.cuda()) fail("philox_uniform: uid must be on the cpu; kernels draw their own numbers on a GPU");
  int64_t n = uid.size[0];
  auto u = args.dense<int64_t>("uid", uid, {n}), t = args.dense<int64_t>("step", step, {n});
  auto x = args.dense<double>("out", out, {n});
  for (int64_t i = 0; i < n; ++i)
    x[i] = philox_uniform(seed, static_cast<uint64_t>(u[i]), static_cast<uint32_t>(t[i]), stream_id);
}

// The bounds of packed sequences: from 0, not falling, at most `tokens`.
const int64_t* packed_offsets(const Args& args, const char* op, const Tensor& offsets, int64_t tokens) {
  const int64_t sequences = offsets.size[0] - 1;
  if (sequences < 0) fail(op, ": offsets must have B+1 elements, got 0");
  const int64_t* at = args.dense<int64_t>("offsets", offsets, {sequences + 1});
  if (args.cuda()) return at;  // on a GPU the check would wait for the device
  for (int64_t b = 0; b <= sequences; ++b)
    if (at[b] < (b ? at[b - 1] : 0) || at[b] > (b ? tokens : 0))
      fail(op, ": offsets must start at 0 and rise to at most ", tokens, " (the tokens), got ", at[b], " at ", b);
  return at;
}

// Shapes shared by the attention ops. qkv: [..., (H+2K)E].
int64_t attention_head_dim(const char* op, const Tensor& qkv, int64_t heads, int64_t kv_heads) {
  int64_t head_dim = qkv.size[qkv.ndim - 1] / (heads + 2 * kv_heads);
  if (head_dim < 1 || head_dim % 8 || head_dim > kMaxHead)
    fail(op, ": the head size must be a multiple of 8 and at most ", kMaxHead, ", got ", head_dim, "; use torch's ",
         "scaled_dot_product_attention for it");
  return head_dim;
}

AttentionParams attention_params(const Args& args, const char* op, const Tensor& qkv, const Tensor& offsets,
                                 const Tensor& out, const Tensor& lse, int64_t heads, int64_t kv_heads) {
  AttentionParams p{};
  p.dtype = args.activation_dtype("qkv", qkv);
  p.tokens = qkv.size[0];
  p.sequences = offsets.size[0] - 1;
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.head_dim = attention_head_dim(op, qkv, heads, kv_heads);
  p.qkv = args.dense("qkv", qkv, p.dtype, {p.tokens, (heads + 2 * kv_heads) * p.head_dim});
  p.offsets = packed_offsets(args, op, offsets, p.tokens);
  p.out = args.dense("out", out, p.dtype, {p.tokens, heads * p.head_dim});
  p.lse = args.dense<float>("lse", lse, {p.tokens, heads});
  return p;
}

void attention(const Tensor& qkv, const Tensor& offsets, const Tensor& out, const Tensor& lse, int64_t heads,
               int64_t kv_heads, uintptr_t stream) {
  Args args("attention", qkv);
  AttentionParams p = attention_params(args, "attention", qkv, offsets, out, lse, heads, kv_heads);
  launch(args, stream, p, attention_cpu, CUDA_TWIN(attention_cuda));
}

void attention_backward(const Tensor& qkv, const Tensor& offsets, const Tensor& out, const Tensor& lse,
                        const Tensor& dout, const Tensor& dqkv, int64_t heads, int64_t kv_heads, uintptr_t stream) {
  Args args("attention_backward", qkv);
  AttentionParams p = attention_params(args, "attention_backward", qkv, offsets, out, lse, heads, kv_heads);
  p.dout = args.dense("dout", dout, p.dtype, {p.tokens, heads * p.head_dim});
  p.dqkv = args.dense("dqkv", dqkv, p.dtype, {p.tokens, (heads + 2 * kv_heads) * p.head_dim});
  launch(args, stream, p, attention_backward_cpu, CUDA_TWIN(attention_backward_cuda));
}

void paged_attention(const Tensor& qkv, const Tensor& position, const Tensor& slot, const Tensor& table,
                     const Tensor& rope, const Tensor& keys, const Tensor& values, const Tensor& out, int64_t heads,
                     int64_t kv_heads, float scale, const Tensor* q_norm, const Tensor* k_norm, float eps,
                     uintptr_t stream) {
  Args args("paged_attention", qkv);
  PagedAttentionParams p{};
  p.dtype = args.activation_dtype("qkv", qkv);
  p.rows = qkv.size[0];
  p.slots = table.size[0];
  p.columns = table.ndim == 2 ? table.size[1] : 0;
  p.positions = rope.size[0];
  p.pages = keys.size[0];
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.head_dim = attention_head_dim("paged_attention", qkv, heads, kv_heads);
  p.scale = scale;
  p.eps = eps;
  p.qkv = args.dense("qkv", qkv, p.dtype, {p.rows, (heads + 2 * kv_heads) * p.head_dim});
  p.position = args.dense<int64_t>("position", position, {p.rows});
  p.slot = args.dense<int64_t>("slot", slot, {p.rows});
  p.table = args.dense<int32_t>("table", table, {p.slots, p.columns});
  p.rope = args.dense<float>("rope", rope, {p.positions, p.head_dim});
  p.keys = args.dense("keys", keys, p.dtype, {p.pages, kv_heads, p.head_dim, kPage});
  p.values = args.dense("values", values, p.dtype, {p.pages, kv_heads, kPage, p.head_dim});
  p.out = args.dense("out", out, p.dtype, {p.rows, heads * p.head_dim});
  p.q_norm = args.optional<float>("q_norm", q_norm, {p.head_dim});
  p.k_norm = args.optional<float>("k_norm", k_norm, {p.head_dim});
  launch(args, stream, p, paged_attention_cpu, CUDA_TWIN(paged_attention_cuda));
}

void rms_norm(const Tensor& x, const Tensor* residual, const Tensor& weight, const Tensor* sum, const Tensor& y,
              const Tensor* rstd, float eps, uintptr_t stream) {
  Args args("rms_norm", x);
  RmsNormParams p{};
  p.rows = x.size[0];
  p.width = x.size[1];
  p.dtype = args.activation_dtype("x", x);
  p.x = args.dense("x", x, p.dtype, {p.rows, p.width});
  p.residual = args.optional("residual", residual, p.dtype, {p.rows, p.width});
  p.weight = args.dense("weight", weight, p.dtype, {p.width});
  p.sum = args.optional("sum", sum, p.dtype, {p.rows, p.width});
  if (!p.sum != !p.residual) fail("rms_norm: sum is the output of x + residual; give both or neither");
  p.y = args.dense("y", y, p.dtype, {p.rows, p.width});
  p.rstd = args.optional<float>("rstd", rstd, {p.rows});
  p.eps = eps;
  launch(args, stream, p, rms_norm_cpu, CUDA_TWIN(rms_norm_cuda));
}

void rms_norm_backward(const Tensor& h, const Tensor& weight, const Tensor& rstd, const Tensor& dy,
                       const Tensor* dh_out, const Tensor& dh, const Tensor& dw, uintptr_t stream) {
  Args args("rms_norm_backward", h);
  RmsNormGradParams p{};
  p.rows = h.size[0];
  p.width = h.size[1];
  p.dtype = args.activation_dtype("h", h);
  p.h = args.dense("h", h, p.dtype, {p.rows, p.width});
  p.weight = args.dense("weight", weight, p.dtype, {p.width});
  p.rstd = args.dense<float>("rstd", rstd, {p.rows});
  p.dy = args.dense("dy", dy, p.dtype, {p.rows, p.width});
  p.dh_out = args.optional("dh_out", dh_out, p.dtype, {p.rows, p.width});
  p.dh = args.dense("dh", dh, p.dtype, {p.rows, p.width});
  p.dw = args.dense<float>("dw", dw, {1 + rms_norm_blocks(p.rows), p.width});
  launch(args, stream, p, rms_norm_backward_cpu, CUDA_TWIN(rms_norm_backward_cuda));
}

RotaryParams rotary_params(const Args& args, const Tensor& qkv, const Tensor& position, const Tensor& rope,
                           const Tensor* q_norm, const Tensor* k_norm, int64_t heads, int64_t kv_heads, float scale,
                           float eps) {
  RotaryParams p{};
  p.dtype = args.activation_dtype("qkv", qkv);
  p.rows = qkv.size[0];
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.head_dim = qkv.size[1] / (heads + 2 * kv_heads);
  if (p.head_dim < 1 || p.head_dim % 8 || p.head_dim > kMaxHead)
    fail("rotary: the head size must be a multiple of 8 and at most ", kMaxHead, ", got ", p.head_dim);
  p.qkv = args.dense("qkv", qkv, p.dtype, {p.rows, (heads + 2 * kv_heads) * p.head_dim});
  p.position = args.dense<int64_t>("position", position, {p.rows});
  p.rope = args.dense<float>("rope", rope, {rope.size[0], p.head_dim});
  for (int64_t row = 0; row < p.rows && !args.cuda(); ++row)  // on a GPU the check would wait for the device
    if (p.position[row] < 0 || p.position[row] >= rope.size[0])
      fail("rotary: position must be in [0, ", rope.size[0], "), got ", p.position[row], " in row ", row,
           "; make the table rope longer");
  p.q_norm = args.optional<float>("q_norm", q_norm, {p.head_dim});
  p.k_norm = args.optional<float>("k_norm", k_norm, {p.head_dim});
  p.scale = scale;
  p.eps = eps;
  return p;
}

void rotary(const Tensor& qkv, const Tensor& position, const Tensor& rope, const Tensor* q_norm, const Tensor* k_norm,
            const Tensor& out, int64_t heads, int64_t kv_heads, float scale, float eps, uintptr_t stream) {
  Args args("rotary", qkv);
  RotaryParams p = rotary_params(args, qkv, position, rope, q_norm, k_norm, heads, kv_heads, scale, eps);
  p.out = args.dense("out", out, p.dtype, {p.rows, qkv.size[1]});
  launch(args, stream, p, rotary_cpu, CUDA_TWIN(rotary_cuda));
}

void rotary_backward(const Tensor* qkv, const Tensor& position, const Tensor& rope, const Tensor* q_norm,
                     const Tensor* k_norm, const Tensor& dout, const Tensor& dqkv, const Tensor* dw, int64_t heads,
                     int64_t kv_heads, float scale, float eps, uintptr_t stream) {
  Args args("rotary_backward", dout);
  RotaryGradParams p{};
  p.forward = rotary_params(args, qkv ? *qkv : dout, position, rope, q_norm, k_norm, heads, kv_heads, scale, eps);
  p.dout = args.dense("dout", dout, p.forward.dtype, {p.forward.rows, dout.size[1]});
  p.dqkv = args.dense("dqkv", dqkv, p.forward.dtype, {p.forward.rows, dout.size[1]});
  p.dw = args.optional<float>("dw", dw, {1 + rotary_blocks(p.forward.rows), 2 * p.forward.head_dim});
  if ((q_norm || k_norm) && (!qkv || !dw)) fail("rotary_backward: norms need qkv and dw, got None");
  launch(args, stream, p, rotary_backward_cpu, CUDA_TWIN(rotary_backward_cuda));
}

void swiglu(const Tensor& gate_up, const Tensor& out, uintptr_t stream) {
  Args args("swiglu", gate_up);
  SwigluParams p{};
  p.rows = out.size[0];
  p.width = out.size[1];
  p.dtype = args.activation_dtype("gate_up", gate_up);
  p.gate_up = args.dense("gate_up", gate_up, p.dtype, {p.rows, 2 * p.width});
  p.out = args.dense("out", out, p.dtype, {p.rows, p.width});
  launch(args, stream, p, swiglu_cpu, CUDA_TWIN(swiglu_cuda));
}

void swiglu_backward(const Tensor& gate_up, const Tensor& dout, const Tensor& dgate_up, uintptr_t stream) {
  Args args("swiglu_backward", gate_up);
  SwigluGradParams p{};
  p.rows = dout.size[0];
  p.width = dout.size[1];
  p.dtype = args.activation_dtype("gate_up", gate_up);
  p.gate_up = args.dense("gate_up", gate_up, p.dtype, {p.rows, 2 * p.width});
  p.dout = args.dense("dout", dout, p.dtype, {p.rows, p.width});
  p.dgate_up = args.dense("dgate_up", dgate_up, p.dtype, {p.rows, 2 * p.width});
  launch(args, stream, p, swiglu_backward_cpu, CUDA_TWIN(swiglu_backward_cuda));
}

void linear(const Tensor& x, const Tensor& w, const Tensor* bias, const Tensor& y, uintptr_t stream) {
  Args args("linear", x);
  LinearParams p{};
  p.dtype = x.dtype;
  p.x_stride = args.rows("x", x);
  p.rows = x.size[0];
  p.depth = x.size[1];
  if (p.depth == 0) fail("linear: x must have at least one column, got shape ", shape_text(x.size, 2));
  p.columns = w.size[0];
  p.x = x.data;
  if (args.cuda() && x.dtype == DType::bf16) {
    args.check_dtype("w", w, DType::bf16);
    Tensor words = w;
    words.dtype = DType::i32;  // only for the check of its shape: bf16 has no type in dtype_of
    p.w = args.dense<int32_t>("w", words, {p.columns, p.depth});
  } else {
    args.check_dtype("x", x, DType::f32);
    p.w = args.dense<float>("w", w, {p.columns, p.depth});
  }
  p.bias = args.optional<float>("bias", bias, {p.columns});
  args.check_dtype("out", y, DType::f32);
  p.y_stride = args.rows("out", y);
  if (y.size[0] != p.rows || y.size[1] != p.columns)
    fail("linear: out must have shape [", p.rows, ", ", p.columns, "], got ", shape_text(y.size, 2));
  if (p.rows > 1 && p.y_stride < p.columns)
    fail("linear: the rows of out must not overlap, got stride ", p.y_stride, " for ", p.columns, " columns");
  p.y = static_cast<float*>(y.data);
  launch(args, stream, p, linear_cpu, CUDA_TWIN(linear_cuda));
}

CausalConv1dParams causal_conv1d_params(const Args& args, const char* op, const Tensor& x, const Tensor& weight,
                                        const Tensor* bias, const Tensor& offsets, const Tensor* initial, int64_t group,
                                        bool silu) {
  CausalConv1dParams p{};
  p.dtype = args.activation_dtype("x", x);
  p.x_stride = args.rows("x", x);
  p.x = x.data;
  p.tokens = x.size[0];
  p.sources = x.size[1];
  p.channels = weight.size[0];
  p.width = weight.size[1];
  p.sequences = offsets.size[0] - 1;
  p.group = p.sources == p.channels ? p.sources : group;  // without copies one group of all is the same
  p.silu = silu;
  if (p.width < 2 || p.width > kMaxConv) fail(op, ": the width of weight must be in 2..", kMaxConv, ", got ", p.width);
  p.weight = args.dense<float>("weight", weight, {p.channels, p.width});
  p.bias = args.optional<float>("bias", bias, {p.channels});
  p.offsets = packed_offsets(args, op, offsets, p.tokens);
  p.initial = args.optional<float>("initial", initial, {p.sequences, p.width - 1, p.sources});
  return p;
}

void causal_conv1d(const Tensor& x, const Tensor& weight, const Tensor* bias, const Tensor& offsets,
                   const Tensor* initial, const Tensor& u, const Tensor* final, int64_t group, bool silu,
                   uintptr_t stream) {
  Args args("causal_conv1d", x);
  CausalConv1dParams p = causal_conv1d_params(args, "causal_conv1d", x, weight, bias, offsets, initial, group, silu);
  p.u = args.dense("u", u, p.dtype, {p.tokens, p.channels});
  p.final = args.optional<float>("final", final, {p.sequences, p.width - 1, p.sources});
  launch(args, stream, p, causal_conv1d_cpu, CUDA_TWIN(causal_conv1d_cuda));
}

void causal_conv1d_backward(const Tensor& x, const Tensor& weight, const Tensor* bias, const Tensor& offsets,
                            const Tensor* initial, const Tensor& du, const Tensor* dfinal, const Tensor& dx,
                            const Tensor* dinitial, const Tensor& dw, int64_t group, bool silu, uintptr_t stream) {
  const char* op = "causal_conv1d_backward";
  Args args(op, x);
  CausalConv1dGradParams p{};
  p.forward = causal_conv1d_params(args, op, x, weight, bias, offsets, initial, group, silu);
  const DType dtype = p.forward.dtype;
  const int64_t tokens = p.forward.tokens, sequences = p.forward.sequences;
  const int64_t kept = p.forward.width - 1, tiles = causal_conv1d_tiles(tokens, sequences);
  p.du = args.dense("du", du, dtype, {tokens, p.forward.channels});
  p.dfinal = args.optional<float>("dfinal", dfinal, {sequences, kept, p.forward.sources});
  p.dx = args.dense("dx", dx, dtype, {tokens, p.forward.sources});
  p.dinitial = args.optional<float>("dinitial", dinitial, {sequences, kept, p.forward.sources});
  p.dw = args.dense<float>("dw", dw, {1 + tiles, p.forward.channels * (p.forward.width + 1)});
  launch(args, stream, p, causal_conv1d_backward_cpu, CUDA_TWIN(causal_conv1d_backward_cuda));
}

// A matrix [rows, columns] whose rows may be apart: its stride.
int64_t matrix_rows(const Args& args, const char* op, const char* name, const Tensor& t, DType dtype, int64_t rows,
                    int64_t columns) {
  args.check_dtype(name, t, dtype);
  const int64_t stride = args.rows(name, t);
  if (t.size[0] != rows || t.size[1] != columns)
    fail(op, ": ", name, " must have shape [", rows, ", ", columns, "], got ", shape_text(t.size, t.ndim));
  return stride;
}

// The sizes of a Mamba layer fit together: D channels in groups of N, X sources likewise, D a multiple of X.
void check_mamba_sizes(const char* op, int64_t channels, int64_t sources, int64_t states) {
  if (states < 1 || states > kMaxStates)
    fail(op, ": a_log [D,N] must have N in 1..", kMaxStates, " states, got ", states);
  if (sources < 1 || channels % sources || sources % states)
    fail(op, ": D must be a multiple of X, and X of N, got D = ", channels, ", X = ", sources, ", N = ", states);
}

SelectiveScanParams selective_scan_params(const Args& args, const char* op, const Tensor& u, const Tensor& dt,
                                          const Tensor* z, const Tensor& b, const Tensor& c, const Tensor& a_log,
                                          const Tensor& d, const Tensor& dt_bias, const Tensor& offsets) {
  SelectiveScanParams p{};
  p.dtype = args.activation_dtype("u", u);
  p.tokens = u.size[0];
  p.channels = u.size[1];
  p.sources = b.size[1];
  p.states = a_log.size[1];
  p.sequences = offsets.size[0] - 1;
  check_mamba_sizes(op, p.channels, p.sources, p.states);
  p.u_stride = args.rows("u", u);
  p.dt_stride = matrix_rows(args, op, "dt", dt, p.dtype, p.tokens, p.channels);
  p.z_stride = z ? matrix_rows(args, op, "z", *z, p.dtype, p.tokens, p.channels) : 0;
  p.b_stride = matrix_rows(args, op, "b", b, p.dtype, p.tokens, p.sources);
  p.c_stride = matrix_rows(args, op, "c", c, p.dtype, p.tokens, p.channels);
  p.u = u.data;
  p.dt = dt.data;
  p.z = z ? z->data : nullptr;
  p.b = b.data;
  p.c = c.data;
  p.a_log = args.dense<float>("a_log", a_log, {p.channels, p.states});
  p.d = args.dense<float>("d", d, {p.channels});
  p.dt_bias = args.dense<float>("dt_bias", dt_bias, {p.channels});
  p.offsets = packed_offsets(args, op, offsets, p.tokens);
  return p;
}

void selective_scan(const Tensor& u, const Tensor& dt, const Tensor* z, const Tensor& b, const Tensor& c,
                    const Tensor& a_log, const Tensor& d, const Tensor& dt_bias, const Tensor& offsets,
                    const Tensor* initial, const Tensor& y, const Tensor* final, const Tensor* checkpoint,
                    uintptr_t stream) {
  Args args("selective_scan", u);
  SelectiveScanParams p = selective_scan_params(args, "selective_scan", u, dt, z, b, c, a_log, d, dt_bias, offsets);
  p.initial = args.optional<float>("initial", initial, {p.sequences, p.states, p.channels});
  p.y = args.dense("y", y, p.dtype, {p.tokens, p.channels});
  p.final = args.optional<float>("final", final, {p.sequences, p.states, p.channels});
  p.checkpoint = args.optional<float>("checkpoint", checkpoint,
                                      {selective_scan_tiles(p.tokens, p.sequences), p.states, p.channels});
  launch(args, stream, p, selective_scan_cpu, CUDA_TWIN(selective_scan_cuda));
}

void selective_scan_backward(const Tensor& u, const Tensor& dt, const Tensor* z, const Tensor& b, const Tensor& c,
                             const Tensor& a_log, const Tensor& d, const Tensor& dt_bias, const Tensor& offsets,
                             const Tensor& checkpoint, const Tensor& dy, const Tensor* dfinal, const Tensor& du,
                             const Tensor& ddt, const Tensor* dz, const Tensor& db, const Tensor& dc,
                             const Tensor* dinitial, const Tensor& dw, uintptr_t stream) {
  const char* op = "selective_scan_backward";
  Args args(op, u);
  SelectiveScanGradParams p{};
  p.forward = selective_scan_params(args, op, u, dt, z, b, c, a_log, d, dt_bias, offsets);
  const int64_t tokens = p.forward.tokens, sequences = p.forward.sequences, channels = p.forward.channels,
                sources = p.forward.sources, states = p.forward.states;
  const DType dtype = p.forward.dtype;
  p.forward.checkpoint = args.dense<float>("checkpoint", checkpoint,
                                           {selective_scan_tiles(tokens, sequences), states, channels});
  p.dy = args.dense("dy", dy, dtype, {tokens, channels});
  p.dfinal = args.optional<float>("dfinal", dfinal, {sequences, states, channels});
  p.du = args.dense("du", du, dtype, {tokens, channels});
  p.ddt = args.dense("ddt", ddt, dtype, {tokens, channels});
  p.dz = args.optional("dz", dz, dtype, {tokens, channels});
  if (!z != !dz) fail(op, ": dz is the gradient of z; give both or neither");
  p.db = args.dense("db", db, dtype, {tokens, sources});
  p.dc = args.dense("dc", dc, dtype, {tokens, channels});
  p.dinitial = args.optional<float>("dinitial", dinitial, {sequences, states, channels});
  p.dw = args.dense<float>("dw", dw, {1 + sequences, states + 2, channels});
  launch(args, stream, p, selective_scan_backward_cpu, CUDA_TWIN(selective_scan_backward_cuda));
}

void mamba_step(const Tensor& proj, const Tensor& dt, const Tensor& conv_state, const Tensor& ssm_state,
                const Tensor& row, const Tensor& position, const Tensor& weight, const Tensor& bias,
                const Tensor& a_log, const Tensor& d, const Tensor& dt_bias, const Tensor& out, uintptr_t stream) {
  const char* op = "mamba_step";
  Args args(op, proj);
  MambaStepParams p{};
  p.dtype = args.activation_dtype("proj", proj);
  p.proj_stride = args.rows("proj", proj);
  p.rows = proj.size[0];
  p.channels = weight.size[0];
  p.width = weight.size[1];
  p.sources = conv_state.size[2];
  p.slots = conv_state.size[0];
  p.states = a_log.size[1];
  check_mamba_sizes(op, p.channels, p.sources, p.states);
  if (p.width < 2 || p.width > kMaxConv) fail(op, ": the width of weight must be in 2..", kMaxConv, ", got ", p.width);
  if (proj.size[1] < 2 * (p.channels + p.sources))
    fail(op, ": proj must have at least 2D+2X = ", 2 * (p.channels + p.sources), " columns (z, x, b, c), got ",
         shape_text(proj.size, 2));
  p.dt_stride = matrix_rows(args, op, "dt", dt, p.dtype, p.rows, p.channels);
  p.proj = proj.data;
  p.dt = dt.data;
  p.conv_state = args.dense<float>("conv_state", conv_state, {p.slots, p.width - 1, p.sources});
  p.ssm_state = args.dense<float>("ssm_state", ssm_state, {p.slots, p.states, p.channels});
  p.row = args.dense<int64_t>("row", row, {p.rows});
  p.position = args.dense<int64_t>("position", position, {p.rows});
  p.weight = args.dense<float>("weight", weight, {p.channels, p.width});
  p.bias = args.dense<float>("bias", bias, {p.channels});
  p.a_log = args.dense<float>("a_log", a_log, {p.channels, p.states});
  p.d = args.dense<float>("d", d, {p.channels});
  p.dt_bias = args.dense<float>("dt_bias", dt_bias, {p.channels});
  p.out = args.dense("out", out, p.dtype, {p.rows, p.channels});
  launch(args, stream, p, mamba_step_cpu, CUDA_TWIN(mamba_step_cuda));
}

SsdInputs ssd_inputs(const Args& args, const char* op, const Tensor& x, const Tensor& dt, const Tensor& b,
                     const Tensor& c, const Tensor& a_log, const Tensor& d, const Tensor& dt_bias, int64_t groups,
                     int64_t states) {
  SsdInputs in{};
  in.dtype = args.activation_dtype("x", x);
  args.rows("x", x);
  in.tokens = x.size[0];
  in.heads = a_log.size[0];
  in.width = x.size[1] / in.heads;
  in.groups = groups;
  in.states = states;
  if (in.states > kMaxSsdStates) fail(op, ": b must have at most ", kMaxSsdStates, " states in a group, got ", in.states);
  in.x_stride = matrix_rows(args, op, "x", x, in.dtype, in.tokens, in.heads * in.width);
  in.dt_stride = matrix_rows(args, op, "dt", dt, in.dtype, in.tokens, in.heads);
  in.b_stride = matrix_rows(args, op, "b", b, in.dtype, in.tokens, groups * in.states);
  in.c_stride = matrix_rows(args, op, "c", c, in.dtype, in.tokens, groups * in.states);
  in.x = x.data, in.dt = dt.data, in.b = b.data, in.c = c.data;
  in.a_log = args.dense<float>("a_log", a_log, {in.heads});
  in.d = args.dense<float>("d", d, {in.heads});
  in.dt_bias = args.dense<float>("dt_bias", dt_bias, {in.heads});
  return in;
}

void ssd_scan(const Tensor& x, const Tensor& dt, const Tensor& b, const Tensor& c, const Tensor& a_log,
              const Tensor& d, const Tensor& dt_bias, const Tensor& offsets, const Tensor* initial, const Tensor& y,
              const Tensor& final, const Tensor* starts, int64_t groups, int64_t chunk, uintptr_t stream) {
  Args args("ssd_scan", x);
  SsdScanParams p{};
  p.in = ssd_inputs(args, "ssd_scan", x, dt, b, c, a_log, d, dt_bias, groups, b.size[1] / groups);
  const SsdInputs& in = p.in;
  p.offsets = packed_offsets(args, "ssd_scan", offsets, in.tokens);
  p.sequences = offsets.size[0] - 1;
  p.chunk = chunk;
  p.initial = args.optional<float>("initial", initial, {p.sequences, in.heads, in.states, in.width});
  p.y = args.dense("y", y, in.dtype, {in.tokens, in.heads * in.width});
  p.final = args.dense<float>("final", final, {p.sequences, in.heads, in.states, in.width});
  p.starts = args.optional<float>("starts", starts,
                                  {ssd_chunks(in.tokens, p.sequences, chunk), in.heads, in.states, in.width});
  launch(args, stream, p, ssd_scan_cpu, CUDA_TWIN(ssd_scan_cuda));
}

void ssd_scan_backward(const Tensor& x, const Tensor& dt, const Tensor& b, const Tensor& c, const Tensor& a_log,
                       const Tensor& d, const Tensor& dt_bias, const Tensor& offsets, const Tensor& starts,
                       const Tensor& dy, const Tensor* dfinal, const Tensor& dx, const Tensor& ddt, const Tensor& db,
                       const Tensor& dc, const Tensor* dinitial, const Tensor& sums, const Tensor& work,
                       int64_t groups, int64_t chunk, uintptr_t stream) {
  const char* op = "ssd_scan_backward";
  Args args(op, x);
  SsdGradParams p{};
  SsdInputs& in = p.forward.in;
  in = ssd_inputs(args, op, x, dt, b, c, a_log, d, dt_bias, groups, b.size[1] / groups);
  p.forward.offsets = packed_offsets(args, op, offsets, in.tokens);
  const int64_t sequences = p.forward.sequences = offsets.size[0] - 1;
  p.forward.chunk = chunk;
  p.forward.starts =
      args.dense<float>("starts", starts, {ssd_chunks(in.tokens, sequences, chunk), in.heads, in.states, in.width});
  p.dy = args.dense("dy", dy, in.dtype, {in.tokens, in.heads * in.width});
  p.dfinal = args.optional<float>("dfinal", dfinal, {sequences, in.heads, in.states, in.width});
  p.dx = args.dense("dx", dx, in.dtype, {in.tokens, in.heads * in.width});
  p.ddt = args.dense("ddt", ddt, in.dtype, {in.tokens, in.heads});
  p.db = args.dense<float>("db", db, {in.tokens, in.heads * in.states});
  p.dc = args.dense<float>("dc", dc, {in.tokens, in.heads * in.states});
  p.dinitial = args.optional<float>("dinitial", dinitial, {sequences, in.heads, in.states, in.width});
  p.sums = args.dense<float>("sums", sums, {3, sequences, in.heads});
  p.workers = work.size[0];
  const int64_t longest = chunk < in.tokens ? chunk : in.tokens;  // no chunk has more tokens
  p.work_size = ssd_work_size(in.states, in.width, longest);
  p.work = args.dense<float>("work", work, {p.workers, p.work_size});
  if (p.workers < 1 && sequences > 0) fail(op, ": work must have at least one row, got shape ", shape_text(work.size, 2));
  launch(args, stream, p, ssd_scan_backward_cpu, CUDA_TWIN(ssd_scan_backward_cuda));
}

void ssd_step(const Tensor& x, const Tensor& dt, const Tensor& b, const Tensor& c, const Tensor& state,
              const Tensor& row, const Tensor& position, const Tensor& a_log, const Tensor& d, const Tensor& dt_bias,
              const Tensor& out, uintptr_t stream) {
  Args args("ssd_step", x);
  SsdStepParams p{};
  if (state.ndim != 4 || state.size[1] < 1 || state.size[2] < 1 || state.size[3] < 1)
    fail("ssd_step: state must have shape [S,H,N,P], got ", shape_text(state.size, state.ndim));
  const int64_t heads = state.size[1], states = state.size[2], width = state.size[3];
  const int64_t columns = b.ndim == 2 ? b.size[1] : 0, groups = columns / states;
  if (groups < 1 || columns % states || heads % groups)
    fail("ssd_step: b must have shape [R,G*", states, "] with G a divisor of the ", heads, " heads of state, got ",
         shape_text(b.size, b.ndim));
  args.dense<float>("a_log", a_log, {heads});
  p.in = ssd_inputs(args, "ssd_step", x, dt, b, c, a_log, d, dt_bias, groups, states);
  p.slots = state.size[0];
  p.state = args.dense<float>("state", state, {p.slots, heads, states, width});
  matrix_rows(args, "ssd_step", "x", x, p.in.dtype, p.in.tokens, heads * width);
  p.row = args.dense<int64_t>("row", row, {p.in.tokens});
  p.position = args.dense<int64_t>("position", position, {p.in.tokens});
  p.y = args.dense("out", out, p.in.dtype, {p.in.tokens, heads * width});
  launch(args, stream, p, ssd_step_cpu, CUDA_TWIN(ssd_step_cuda));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The kernels of pymathrl. Call them through pymathrl.ops, which checks, allocates and differentiates.";
#ifdef PYMATHRL_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  m.def("parallel_runtime", &parallel_runtime, "The OpenMP runtime in use: a path, or why there is none.");
  m.def("simd_level", &simd_level, "The processor level of the row kernels: base, v3 (AVX2) or v4 (AVX-512).");
  py::class_<Tensor>(m, "Tensor", "Pointer, dtype, sizes, strides (in elements) and device (-1 = CPU) of a tensor.")
      .def(py::init(&make_tensor), py::arg("data"), py::arg("dtype"), py::arg("sizes"), py::arg("strides"),
           py::arg("device"));

  py::class_<Program>(m, "Program", "Ops recorded between begin() and end() of this thread, run again by run().")
      .def(py::init<>())
      .def("begin", [](Program& program) {
        if (recorder) fail("Program.begin: this thread records already; call end() first");
        recorder = &program;
      })
      .def("end", [](Program&) { recorder = nullptr; })
      .def("run", &Program::run)
      .def("__len__", &Program::size);

  m.def("group_advantage", &group_advantage, py::arg("reward"), py::arg("offsets"), py::arg("baseline"),
        py::arg("tokens"), py::arg("advantage"), py::arg("equal"), py::arg("centre"), py::arg("scale"), py::arg("eps"),
        py::arg("ddof"), py::arg("stream"));

  py::class_<PolicyLossConfig>(m, "PolicyLossConfig", "The numbers of one loss; fields as in csrc/policy_loss.h.")
      .def(py::init(&make_policy_loss_config), py::kw_only(), py::arg("form"), py::arg("clip_low"),
           py::arg("clip_high"), py::arg("delta"), py::arg("dual_clip"), py::arg("ratio_weight"), py::arg("weight_low"),
           py::arg("weight_high"), py::arg("sequence_mean"), py::arg("rho"), py::arg("beta"), py::arg("rover_response"),
           py::arg("q_low"), py::arg("q_high"), py::arg("lp_reg_coef"), py::arg("tau"), py::arg("vespo_positive"),
           py::arg("vespo_negative"), py::arg("kl"), py::arg("kl_ratio"), py::arg("kl_coef"), py::arg("entropy_coef"),
           py::arg("tis"), py::arg("tis_mask"), py::arg("tis_cap"), py::arg("log_tis_cap"));
  m.def("policy_loss_stats", &policy_loss_stats, "Names of the statistics: (sums, maxima, minima).");
  m.def("policy_loss_blocks", &policy_loss_blocks, py::arg("n"), py::arg("cuda"));
  m.def("policy_loss", &policy_loss, py::arg("config"), py::arg("logp"), py::arg("old_logp"), py::arg("advantage"),
        py::arg("coef"), py::arg("mask"), py::arg("offsets"), py::arg("mean_logp"), py::arg("old_mean_logp"),
        py::arg("link"), py::arg("proxy_logp"), py::arg("selected"), py::arg("ref_logp"), py::arg("entropy"),
        py::arg("behaviour_logp"), py::arg("grad_logp"), py::arg("grad_entropy"), py::arg("sequence_work"),
        py::arg("result"), py::arg("stream"));

  m.def("token_logprob", &token_logprob, py::arg("logits"), py::arg("ids"), py::arg("logp"), py::arg("entropy"),
        py::arg("mean_logp"), py::arg("top_prob"), py::arg("lse"), py::arg("proxy_logp"), py::arg("temperature"),
        py::arg("min_p"), py::arg("stream"));
  m.def("token_logprob_backward", &token_logprob_backward, py::arg("logits"), py::arg("ids"), py::arg("lse"),
        py::arg("entropy"), py::arg("grad_logp"), py::arg("grad_entropy"), py::arg("dlogits"), py::arg("temperature"),
        py::arg("stream"));

  m.def("sample_token", &sample_token, py::arg("logits"), py::arg("uid"), py::arg("step"), py::arg("ids"),
        py::arg("numbers"), py::arg("seed"), py::arg("stream_id"), py::arg("temperature"), py::arg("top_k"),
        py::arg("top_p"), py::arg("min_p"), py::arg("support"), py::arg("stream"));
  m.def("philox_uniform", &philox_uniforms, py::arg("uid"), py::arg("step"), py::arg("out"), py::arg("seed"),
        py::arg("stream_id"));

  m.def("soft_embed", &soft_embed, py::arg("logits"), py::arg("table"), py::arg("uid"), py::arg("step"),
        py::arg("weights"), py::arg("mean"), py::arg("inputs"), py::arg("ids"), py::arg("numbers"), py::arg("seed"),
        py::arg("stream_id"), py::arg("temperature"), py::arg("sigma"), py::arg("top_k"), py::arg("stream"));
  m.def("soft_embed_backward", &soft_embed_backward, py::arg("weights"), py::arg("dots"), py::arg("grad_logp"),
        py::arg("temperature"), py::arg("stream"));

  m.def("attention", &attention, py::arg("qkv"), py::arg("offsets"), py::arg("out"), py::arg("lse"), py::arg("heads"),
        py::arg("kv_heads"), py::arg("stream"));
  m.def("attention_backward", &attention_backward, py::arg("qkv"), py::arg("offsets"), py::arg("out"), py::arg("lse"),
        py::arg("dout"), py::arg("dqkv"), py::arg("heads"), py::arg("kv_heads"), py::arg("stream"));
  m.def("paged_attention", &paged_attention, py::arg("qkv"), py::arg("position"), py::arg("slot"), py::arg("table"),
        py::arg("rope"), py::arg("keys"), py::arg("values"), py::arg("out"), py::arg("heads"), py::arg("kv_heads"),
        py::arg("scale"), py::arg("q_norm"), py::arg("k_norm"), py::arg("eps"), py::arg("stream"));

  m.def("rms_norm_blocks", &rms_norm_blocks, py::arg("rows"));
  m.def("rms_norm", &rms_norm, py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("sum"), py::arg("y"),
        py::arg("rstd"), py::arg("eps"), py::arg("stream"));
  m.def("rms_norm_backward", &rms_norm_backward, py::arg("h"), py::arg("weight"), py::arg("rstd"), py::arg("dy"),
        py::arg("dh_out"), py::arg("dh"), py::arg("dw"), py::arg("stream"));

  m.def("rotary_blocks", &rotary_blocks, py::arg("rows"));
  m.def("rotary", &rotary, py::arg("qkv"), py::arg("position"), py::arg("rope"), py::arg("q_norm"), py::arg("k_norm"),
        py::arg("out"), py::arg("heads"), py::arg("kv_heads"), py::arg("scale"), py::arg("eps"), py::arg("stream"));
  m.def("rotary_backward", &rotary_backward, py::arg("qkv"), py::arg("position"), py::arg("rope"), py::arg("q_norm"),
        py::arg("k_norm"), py::arg("dout"), py::arg("dqkv"), py::arg("dw"), py::arg("heads"), py::arg("kv_heads"),
        py::arg("scale"), py::arg("eps"), py::arg("stream"));

  m.def("swiglu", &swiglu, py::arg("gate_up"), py::arg("out"), py::arg("stream"));
  m.def("swiglu_backward", &swiglu_backward, py::arg("gate_up"), py::arg("dout"), py::arg("dgate_up"),
        py::arg("stream"));

  m.def("ssd_chunks", &ssd_chunks, py::arg("tokens"), py::arg("sequences"), py::arg("chunk"));
  m.def("ssd_work_size", &ssd_work_size, py::arg("states"), py::arg("width"), py::arg("chunk"));
  m.def("ssd_scan", &ssd_scan, py::arg("x"), py::arg("dt"), py::arg("b"), py::arg("c"), py::arg("a_log"), py::arg("d"),
        py::arg("dt_bias"), py::arg("offsets"), py::arg("initial"), py::arg("y"), py::arg("final"), py::arg("starts"),
        py::arg("groups"), py::arg("chunk"), py::arg("stream"));
  m.def("ssd_scan_backward", &ssd_scan_backward, py::arg("x"), py::arg("dt"), py::arg("b"), py::arg("c"),
        py::arg("a_log"), py::arg("d"), py::arg("dt_bias"), py::arg("offsets"), py::arg("starts"), py::arg("dy"),
        py::arg("dfinal"), py::arg("dx"), py::arg("ddt"), py::arg("db"), py::arg("dc"), py::arg("dinitial"),
        py::arg("sums"), py::arg("work"), py::arg("groups"), py::arg("chunk"), py::arg("stream"));
  m.def("ssd_step", &ssd_step, py::arg("x"), py::arg("dt"), py::arg("b"), py::arg("c"), py::arg("state"),
        py::arg("row"), py::arg("position"), py::arg("a_log"), py::arg("d"), py::arg("dt_bias"), py::arg("out"),
        py::arg("stream"));

  m.def("linear", &linear, py::arg("x"), py::arg("w"), py::arg("bias"), py::arg("out"), py::arg("stream"));

  m.def("causal_conv1d_tiles", &causal_conv1d_tiles, py::arg("tokens"), py::arg("sequences"));
  m.def("causal_conv1d", &causal_conv1d, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("offsets"),
        py::arg("initial"), py::arg("u"), py::arg("final"), py::arg("group"), py::arg("silu"), py::arg("stream"));
  m.def("causal_conv1d_backward", &causal_conv1d_backward, py::arg("x"), py::arg("weight"), py::arg("bias"),
        py::arg("offsets"), py::arg("initial"), py::arg("du"), py::arg("dfinal"), py::arg("dx"), py::arg("dinitial"),
        py::arg("dw"), py::arg("group"), py::arg("silu"), py::arg("stream"));

  m.def("selective_scan_tiles", &selective_scan_tiles, py::arg("tokens"), py::arg("sequences"));
  m.def("selective_scan", &selective_scan, py::arg("u"), py::arg("dt"), py::arg("z"), py::arg("b"), py::arg("c"),
        py::arg("a_log"), py::arg("d"), py::arg("dt_bias"), py::arg("offsets"), py::arg("initial"), py::arg("y"),
        py::arg("final"), py::arg("checkpoint"), py::arg("stream"));
  m.def("selective_scan_backward", &selective_scan_backward, py::arg("u"), py::arg("dt"), py::arg("z"), py::arg("b"),
        py::arg("c"), py::arg("a_log"), py::arg("d"), py::arg("dt_bias"), py::arg("offsets"), py::arg("checkpoint"),
        py::arg("dy"), py::arg("dfinal"), py::arg("du"), py::arg("ddt"), py::arg("dz"), py::arg("db"), py::arg("dc"),
        py::arg("dinitial"), py::arg("dw"), py::arg("stream"));

  m.def("mamba_step", &mamba_step, py::arg("proj"), py::arg("dt"), py::arg("conv_state"), py::arg("ssm_state"),
        py::arg("row"), py::arg("position"), py::arg("weight"), py::arg("bias"), py::arg("a_log"), py::arg("d"),
        py::arg("dt_bias"), py::arg("out"), py::arg("stream"));
}
