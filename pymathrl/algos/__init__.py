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
    retool,
    rloo,
    rover,
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
    "spo": spo.ALGO,
    "lp_reg": lp_reg.ALGO,
    "cure": cure.ALGO,
    "hapo": hapo.ALGO,
    "mgpo": mgpo.ALGO,
    "campo": campo.ALGO,
    "acereason": acereason.ALGO,
    "retool": retool.ALGO,
    "tapo": tapo.ALGO,
    "parallel_r1": parallel_r1.ALGO,
}

__all__ = ["REGISTRY", "Algo", "LossSpec"]
