"""The algorithms: each one short file, one record, one line here."""

from pymathrl.algos import grpo, rover
from pymathrl.algos.algo import Algo, LossSpec

REGISTRY: dict[str, Algo] = {
    "rover": rover.ALGO,
    "grpo": grpo.ALGO,
}

__all__ = ["REGISTRY", "Algo", "LossSpec"]
