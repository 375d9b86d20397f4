"""The decoder's forward pass for generation: new tokens in, over keys and values that lie in pages, and states.

One pass serves decode, prefill and forced tokens, and runs the same kernels as the update (`Decoder.hidden`), so that a
token's hidden state has the same bits in both (contract C1). It works on static buffers: what it launches is recorded
once per number of rows and replayed, as a `Program` on a CPU and as a CUDA graph on a GPU. The weights are read where
they lie, so a recording survives the optimizer's steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from pymathrl.models.decoder import AttentionLayer, Decoder
from pymathrl.models.m1 import MambaLayer
from pymathrl.ops._call import _C, use_reference
from pymathrl.ops.attention import PAGE, paged_attention
from pymathrl.ops.linear import linear_out
from pymathrl.ops.mamba_step import mamba_step
from pymathrl.ops.rms_norm import rms_norm_out
from pymathrl.ops.sample_token import sample_token, support_bytes
from pymathrl.ops.soft_embed import SoftOut, SoftSampling, soft_embed
from pymathrl.ops.swiglu import swiglu_out

HEAD_BYTES = 64 << 20  # of the logits held at once: head and draw run over chunks of rows
WARM_UP = 2  # runs before a CUDA graph is captured: libraries make their workspaces in the first
Until = Literal["cache", "hidden", "token"]


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. temperature divides the logits, 0 is greedy; top_k 0, top_p 1, min_p 0 cut nothing."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        in_range = 0.0 <= self.temperature < math.inf and 0.0 < self.top_p <= 1.0 and 0.0 <= self.min_p <= 1.0
        if not in_range or self.top_k < 0:
            raise ValueError(
                "Sampling: expected temperature >= 0, top_k >= 0, top_p in (0, 1] and min_p in [0, 1], got "
                f"{self.temperature}, {self.top_k}, {self.top_p} and {self.min_p}"
            )

    @property
    def truncates(self) -> bool:
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)


class PagedCache:
    """Keys and values of all L attention layers in pages of PAGE tokens, and the states of all M Mamba layers.

    keys    [L, pages, K, E, PAGE]       transposed, as the decode kernel reads them
    values  [L, pages, K, PAGE, E]
    table   int32 [slots, C]             the page of tokens PAGE*c .. PAGE*c + PAGE-1 of the sequence in a slot
    conv    fp32 [M, states, W-1, X]     the last inputs of each convolution; of a hybrid, as ssm is
    ssm     fp32 [M, states, N, I]       bf16 would lose slow channels: one that decays by e^-0.001 a token, fed a
                                         constant whose limit is 1, sticks at 0.25
    """

    def __init__(self, model: Decoder) -> None:
        """Room for nothing yet; see `grow`."""
        c, like = model.config, model.embed
        shape = (c.attention_count, 0, c.num_kv_heads)
        self.keys = like.new_empty((*shape, c.head_dim, PAGE), requires_grad=False)
        self.values = like.new_empty((*shape, PAGE, c.head_dim), requires_grad=False)
        self.table = torch.zeros(0, 0, dtype=torch.int32, device=like.device)
        m, layers = c.mamba, c.num_layers - c.attention_count
        conv, ssm = ((0, 0), (0, 0)) if m is None else ((m.conv_width - 1, m.xb_size), (m.state_size, m.inner_size))
        self.conv, self.ssm = (torch.empty(layers, 0, *shape, device=like.device) for shape in (conv, ssm))

    @staticmethod
    def page_bytes(model: Decoder) -> int:
        c = model.config
        return 2 * c.attention_count * c.num_kv_heads * c.head_dim * PAGE * model.embed.element_size()

    @staticmethod
    def state_bytes(model: Decoder) -> int:
        c, m = model.config, model.config.mamba
        if m is None:
            return 0
        return 4 * (c.num_layers - c.attention_count) * ((m.conv_width - 1) * m.xb_size + m.state_size * m.inner_size)

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Pages `source` -> `target` (int64), in every layer: a shared page before its first write."""
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]

    def copy_states(self, source: Tensor, target: Tensor) -> None:
        """Rows `source` -> `target` (int64) of the states, in every layer: a shared state before its first write."""
        self.conv[:, target] = self.conv[:, source]
        self.ssm[:, target] = self.ssm[:, source]

    def grow(self, pages: int, slots: int, columns: int, states: int, keep: bool = True) -> None:
        """Room for so many pages, slots, columns and states. keep: what is there stays, and lies in memory twice while
        it is copied, one tensor at a time."""
        pools = {"keys": pages, "values": pages, "conv": states, "ssm": states}
        for name, size in pools.items():
            if size != getattr(self, name).shape[1] and not keep:
                setattr(self, name, getattr(self, name)[:, :0].clone())
        for name, sizes in [(name, (size,)) for name, size in pools.items()] + [("table", (slots, columns))]:
            old = getattr(self, name)
            lead = 0 if name == "table" else 1  # the layers come before the pages
            shape = list(old.shape)
            shape[lead : lead + len(sizes)] = sizes
            if shape != list(old.shape):
                new = old.new_zeros(shape) if name == "table" else old.new_empty(shape)
                new[tuple(slice(size) for size in old.shape)] = old
                setattr(self, name, new)


