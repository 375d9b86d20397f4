"""Stage `rollout`: the policy answers the prompts."""

from pymathrl.rollout.engine import Engine, Snapshot, Step, StepStats
from pymathrl.rollout.score import score

__all__ = ["Engine", "Snapshot", "Step", "StepStats", "score"]
