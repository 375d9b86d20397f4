"""The algorithms: each one short file, one record, one line here."""

from pymathrl.algos import (
    acereason,
    acre,
    campo,
    cispo,
    dapo,
    dr_grpo,
    grpo,
    gspo,
    guide,
    parallel_r1,
    retool,
    rloo,
    rlp,
    rover,
    soft_tokens,
    tapo,
    thr,
    vogue,
)
from pymathrl.algos.algo import Algo, LossSpec

REGISTRY: dict[str, Algo] = {
    "rover": rover.ALGO,
    "grpo": grpo.ALGO,
    "dr_grpo": dr_grpo.ALGO,
    "dapo": dapo.ALGO,
    "gspo": gspo.ALGO,
    "cispo": cispo.ALGO,
    "rloo": rloo.ALGO,
    "soft_tokens": soft_tokens.ALGO,
    "campo": campo.ALGO,
    "acereason": acereason.ALGO,
    "retool": retool.ALGO,
    "tapo": tapo.ALGO,
    "parallel_r1": parallel_r1.ALGO,
    "thr": thr.ALGO,
    "guide": guide.ALGO,
    "vogue": vogue.ALGO,
    "acre": acre.ALGO,
    "rlp": rlp.ALGO,
}

__all__ = ["REGISTRY", "Algo", "LossSpec"]
