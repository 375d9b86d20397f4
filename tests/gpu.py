"""Why the CUDA twins cannot run here."""

from __future__ import annotations

import torch


def cuda_skip_reason() -> str | None:
    """None where they can run."""
    if not torch.cuda.is_available():
        return "no NVIDIA GPU on this machine"
    from pymathrl import _C

    return None if _C.has_cuda else "extension built without CUDA"
