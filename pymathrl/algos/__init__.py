"""The algorithms: each one short file, one record, one line here."""

from pymathrl.algos import cispo, dapo, dr_grpo, grpo, gspo, parallel_r1, rloo, rover, tango
from pymathrl.algos.algo import Algo, LossSpec

REGISTRY: dict[str, Algo] = {
    "rover": rover.ALGO,
    "grpo": grpo.ALGO,
    "dr_grpo": dr_grpo.ALGO,
    "dapo": dapo.ALGO,
    "gspo": gspo.ALGO,
    "cispo": cispo.ALGO,
    "rloo": rloo.ALGO,
    "parallel_r1": parallel_r1.ALGO,
    "tango": tango.ALGO,
}

__all__ = ["REGISTRY", "Algo", "LossSpec"]
