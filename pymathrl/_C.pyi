# The extension's surface (csrc/bindings.cpp). Use pymathrl.ops: it checks, allocates and differentiates.
has_cuda: bool

def parallel_runtime() -> str: ...
def simd_level() -> str: ...

class Tensor:
    def __init__(
        self, data: int, dtype: int, sizes: tuple[int, ...], strides: tuple[int, ...], device: int
    ) -> None: ...

class Program:
    def begin(self) -> None: ...
    def end(self) -> None: ...
    def run(self) -> None: ...
    def __len__(self) -> int: ...

def group_advantage(
    reward: Tensor, offsets: Tensor, baseline: Tensor | None, tokens: Tensor | None, advantage: Tensor, equal: Tensor,
    centre: int, scale: int, eps: float, ddof: int, stream: int,
) -> None: ...

class PolicyLossConfig:
    def __init__(
        self, *, form: int, clip_low: float, clip_high: float, delta: float, dual_clip: float, ratio_weight: bool,
        weight_low: float, weight_high: float, sequence_mean: bool, rho: float, beta: float, rover_response: bool,
        q_low: float, q_high: float, lp_reg_coef: float, tau: tuple[float, float],
        vespo_positive: tuple[float, float], vespo_negative: tuple[float, float], kl: int, kl_ratio: bool,
        kl_coef: float, entropy_coef: float, tis: int, tis_mask: bool, tis_cap: float, log_tis_cap: float,
    ) -> None: ...

def policy_loss_stats() -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]: ...
def policy_loss_blocks(n: int, cuda: bool) -> int: ...
def policy_loss(
    config: PolicyLossConfig, logp: Tensor, old_logp: Tensor | None, advantage: Tensor, coef: Tensor,
    mask: Tensor | None, offsets: Tensor | None, mean_logp: Tensor | None, old_mean_logp: Tensor | None,
    link: Tensor | None, proxy_logp: Tensor | None, selected: Tensor | None, ref_logp: Tensor | None,
    entropy: Tensor | None, behaviour_logp: Tensor | None, grad_logp: Tensor, grad_entropy: Tensor | None,
    sequence_work: Tensor | None, result: Tensor, stream: int,
) -> None: ...

def token_logprob(
    logits: Tensor, ids: Tensor, logp: Tensor, entropy: Tensor, mean_logp: Tensor, top_prob: Tensor, lse: Tensor,
    proxy_logp: Tensor | None, temperature: float, min_p: float, stream: int,
) -> None: ...
def token_logprob_backward(
    logits: Tensor, ids: Tensor, lse: Tensor, entropy: Tensor | None, grad_logp: Tensor | None,
    grad_entropy: Tensor | None, dlogits: Tensor, temperature: float, stream: int,
) -> None: ...

def sample_token(
    logits: Tensor, uid: Tensor, step: Tensor, ids: Tensor, numbers: Tensor, seed: int, stream_id: int,
    temperature: float, top_k: int, top_p: float, min_p: float, support: Tensor | None, stream: int,
) -> None: ...
def soft_embed(
    logits: Tensor, table: Tensor, uid: Tensor | None, step: Tensor | None, weights: Tensor, mean: Tensor,
    inputs: Tensor, ids: Tensor, numbers: Tensor, seed: int, stream_id: int, temperature: float, sigma: float,
    top_k: int, stream: int,
) -> None: ...
def soft_embed_backward(
    weights: Tensor, dots: Tensor, grad_logp: Tensor, temperature: float, stream: int
) -> None: ...
def philox_uniform(uid: Tensor, step: Tensor, out: Tensor, seed: int, stream_id: int) -> None: ...

def attention(
    qkv: Tensor, offsets: Tensor, out: Tensor, lse: Tensor, heads: int, kv_heads: int, stream: int
) -> None: ...
def attention_backward(
    qkv: Tensor, offsets: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dqkv: Tensor, heads: int, kv_heads: int,
    stream: int,
) -> None: ...
def paged_attention(
    qkv: Tensor, position: Tensor, slot: Tensor, table: Tensor, rope: Tensor, keys: Tensor, values: Tensor,
    out: Tensor, heads: int, kv_heads: int, scale: float, q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
    stream: int,
) -> None: ...

