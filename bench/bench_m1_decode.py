"""Decoding of a hybrid against a transformer of the same size, as texts grow: tokens/s, and what the bytes predict.

Both have the same width, layers, MLP and heads, random weights of seed 0; the hybrid's attention layers are about one
in four, spread evenly (M1, arXiv 2504.10449: 6 of 28), the others are Mamba layers. On a CPU a model of 6M weights, on
a GPU M1-3B beside Llama-3.2-3B. A batch of sequences from a prompt of 16 tokens, ends ignored, temperature 1, grows to
each of the lengths: the two models in turn, a stretch of CHUNK tokens each, so that a busy machine slows both.

A decode step of B sequences that hold L tokens moves, at the least,

    W + B (attention layers x 2KE s (L + 1) + Mamba layers x (2 (W-1) X 4 + 2 N I 4))       bytes

W: the weights once, s: bytes of an activation; keys and values are read, states read and written in fp32. Its limit is
t* = max(W / bandwidth, 2 P B / flop rate) + the rest / bandwidth: products and cache follow each other. Bandwidth and
flop rate are the best that were measured here, before, between and after. Printed for each length: tokens/s so far, the
time per token of the last stretch as a fraction of its limit, the ratio of the two models, and the ratio of the bytes
that both have moved so far.

First each model's sampler is compared with its own update pass for the same tokens, to the bit on a CPU; nothing is
timed where they differ.

    python bench/bench_m1_decode.py [--device cpu|cuda] [--batch 16] [--lengths 512,2048,8192] [--quick]

A line per model and length, and a JSON object last.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from b4_generation import random_policy
from common import _commit
from vs_hf_generate import Ceilings

from pymathrl import devices
from pymathrl.batch import ROLE_SAMPLED
from pymathrl.models import ModelConfig, Policy
from pymathrl.models.config import Mamba
from pymathrl.models.paged import PagedCache
from pymathrl.ops.attention import PAGE
from pymathrl.rollout import Engine, score

SMALL = ModelConfig(
    vocab_size=512, hidden_size=256, intermediate_size=704, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=32,
    max_positions=65536, tie_embeddings=True,
)  # fmt: skip
LLAMA_3B = ModelConfig(
    vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_layers=28, num_heads=24, num_kv_heads=8,
    head_dim=128, max_positions=131072, rope_theta=500000.0, rms_norm_eps=1e-5, tie_embeddings=True,
)  # fmt: skip
MODELS = {
    "cpu": (SMALL, Mamba(256, 128, attention_layers=(3, 7), dt_rank=16)),
    "cuda": (LLAMA_3B, Mamba(3072, 1024, attention_layers=(3, 8, 13, 18, 23, 27), dt_rank=192)),
}
PROMPT, CHUNK, CHECKED = 16, 128, 40  # tokens
TOLERANCE = {torch.float32: 0.0, torch.bfloat16: 5e-2}  # nats, the largest of the sampler against the update pass


@dataclass
class Contestant:
    """A model that grows its sequences. Bytes and seconds are sums over the steps so far."""

    name: str
    policy: Policy
    batch: int
    weights: int = 0  # bytes, read once a step
    kv: int = 0  # bytes, of one token
    state: int = 0  # bytes, moved a step for one sequence
    length: int = PROMPT
    seconds: float = 0.0
    bytes: float = 0.0
    last: tuple[float, float] = (0.0, 0.0)  # seconds and limit of the last stretch
    seqs: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        model = self.policy.model
        self.weights = sum(p.numel() * p.element_size() for p in model.parameters())  # tied: the table is the head
        self.kv = PagedCache.page_bytes(model) // PAGE
        self.state = 2 * PagedCache.state_bytes(model)
        self.engine = Engine(self.policy, seed=1, max_batch=self.batch)
        self.check()
        prompts = [[1 + (i + j) % 200 for j in range(PROMPT)] for i in range(self.batch)]
        self.seqs = self.engine.start(prompts, uids=range(self.batch))

    def check(self) -> None:
        rollout = self.engine.generate([[5, 6, 7], [9]], 2, CHECKED, stop_ids=())
        sampled = rollout.role == ROLE_SAMPLED
        gap = float((rollout.logp - score(self.policy, rollout, 1.0).logp)[sampled].abs().max())
        if not gap <= TOLERANCE[self.policy.model.dtype]:
            raise AssertionError(f"{self.name}: sampler and update pass differ by {gap:.1e} nats; not timed")

    def step_bytes(self, length: int) -> int:
        return self.weights + self.batch * (self.kv * (length + 1) + self.state)

    def limit_s(self, length: int, ceilings: Ceilings) -> float:
        cache = self.step_bytes(length) - self.weights
        parameters = sum(p.numel() for p in self.policy.model.parameters())
        products = max(self.weights / ceilings.read_bytes_s, 2 * parameters * self.batch / ceilings.gemm_flop_s)
        return products + cache / ceilings.read_bytes_s

    def grow(self, tokens: int, ceilings: Ceilings) -> None:
        device = self.policy.device
        devices.synchronize(device)
        begin = time.perf_counter()
        self.engine.segment(self.seqs, tokens, stop_ids=())
        devices.synchronize(device)
        took = time.perf_counter() - begin
        steps = range(self.length, self.length + tokens)
        self.seconds += took
        self.bytes += sum(map(self.step_bytes, steps))
        self.last = took, sum(self.limit_s(length, ceilings) for length in steps)
        self.length += tokens

    def line(self) -> dict[str, Any]:
        made, (took, limit) = self.length - PROMPT, self.last
        return {
            "model": self.name, "tokens": made, "batch": self.batch, "tokens_s": self.batch * made / self.seconds,
            "fraction_of_limit": limit / took, "step_bytes": self.step_bytes(self.length), "weights": self.weights,
            "kv_bytes": self.batch * self.kv * self.length, "state_bytes": self.batch * self.state,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=16, help="sequences side by side")
    parser.add_argument("--lengths", default="512,2048,8192", help="new tokens at which figures are printed, rising")
    parser.add_argument("--quick", action="store_true", help="lengths 64 and 128")
    args = parser.parse_args()
    lengths = [64, 128] if args.quick else [int(n) for n in args.lengths.split(",")]
    if args.batch < 1 or lengths != sorted(set(lengths)) or lengths[0] < 1:
        parser.error(f"--batch must be at least 1 and --lengths rising numbers, got {args.batch} and {args.lengths}")
    device = torch.device(args.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    config, mamba = MODELS[device.type]
    ceilings = Ceilings(device, dtype)
    both = [
        Contestant("transformer", random_policy(config, device, dtype), args.batch),
        Contestant("hybrid", random_policy(replace(config, mamba=mamba), device, dtype), args.batch),
    ]
    graph = "CUDA graph" if device.type == "cuda" else "recorded program"
    print(f"{config.num_layers} layers, attention in the hybrid: {list(mamba.attention_layers)}; states fp32; {graph}")
    for one in both:  # the first stretch records the passes and makes room
        one.grow(min(CHUNK, lengths[0]) // 2, ceilings)
        one.seconds = one.bytes = 0.0
    start = both[0].length
    rows: list[dict[str, Any]] = []
    for length in lengths:
        while both[0].length - PROMPT < length:
            for one in both:
                one.grow(min(CHUNK, length - (one.length - PROMPT)), ceilings)
        ceilings.measure()
        lines = [one.line() for one in both]
        timed = length - (start - PROMPT)
        for row in lines:
            row["tokens_s"] = row["tokens_s"] * timed / length  # the first stretch was not timed
        ratio = both[0].seconds / both[1].seconds
        predicted = both[0].bytes / both[1].bytes
        for row in lines:
            print(
                f"{row['model']:<12} {length:>6} new tokens, batch {args.batch}: {row['tokens_s']:8.0f} tokens/s, the "
                f"last stretch at {row['fraction_of_limit']:.0%} of its limit; a step moves "
                f"{row['step_bytes'] / 1e6:.1f} MB: weights {row['weights'] / 1e6:.1f}, keys and values "
                f"{row['kv_bytes'] / 1e6:.1f}, states {row['state_bytes'] / 1e6:.1f}"
            )
        share = ratio / predicted
        print(f"{length:>19}: the hybrid is {ratio:.2f}x as fast, {share:.2f} of the {predicted:.2f}x of the bytes")
        rows += [row | {"ratio": ratio, "bytes_ratio": predicted} for row in lines]
    machine = torch.cuda.get_device_name() if device.type == "cuda" else devices.processor()
    result = {
        "bench": "m1_decode", "machine": machine, "threads": torch.get_num_threads(), "commit": _commit(),
        "torch": torch.__version__, "dtype": str(dtype), "read_gb_s": ceilings.read_bytes_s / 1e9,
        "gemm_gflop_s": ceilings.gemm_flop_s / 1e9, "rows": rows,
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
