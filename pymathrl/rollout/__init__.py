"""Stage `rollout`: the policy answers the prompts."""

from pymathrl.rollout.draws import Draws
from pymathrl.rollout.engine import Engine, Snapshot, Step, StepStats
from pymathrl.rollout.score import Scored, Scores, score, walk

__all__ = ["Draws", "Engine", "Scored", "Scores", "Snapshot", "Step", "StepStats", "score", "walk"]
