"""The algorithms: each one short file, one record, one line here."""

from pymathrl.algos import (
    acereason,
    campo,
    cispo,
    cure,
    dapo,
    dr_grpo,
    grpo,
    gspo,
    hapo,
    lp_reg,
    mgpo,
    parallel_r1,
    ppo,
    reinforce_pp,
    retool,
    rloo,
    rover,
    satori,
    soft_tokens,
    spo,
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
    "spo": spo.ALGO,
    "soft_tokens": soft_tokens.ALGO,
    "lp_reg": lp_reg.ALGO,
    "cure": cure.ALGO,
    "hapo": hapo.ALGO,
    "campo": campo.ALGO,
    "mgpo": mgpo.ALGO,
    "acereason": acereason.ALGO,
    "retool": retool.ALGO,
    "tapo": tapo.ALGO,
    "parallel_r1": parallel_r1.ALGO,
    "satori": satori.ALGO,
}

__all__ = ["REGISTRY", "Algo", "LossSpec"]
