"""The kernels: one thin wrapper each, its plain torch reference `<op>_ref` beside it. Usable from any training loop.

PYMATHRL_IMPL=ref runs the references instead of the kernels, in every op.
"""

from pymathrl.ops._call import IMPL, WHY
from pymathrl.ops.aggregation import aggregation_coef
from pymathrl.ops.attention import (
    PAGE,
    attention,
    attention_ref,
    attention_supports,
    paged_attention,
    paged_attention_ref,
)
from pymathrl.ops.causal_conv1d import causal_conv1d, causal_conv1d_ref
from pymathrl.ops.gae import Gae, gae, value_loss
from pymathrl.ops.group_advantage import GroupAdvantage, group_advantage, group_advantage_ref
from pymathrl.ops.linear import linear, linear_out, linear_ref
from pymathrl.ops.mamba_step import mamba_step, mamba_step_ref
from pymathrl.ops.policy_loss import PolicyLoss, merge_stats, policy_loss, policy_loss_ref
from pymathrl.ops.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_out, rms_norm_ref
from pymathrl.ops.rotary import rotary, rotary_ref
from pymathrl.ops.sample_token import SampleToken, sample_token, sample_token_ref
from pymathrl.ops.selective_scan import selective_scan, selective_scan_ref
from pymathrl.ops.soft_embed import SoftEmbed, soft_embed, soft_embed_backward, soft_embed_ref
from pymathrl.ops.ssd import ssd_scan, ssd_scan_ref, ssd_step, ssd_step_ref
from pymathrl.ops.swiglu import swiglu, swiglu_out, swiglu_ref
from pymathrl.ops.token_logprob import (
    TokenLogprob,
    token_logprob,
    token_logprob_backward_,
    token_logprob_backward_ref,
    token_logprob_ref,
)

__all__ = [
    "IMPL",
    "PAGE",
    "WHY",
    "Gae",
    "GroupAdvantage",
    "PolicyLoss",
    "SampleToken",
    "SoftEmbed",
    "TokenLogprob",
    "add_rms_norm",
    "add_rms_norm_ref",
    "aggregation_coef",
    "attention",
    "attention_ref",
    "attention_supports",
    "causal_conv1d",
    "causal_conv1d_ref",
    "gae",
    "group_advantage",
    "group_advantage_ref",
    "linear",
    "linear_out",
    "linear_ref",
    "mamba_step",
    "mamba_step_ref",
    "merge_stats",
    "paged_attention",
    "paged_attention_ref",
    "policy_loss",
    "policy_loss_ref",
    "rms_norm",
    "rms_norm_out",
    "rms_norm_ref",
    "rotary",
    "rotary_ref",
    "sample_token",
    "sample_token_ref",
    "selective_scan",
    "selective_scan_ref",
    "soft_embed",
    "soft_embed_backward",
    "soft_embed_ref",
    "ssd_scan",
    "ssd_scan_ref",
    "ssd_step",
    "ssd_step_ref",
    "swiglu",
    "swiglu_out",
    "swiglu_ref",
    "token_logprob",
    "token_logprob_backward_",
    "token_logprob_backward_ref",
    "token_logprob_ref",
    "value_loss",
]