def rms_norm_blocks(rows: int) -> int: ...
def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, sum: Tensor | None, y: Tensor, rstd: Tensor | None, eps: float,
    stream: int,
) -> None: ...
def rms_norm_backward(
    h: Tensor, weight: Tensor, rstd: Tensor, dy: Tensor, dh_out: Tensor | None, dh: Tensor, dw: Tensor, stream: int
) -> None: ...

def rotary_blocks(rows: int) -> int: ...
def rotary(
    qkv: Tensor, position: Tensor, rope: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, out: Tensor, heads: int,
    kv_heads: int, scale: float, eps: float, stream: int,
) -> None: ...
def rotary_backward(
    qkv: Tensor | None, position: Tensor, rope: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, dout: Tensor,
    dqkv: Tensor, dw: Tensor | None, heads: int, kv_heads: int, scale: float, eps: float, stream: int,
) -> None: ...

def swiglu(gate_up: Tensor, out: Tensor, stream: int) -> None: ...
def swiglu_backward(gate_up: Tensor, dout: Tensor, dgate_up: Tensor, stream: int) -> None: ...
def linear(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, stream: int) -> None: ...

def causal_conv1d_tiles(tokens: int, sequences: int) -> int: ...
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, initial: Tensor | None, u: Tensor,
    final: Tensor | None, group: int, silu: bool, stream: int,
) -> None: ...
def causal_conv1d_backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, initial: Tensor | None, du: Tensor,
    dfinal: Tensor | None, dx: Tensor, dinitial: Tensor | None, dw: Tensor, group: int, silu: bool, stream: int,
) -> None: ...
def selective_scan_tiles(tokens: int, sequences: int) -> int: ...
def selective_scan(
    u: Tensor, dt: Tensor, z: Tensor | None, b: Tensor, c: Tensor, a_log: Tensor, d: Tensor, dt_bias: Tensor,
    offsets: Tensor, initial: Tensor | None, y: Tensor, final: Tensor | None, checkpoint: Tensor | None, stream: int,
) -> None: ...
def selective_scan_backward(
    u: Tensor, dt: Tensor, z: Tensor | None, b: Tensor, c: Tensor, a_log: Tensor, d: Tensor, dt_bias: Tensor,
    offsets: Tensor, checkpoint: Tensor, dy: Tensor, dfinal: Tensor | None, du: Tensor, ddt: Tensor,
    dz: Tensor | None, db: Tensor, dc: Tensor, dinitial: Tensor | None, dw: Tensor, stream: int,
) -> None: ...
def mamba_step(
    proj: Tensor, dt: Tensor, conv_state: Tensor, ssm_state: Tensor, row: Tensor, position: Tensor, weight: Tensor,
    bias: Tensor, a_log: Tensor, d: Tensor, dt_bias: Tensor, out: Tensor, stream: int,
def ssd_chunks(tokens: int, sequences: int, chunk: int) -> int: ...
def ssd_work_size(states: int, width: int, chunk: int) -> int: ...
def ssd_scan(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a_log: Tensor, d: Tensor, dt_bias: Tensor, offsets: Tensor,
    initial: Tensor | None, y: Tensor, final: Tensor, starts: Tensor | None, groups: int, chunk: int, stream: int,
) -> None: ...
def ssd_scan_backward(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a_log: Tensor, d: Tensor, dt_bias: Tensor, offsets: Tensor,
    starts: Tensor, dy: Tensor, dfinal: Tensor | None, dx: Tensor, ddt: Tensor, db: Tensor, dc: Tensor,
    dinitial: Tensor | None, sums: Tensor, work: Tensor, groups: int, chunk: int, stream: int,
) -> None: ...
def ssd_step(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, state: Tensor, row: Tensor, position: Tensor, a_log: Tensor,
    d: Tensor, dt_bias: Tensor, out: Tensor, stream: int,
) -> None: ...
