"""Stage `rollout`: the policy answers the prompts."""

from pymathrl.ops.soft_embed import SoftSampling
from pymathrl.rollout.draws import Draws
from pymathrl.rollout.engine import Engine, Snapshot, Step, StepStats
from pymathrl.rollout.score import Scored, Scores, score, walk

__all__ = ["Draws", "Engine", "Scored", "Scores", "Snapshot", "SoftSampling", "Step", "StepStats", "score", "walk"]
