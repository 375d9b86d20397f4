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
    retool,
    rloo,
    rover,
    tango,
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
    "campo": campo.ALGO,
    "acereason": acereason.ALGO,
    "retool": retool.ALGO,
    "tapo": tapo.ALGO,
    "parallel_r1": parallel_r1.ALGO,
    "tango": tango.ALGO,
}

__all__ = ["REGISTRY", "Algo", "LossSpec"]