class Buffers:
    """What a pass of up to `rows` rows works on; a pass of fewer rows uses the first of each.

    ids       int64 [rows]  the token that is fed; after a pass until "token" the one that was drawn
    stream    [rows, D]     before a pass the input of each row: the embedding of its token (`embed`), or a soft token's
                            vector; after a pass until "token" that of what was drawn, ready for the next
    slot      int64 [rows]  the sequence; -1 = none, the row's results mean nothing
    state     int64 [rows]  the row of its recurrent state; -1 = none
    position  int64 [rows]  of the fed token in its sequence
    uid       int64 [rows]  the sample of the row, and
    draw      int64 [rows]  the number of the draw in it: what its random number is made from, see `sample_token`
    hidden    [rows, D]     after the last norm
    logits    fp32 [c, V]   of a chunk of c rows at a time
    numbers   fp32 [4*rows] logp, entropy, mean_logp, kept mass of a chunk of rows (each [c]), then of the next chunk
    """

    def __init__(self, model: Decoder, rows: int) -> None:
        c, like = model.config, model.embed

        def floats(width: int) -> Tensor:
            return like.new_zeros((rows, width), requires_grad=False)

        self.rows = rows
        self.inputs = torch.zeros(6, rows, dtype=torch.int64, device=like.device)
        self.ids, self.slot, self.state, self.uid, self.position, self.draw = self.inputs.unbind()
        self.clear_from(0)
        self.drawn = torch.zeros_like(self.ids)
        self.stream, self.branch, self.hidden = floats(c.hidden_size), floats(c.hidden_size), floats(c.hidden_size)
        self.qkv = floats((c.num_heads + 2 * c.num_kv_heads) * c.head_dim)
        self.attended = floats(c.num_heads * c.head_dim)
        if c.mamba is not None:
            self.proj, self.dt, self.scanned = (
                floats(width) for width in (sum(c.mamba.parts), c.mamba.inner_size, c.mamba.inner_size)
            )
        self.gate_up, self.act = floats(2 * c.intermediate_size), floats(c.intermediate_size)
        self.head_rows = max(1, min(rows, HEAD_BYTES // (4 * c.vocab_size)))
        self.logits = torch.empty(self.head_rows, c.vocab_size, dtype=torch.float32, device=like.device)
        self.numbers = torch.zeros(4 * rows, dtype=torch.float32, device=like.device)
        self._support: Tensor | None = None
        self._mean: Tensor | None = None

    def clear_from(self, row: int, stop: int | None = None) -> None:
        """Rows row .. stop-1 are no sequence's."""
        self.inputs[1:3, row:stop] = -1

    def embed(self, model: Decoder, rows: int) -> None:
        """The inputs of the first `rows` rows become the embeddings of their ids."""
        torch.index_select(model.embed.detach(), 0, self.ids[:rows], out=self.stream[:rows])

    def mean(self, rows: int) -> Tensor:
        """fp32 [rows, D], a chunk's mixed embeddings before their noise; made when first asked for."""
        if self._mean is None:
            self._mean = torch.zeros(self.head_rows, self.hidden.shape[1], device=self.logits.device)
        return self._mean[:rows]

    def support(self, rows: int) -> Tensor:
        """uint8 [rows, ceil(V/8)], for the tokens that filters leave; made when first asked for."""
        if self._support is None:
            width = support_bytes(self.logits.shape[1])
            self._support = torch.zeros(self.rows, width, dtype=torch.uint8, device=self.logits.device)
        return self._support[:rows]

    @staticmethod
    def nbytes(model: Decoder, rows: int) -> int:
        c = model.config
        floats = 3 * c.hidden_size + 2 * (c.num_heads + c.num_kv_heads) * c.head_dim + 3 * c.intermediate_size
        if c.mamba is not None:
            floats += sum(c.mamba.parts) + 2 * c.mamba.inner_size
        return rows * (floats * model.embed.element_size() + 72) + min(4 * rows * c.vocab_size, HEAD_BYTES)

    def split_numbers(self, rows: int, numbers: Tensor) -> Tensor:
        """numbers [k, 4*rows] of k passes over `rows` rows, as they lie in the buffer -> [4,k,rows]."""
        chunks = [slice(a, min(rows, a + self.head_rows)) for a in range(0, rows, self.head_rows)]
        parts = [numbers[:, 4 * s.start : 4 * s.stop].unflatten(1, (4, -1)) for s in chunks]
        return torch.cat(parts, 2).transpose(0, 1)


class Pass:
    """The forward pass of the first `rows` rows of `buffers`, as one replayable launch. Make it before the buffers are
    filled: a capture runs it on rows without a sequence.

    until "cache": keys and values are written, no more (prefill). "hidden": buffers.hidden is made as well. "token":
    a token is drawn for each row into buffers.ids, with buffers.numbers and `support`, and position and draw move on.
    With `SoftSampling` it is a soft token: its vector is in buffers.stream, its most probable token in buffers.ids.

    support  uint8 [rows, ceil(V/8)]: the tokens that the filters left, as in `sample_token`; None without filters
    replay   False: run once, not worth a recording
    """

    def __init__(
        self,
        model: Decoder,
        cache: PagedCache,
        buffers: Buffers,
        rows: int,
        until: Until,
        sampling: Sampling | SoftSampling | None = None,
        seed: int = 0,
        replay: bool = True,
    ) -> None:
        self.model, self.cache, self.buffers, self.rows, self.until = model, cache, buffers, rows, until
        self.sampling, self.seed = sampling or Sampling(), seed
        self.rope = model.rope(min(model.config.max_positions, cache.table.shape[1] * PAGE))
        truncates = until == "token" and isinstance(self.sampling, Sampling) and self.sampling.truncates
        self.support = buffers.support(rows) if truncates else None
        with torch.no_grad():
            self._run: Callable[[], None] = self._once
            if replay:
                buffers.clear_from(0)  # a recording runs or checks its first rows, and older ones need not fit
                self._run = self._capture() if model.device.type == "cuda" else self._record()

    @torch.no_grad()
    def run(self) -> None:
        self._run()

    def _once(self) -> None:
        self._kernels()
        self._advance()

    def _record(self) -> Callable[[], None]:
        if use_reference():
            return self._once
        program = _C.Program()
        program.begin()
        try:
            self._kernels()
        finally:
            program.end()

        def run() -> None:
            program.run()
            self._advance()

        return run

    def _capture(self) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.model.device):  # a capture takes a stream of the current device
            here, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    self._once()
            here.wait_stream(side)
            with torch.cuda.graph(graph):
                self._once()
        return graph.replay

    def _kernels(self) -> None:
        """Ops of this package alone, on the buffers: what a Program can record."""
        c, b, r = self.model.config, self.buffers, self.rows
        x, branch, h = b.stream[:r], b.branch[:r], b.hidden[:r]
        attention, mamba = itertools.count(), itertools.count()  # the place of a layer among its kind, in the cache
        for i, layer in enumerate(self.model.blocks):
            if i == 0:
                rms_norm_out(x, layer.mixer_norm, h, c.rms_norm_eps)
            else:
                rms_norm_out(branch, layer.mixer_norm, h, c.rms_norm_eps, residual=x, sum=x)
            if isinstance(layer, MambaLayer):
                mixed = self._scan(layer, h, next(mamba))
            else:
                mixed = self._attend(cast(AttentionLayer, layer), h, next(attention))
            if self.until == "cache" and i + 1 == c.num_layers:
                return
            linear_out(mixed, layer.out, branch)
            rms_norm_out(branch, layer.mlp_norm, h, c.rms_norm_eps, residual=x, sum=x)
            linear_out(h, layer.gate_up, b.gate_up[:r])
            swiglu_out(b.gate_up[:r], b.act[:r])
            linear_out(b.act[:r], layer.down, branch)
        rms_norm_out(branch, self.model.norm, h, c.rms_norm_eps, residual=x, sum=x)
        if self.until == "token":
            for start in range(0, r, b.head_rows):
                self._draw(slice(start, min(r, start + b.head_rows)))

    def _attend(self, layer: AttentionLayer, h: Tensor, place: int) -> Tensor:
        c, b, r = self.model.config, self.buffers, self.rows
        linear_out(h, layer.qkv, b.qkv[:r], layer.qkv_bias)
        paged_attention(
            b.qkv[:r], b.position[:r], b.slot[:r], self.cache.table, self.rope, self.cache.keys[place],
            self.cache.values[place], b.attended[:r], heads=c.num_heads, kv_heads=c.num_kv_heads,
            scale=c.head_dim**-0.5, q_norm=layer.q_norm, k_norm=layer.k_norm, eps=c.rms_norm_eps,
        )  # fmt: skip
        return b.attended[:r]

    def _scan(self, layer: MambaLayer, h: Tensor, place: int) -> Tensor:
        b, r = self.buffers, self.rows
        linear_out(h, layer.in_proj, b.proj[:r])
        linear_out(b.proj[:r, -layer.shape.dt_rank :], layer.dt_proj, b.dt[:r], layer.dt_bias)
        mamba_step(
            b.proj[:r], b.dt[:r], self.cache.conv[place], self.cache.ssm[place], b.state[:r], b.position[:r],
            layer.conv, layer.conv_bias, layer.a_log, layer.d, layer.dt_bias, out=b.scanned[:r],
        )  # fmt: skip
        return b.scanned[:r]

    def _draw(self, rows: slice) -> None:
        b, s, count = self.buffers, self.sampling, rows.stop - rows.start
        logits, numbers = b.logits[:count], b.numbers[4 * rows.start : 4 * rows.stop].view(4, count)
        linear_out(b.hidden[rows], self.model.head_weight, logits)
        if isinstance(s, SoftSampling):
            soft_embed(
                logits, self.model.embed, temperature=s.temperature, sigma=s.sigma, top_k=s.top_k,
                noise=(self.seed, b.uid[rows], b.draw[rows]),
                out=SoftOut(logits, b.mean(count), b.stream[rows], b.drawn[rows], numbers),
            )  # fmt: skip
            return
        sample_token(
            logits, self.seed, b.uid[rows], b.draw[rows], temperature=s.temperature, top_k=s.top_k, top_p=s.top_p,
            min_p=s.min_p, out=(b.drawn[rows], numbers), support=None if self.support is None else self.support[rows],
        )  # fmt: skip

    def _advance(self) -> None:
        if self.until == "token":
            b = self.buffers
            # -1 marks a row of nan logits, which its numbers report; the embedding must not see it
            torch.clamp(b.drawn[: self.rows], min=0, out=b.ids[: self.rows])
            if isinstance(self.sampling, Sampling):
                b.embed(self.model, self.rows)
            b.inputs[4:, : self.rows] += 1
