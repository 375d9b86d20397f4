"""Stage `rollout`: the policy answers the prompts."""

from pymathrl.rollout.generate import generate, score

__all__ = ["generate", "score"]
