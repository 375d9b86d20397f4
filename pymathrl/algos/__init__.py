"""The algorithms: each one short file, one record, one line here."""

from pymathrl.algos import (
    acereason,
    campo,
    cispo,
    dapo,
    dr_grpo,
    grpo,
    gspo,
    parallel_r1,
    ppo,
    reinforce_pp,
    retool,
    rloo,
    rover,
    satori,
    soft_tokens,
    tapo,
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
    "reinforce_pp": reinforce_pp.ALGO,
    "ppo": ppo.ALGO,
    "soft_tokens": soft_tokens.ALGO,
    "campo": campo.ALGO,
    "acereason": acereason.ALGO,
    "retool": retool.ALGO,
    "tapo": tapo.ALGO,
    "parallel_r1": parallel_r1.ALGO,
    "satori": satori.ALGO,
}

__all__ = ["REGISTRY", "Algo", "LossSpec"]
