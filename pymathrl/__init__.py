"""pymathrl: reinforcement learning of language models on verifiable mathematics, on one copy of the weights.

    policy = pymathrl.load("builtin:tiny")
    prompt = policy.tokenizer.encode("3 4 2 -> 10\\n<think>")
    rollout = pymathrl.Engine(policy, seed=0).generate([prompt], 8, 64)

The commands are `python -m pymathrl.train`, `.eval`, `.verify` and `.report`; the kernels are in `pymathrl.ops`, the
algorithms in `pymathrl.algos.REGISTRY`, the tasks in `pymathrl.tasks.TASKS`, the verifier is `pymathrl.verify`.

Names and subpackages are imported when they are first used: the verifier's workers, which are many, need no torch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pymathrl.models.load import Policy, load, save
    from pymathrl.rollout.engine import Engine

try:
    __version__ = version("pymathrl")
except PackageNotFoundError:  # a source tree on the path, built in place
    __version__ = "0+source"

__all__ = ["Engine", "Policy", "__version__", "load", "save"]

_HOME = {"Engine": "rollout", "Policy": "models", "load": "models", "save": "models"}
_PACKAGES = ("algos", "models", "ops", "rollout", "tasks", "verify")


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"pymathrl.{_HOME[name]}"), name)
    if name in _PACKAGES:
        return import_module(f"pymathrl.{name}")
    raise AttributeError(f"module 'pymathrl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_PACKAGES])
