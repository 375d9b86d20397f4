"""How a torch tensor crosses to the extension, and which implementation an op runs (chosen once, with its reason)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch  # before _C: the extension runs on the OpenMP runtime that torch brings

if TYPE_CHECKING:
    from pymathrl import _C
else:
    try:
        from pymathrl import _C
    except ImportError as error:  # a source tree without a build: say what to run, keep the cause
        raise ImportError(
            "pymathrl._C is not built; run `pip install .` (or `pip install -e .`) in the repository"
        ) from error

DTYPES = {
    torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int64: 3,
    torch.uint8: 4, torch.bool: 4, torch.int32: 5, torch.int8: 6, torch.float64: 7,
}  # fmt: skip  # the numbers of DType in csrc/common/tensor.h


def view(t: torch.Tensor) -> _C.Tensor:
    """The extension's view of `t`: no copy, no ownership; `t` must outlive the call."""
    if t.device.type not in ("cpu", "cuda"):
        raise ValueError(f"the kernels take tensors on a CPU or an NVIDIA GPU, got one on {t.device}")
    return _C.Tensor(t.data_ptr(), DTYPES[t.dtype], tuple(t.shape), t.stride(), t.get_device())


def optional_view(t: torch.Tensor | None) -> _C.Tensor | None:
    return None if t is None else view(t)


def stream(t: torch.Tensor) -> int:
    """The handle of the stream that torch queues on for the device of `t`; 0 on the CPU."""
    return torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else 0


def _resolve() -> tuple[str, str]:
    wanted = os.environ.get("PYMATHRL_IMPL", "")
    if wanted not in ("", "ref", "kernel"):
        raise ValueError(f"PYMATHRL_IMPL must be 'kernel' or 'ref', got {wanted!r}")
    if wanted == "ref":
        return "ref", "PYMATHRL_IMPL=ref"
    cuda = "built with CUDA" if _C.has_cuda else "built without CUDA"
    return "kernel", f"_C {cuda}, threads of {os.path.basename(_C.parallel_runtime())}"


IMPL, WHY = _resolve()


def use_reference() -> bool:
    """True when PYMATHRL_IMPL=ref asks for the plain torch references instead of the kernels (tests, bisection)."""
    return IMPL == "ref"
