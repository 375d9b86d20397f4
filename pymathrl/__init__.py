"""pymathrl: reinforcement learning of language models on verifiable mathematics, on one copy of the weights.

    policy = pymathrl.load("builtin:tiny")
    prompt = policy.tokenizer.encode("3 4 2 -> 10\\n<think>")
    rollout = pymathrl.Engine(policy, seed=0).generate([prompt], 8, 64)

The commands are `python -m pymathrl.train`, `.eval` and `.report`; the kernels are in `pymathrl.ops`, the algorithms in
`pymathrl.algos.REGISTRY`, the tasks in `pymathrl.tasks.TASKS`.
"""

from importlib.metadata import PackageNotFoundError, version

from pymathrl.models import Policy, load, save
from pymathrl.rollout import Engine

try:
    __version__ = version("pymathrl")
except PackageNotFoundError:  # a source tree on the path, built in place
    __version__ = "0+source"

__all__ = ["Engine", "Policy", "__version__", "load", "save"]
