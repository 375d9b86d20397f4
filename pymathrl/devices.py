"""Where a run computes: the device that a name means, its threads and its memory."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from pymathrl.errors import UserError


def resolve(name: str) -> torch.device:
    """auto (a GPU where torch and the extension can use one, else the CPU), cpu, cuda, or cuda:N."""
    from pymathrl.ops._call import _C

    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() and _C.has_cuda else torch.device("cpu")
    if name == "cpu":
        return torch.device("cpu")
    if "," in name:
        raise UserError(
            f"--device: expected one device (auto, cpu, cuda or cuda:N), got {name!r}; a run uses one device"
        )
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdigit()) or name.endswith(":"):
        raise UserError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch {torch.__version__} sees no NVIDIA GPU here; use --device cpu")
    if not _C.has_cuda:
        raise UserError(
            f"--device {name}: pymathrl was built without CUDA; install nvcc and reinstall, or use --device cpu"
        )
    if int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, numbered from 0")
    return torch.device("cuda", int(index or 0))


def weight_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision that --dtype asks for on this device."""
    if name == "bf16" and device.type == "cpu":
        raise UserError("--dtype bf16: weights on a CPU are fp32; leave it out, or use --device cuda")
    return torch.float32 if name == "fp32" or device.type == "cpu" else torch.bfloat16


def set_threads(count: int) -> int:
    """Fixes the number of CPU threads (0 = the cores this process may use) and returns it."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(min(count, cores) if count else cores)
    return torch.get_num_threads()


def free_bytes(device: torch.device) -> int:
    """Memory that a run can still take on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what was queued, so that a stage's time is its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def machine(device: torch.device) -> str:
    """What computes, for a figure that depends on it: the name of the GPU, or of the CPU with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads"
