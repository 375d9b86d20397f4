"""Fixtures of all tests: the devices an op runs on, and why one is left out."""

from __future__ import annotations

import pytest
import torch

from tests.gpu import cuda_skip_reason


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
