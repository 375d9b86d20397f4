"""Evaluation: `evaluate` for a training loop, `python -m pymathrl.eval` for a person."""

from pymathrl.eval.sample import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
