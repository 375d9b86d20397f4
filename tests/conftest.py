"""Fixtures of all tests: the devices an op runs on, and why one is left out."""

from __future__ import annotations

import pytest
import torch


def cuda_skip_reason() -> str | None:
    """Why the CUDA twins cannot run here; None where they can."""
    if not torch.cuda.is_available():
        return "no NVIDIA GPU on this machine"
    from pymathrl import _C

    return None if _C.has_cuda else "extension built without CUDA"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Runs the test on the CPU, and on the GPU where there is one."""
    if request.param == "cuda" and (reason := cuda_skip_reason()):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def threads():
    """A function that sets torch's thread count; the count of before comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
