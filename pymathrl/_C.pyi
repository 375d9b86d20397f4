# The extension's surface (csrc/bindings.cpp). Use pymathrl.ops: it checks, allocates and differentiates.
has_cuda: bool

def parallel_runtime() -> str: ...

class Tensor:
    def __init__(
        self, data: int, dtype: int, sizes: tuple[int, ...], strides: tuple[int, ...], device: int
    ) -> None: ...

def group_advantage(
    reward: Tensor, offsets: Tensor, baseline: Tensor | None, tokens: Tensor | None, advantage: Tensor, equal: Tensor,
    centre: int, scale: int, eps: float, ddof: int, stream: int,
) -> None: ...
