"""One thread for all tests here: their models are tiny, and threads that wait for each other cost more than they do."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr("pymathrl.devices.set_threads", lambda count: 1)
    yield
    torch.set_num_threads(threads)
