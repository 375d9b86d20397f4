"""AceReason: strictly on-policy GRPO through stages of domain, length and difficulty, after "AceReason-Nemotron" (Chen
et al., arXiv 2505.16400, sections 3.1 to 3.4).

    A = (R - mean of the group) / (std of the group + eps),   R = 1 or 0, nothing else
    L = mean over the tokens of the step of -A log pi         one update per rollout batch: the ratio is 1, no clip

No KL, no entropy bonus. More updates per batch collapsed the entropy within about 100 steps (section 3.4), so any other
number is refused here. The stages are a schedule of [[stage]] tables (README has one); the pass-rate filter of the
later ones, "drop what is solved more than 6 times in 16", is `--filter band --filter-low 0 --filter-high 0.375`.

Not found in the paper: steps per stage, clip range (it never acts), temperature of the mathematics stages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pymathrl.algos.algo import Algo, LossSpec
from pymathrl.algos.common import group_normalised
from pymathrl.batch import Graded
from pymathrl.errors import UserError
from pymathrl.options import positive

if TYPE_CHECKING:
    from pymathrl.context import Context


@dataclass(frozen=True)
class Config:
    adv_eps: float = positive(1e-6, "added to the std (ours; the paper gives none)")


def check(train: Any, own: Config) -> None:
    if train.epochs * train.minibatches != 1:
        raise UserError(
            "--algo acereason makes one update per rollout batch: expected --minibatches 1 and --epochs 1, got "
            f"{train.minibatches} and {train.epochs}; use --algo grpo for more"
        )


def judge(ctx: Context, graded: Graded) -> Graded:
    return replace(graded, reward=graded.correct.float())


def loss(config: Config) -> LossSpec:
    return LossSpec(form="weighted", aggregation="token-mean", idle_when_zero=True)


ALGO = Algo(
    name="acereason",
    summary="strictly on-policy GRPO, for schedules of domain, length and difficulty",
    paper="arXiv 2505.16400",
    config=Config,
    advantage=group_normalised,
    loss=loss,
    defaults={"minibatches": 1},
    check=check,
    judge=judge,
)
