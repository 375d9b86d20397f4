"""Generation by pymathrl's engine against transformers' `generate`, interleaved in one process, on one set of weights.

The model: the shapes of SmolLM2-135M (30 layers, width 576, 9 heads and 3 key/value heads of 64, MLP 1536, vocabulary
49,152, tied) with random weights of seed 0, made by transformers, or a checkpoint folder; fp32. The job: B prompts of
32 random ids, all of one length so that nothing is padded, and 128 new tokens for each, greedy, ends ignored.
transformers runs as it comes: sdpa attention and its dynamic cache.

First both generate, and their tokens are compared. Where a row differs, its first difference must be a tie: when
transformers scores the common text again, its logits of the two tokens must lie within 1e-3 standard deviations of all
logits there; else the batch is not timed. What follows a tie is another text and is not compared.

Then one run of each in turn, the first dropped. Beside the ratio stands the fraction of the limit: for the prompts and
then for each step the longer of two times, the weights and the keys and values that must be read over the measured read
bandwidth, and the floating-point operations over the measured matrix product, summed, over the time taken.

    python bench/vs_hf_generate.py [--model DIR] [--batches 1 16 64] [--tokens 128] [--repeats 5] [--quick]

One line per batch for its check, one per contestant, and a JSON object last.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import _commit, quiet
from torch import Tensor

from pymathrl import devices
from pymathrl.models import ModelConfig, Policy, char_tokenizer, load
from pymathrl.rollout import Engine

PROMPT_TOKENS = 32
# of the logits' standard deviation: both orders of two tokens this close are right. The fp32 logits of transformers are
# up to 4e-5 off their float64 values here, and half of all first and second tokens are more than 0.19 apart.
TIE = 1e-3
# Of random weights. With the usual 0.02 every text is soon one token again and again, whatever attention does; with
# 0.05 each of 40 tokens is another.
SPREAD = 0.05
READ_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # of the bandwidth's buffer: far larger than any cache
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
SMOLLM2_135M = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=2048, rope_theta=10000.0, rms_norm_eps=1e-5,
    tie_word_embeddings=True, initializer_range=SPREAD,
)  # fmt: skip
QUICK = SMOLLM2_135M | dict(
    vocab_size=512, hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=3,
    num_key_value_heads=1, initializer_range=2 * SPREAD,
)  # fmt: skip


class Ceilings:
    """What the device can do at best: bytes read per second, and floating-point operations of a matrix product."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self._rows = torch.ones(READ_BYTES[device.type] // 4 // 4096, 4096, device=device)
        self._column = torch.ones(4096, device=device)
        self._square = torch.randn(2, GEMM_SIZE[device.type], GEMM_SIZE[device.type], device=device).to(dtype)
        self._product = torch.empty_like(self._square[0])
        self.read_bytes_s = self.gemm_flop_s = 0.0
        self.measure()  # the first also loads code; the best of all counts

    def measure(self) -> None:
        for read in (self._rows.sum, lambda: torch.mv(self._rows, self._column)):
            self.read_bytes_s = max(self.read_bytes_s, self._rows.nbytes / seconds(read, self.device))
        product = lambda: torch.mm(self._square[0], self._square[1], out=self._product)
        self.gemm_flop_s = max(self.gemm_flop_s, 2 * len(self._product) ** 3 / seconds(product, self.device))


def seconds(job: Callable[[], Any], device: torch.device) -> float:
    devices.synchronize(device)
    begin = time.perf_counter()
    job()
    devices.synchronize(device)
    return time.perf_counter() - begin


def limit_s(
    config: ModelConfig, item_bytes: int, prompts: Sequence[int], new: Sequence[int], read_bytes_s: float,
    gemm_flop_s: float,
) -> float:  # fmt: skip
    """The least time in which prompts of so many tokens can be continued by so many new ones, all side by side.

    The prompts but for their last tokens go in one pass. Then each step feeds one token of every sequence that is not
    done, and scores the next; a token's query meets its own key and all before it. A pass reads the weights once, and
    the keys and values of all tokens it attends to; the rows of the embedding that are looked up are not counted.
    """
    c = config
    width = c.num_heads * c.head_dim
    matrices = c.num_layers * (2 * c.hidden_size * (width + c.num_kv_heads * c.head_dim)
                               + 3 * c.hidden_size * c.intermediate_size)  # fmt: skip
    head = c.hidden_size * c.vocab_size
    kv_bytes = 2 * c.num_layers * c.num_kv_heads * c.head_dim * item_bytes  # of one token

    def pass_s(rows: int, heads: int, pairs: float, cached: int) -> float:
        """rows fed, of which `heads` score a token; pairs of query and key in a layer; tokens read from the cache."""
        flops = 2.0 * rows * matrices + 2.0 * heads * head + 4.0 * c.num_layers * width * pairs
        read = item_bytes * (matrices + (head if heads else 0)) + kv_bytes * cached
        return max(flops / gemm_flop_s, read / read_bytes_s)

    fed = [p - 1 for p in prompts]
    total = pass_s(sum(fed), 0, sum(n * (n + 1) / 2 for n in fed), 0) if any(fed) else 0.0
    for step in range(max(new)):
        context = [p + step for p, n in zip(prompts, new, strict=True) if n > step]
        total += pass_s(len(context), len(context), sum(context), sum(context))
    return total


def build(shape: dict[str, Any], folder: Path) -> None:
    """A random Llama, saved into `folder` with a tokenizer, which is never asked."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**shape, bos_token_id=None, eos_token_id=0, pad_token_id=None, dtype="float32")
    char_tokenizer().save(folder, prompt_style="compact")
    LlamaForCausalLM(config).save_pretrained(folder)


def contestants(folder: Path, device: torch.device) -> tuple[Engine, Any]:
    """Ours and transformers' model, each with the weights of the folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    never_ends(model)
    return Engine(load(folder, device, torch.float32), seed=0), model


def never_ends(model: Any) -> None:
    """transformers' generate stops at no token, and cuts nothing off the distribution by a default of the folder."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0, bos_token_id=None)


def ours(engine: Engine, prompts: Sequence[Sequence[int]], new: int) -> Tensor:
    """int64 [B,new]: the greedy continuations of prompts of one length."""
    rollout = engine.generate(prompts, 1, new, temperature=0.0, stop_ids=())
    if rollout.response_lengths.tolist() != [new] * len(prompts):
        raise AssertionError(f"ours: expected {new} new tokens in every row")
    return rollout.ids.view(len(prompts), -1)[:, len(prompts[0]) :]


@torch.inference_mode()
def theirs(model: Any, prompts: Sequence[Sequence[int]], new: int) -> Tensor:
    """The same by transformers."""
    ids = torch.tensor(prompts, device=model.device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
    )
    if out.shape[1] != ids.shape[1] + new:
        raise AssertionError(f"transformers: expected {new} new tokens in every row, got {out.shape[1] - ids.shape[1]}")
    return out[:, ids.shape[1] :]


@dataclass(frozen=True)
class Agreement:
    """equal of rows hold the same tokens; distinct: different tokens in all rows, where 1 would prove nothing. Of the
    rows that differ the worst: its number, the first token that differs, and the gap between transformers' logits of
    its token and of ours there, in logits and in standard deviations of all logits there."""

    rows: int
    equal: int
    distinct: int
    row: int | None = None
    token: int | None = None
    gap: float = 0.0
    spreads: float = 0.0

    @property
    def ok(self) -> bool:
        return self.spreads <= TIE  # False for nan

    def __str__(self) -> str:
        text = f"greedy tokens equal in {self.equal} of {self.rows} rows ({self.distinct} distinct tokens)"
        if self.row is None:
            return text
        return (
            f"{text}; widest tie: row {self.row} differs first at new token {self.token}, where transformers' logits "
            f"are {self.gap:.1e} apart ({self.spreads:.1e} of their spread)"
        )


@torch.no_grad()
def compare(engine: Engine, model: Any, prompts: Sequence[Sequence[int]], new: int) -> Agreement:
    mine, peer = ours(engine, prompts, new), theirs(model, prompts, new)
    different = (mine != peer).any(1).nonzero()[:, 0].tolist()
    worst = Agreement(len(prompts), len(prompts) - len(different), peer.unique().numel())
    for row in different:
        token = int((mine[row] != peer[row]).int().argmax())
        text = torch.cat([torch.tensor(prompts[row], device=peer.device), peer[row, :token]])
        logits = model(text[None]).logits[0, -1].double()
        gap = float((logits[peer[row, token]] - logits[mine[row, token]]).abs())
        spreads = gap / float(logits.std())
        if worst.row is None or not spreads <= worst.spreads:  # nan is the worst
            worst = replace(worst, row=row, token=token, gap=gap, spreads=spreads)
    return worst


def run_batch(engine: Engine, model: Any, ceilings: Ceilings, rows: int, new: int, repeats: int) -> dict[str, Any]:
    """Check, time and print one batch; returns its JSON object. Raises SystemExit where the two do not agree."""
    policy = engine.policy
    rng = random.Random(rows)
    vocab = policy.config.vocab_size
    prompts = [[rng.randrange(vocab) for _ in range(PROMPT_TOKENS)] for _ in range(rows)]
    agreement = compare(engine, model, prompts, new)
    print(f"B={rows} | {agreement}", flush=True)
    if not agreement.ok:
        raise SystemExit(f"error: B={rows}: ours and transformers draw different tokens, and not by a tie; not timed")
    jobs = {"hf": lambda: theirs(model, prompts, new), "ours": lambda: ours(engine, prompts, new)}
    times: dict[str, list[float]] = {who: [] for who in jobs}
    for _ in range(repeats + 1):
        for who, job in jobs.items():
            times[who].append(seconds(job, policy.device))
        ceilings.measure()
    times = {who: samples[1:] for who, samples in times.items()}
    lengths = [PROMPT_TOKENS] * rows, [new] * rows
    shape = policy.config, policy.model.embed.element_size(), *lengths
    limit = limit_s(*shape, ceilings.read_bytes_s, ceilings.gemm_flop_s)
    row: dict[str, Any] = {
        "batch": rows, "prompt_tokens": PROMPT_TOKENS, "new_tokens": new, "repeats": repeats,
        "equal_rows": agreement.equal, "distinct_tokens": agreement.distinct,
        "first_different_token": agreement.token, "logit_gap": agreement.gap,
        "read_gb_s": ceilings.read_bytes_s / 1e9, "gemm_gflop_s": ceilings.gemm_flop_s / 1e9, "limit_s": limit,
        "limit_read_s": limit_s(*shape, ceilings.read_bytes_s, float("inf")),
        "limit_gemm_s": limit_s(*shape, float("inf"), ceilings.gemm_flop_s),
    }  # fmt: skip
    for who in jobs:
        median, best = statistics.median(times[who]), min(times[who])
        row |= {
            f"{who}_s": median, f"{who}_best_s": best, f"{who}_tokens_s": rows * new / median,
            f"{who}_frac_limit": limit / median,
        }  # fmt: skip
    row |= {"x": row["hf_s"] / row["ours_s"], "best_x": row["hf_best_s"] / row["ours_best_s"]}
    row = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
    for who, label in (("hf", "transformers"), ("ours", "ours")):
        ratio = f" | {row['x']:.2f}x (best {row['best_x']:.2f}x)" if who == "ours" else ""
        print(
            f"  {label:<12} {row[f'{who}_tokens_s']:,.1f} tokens/s | {row[f'{who}_s']:.4g} s median, "
            f"{row[f'{who}_best_s']:.4g} best of {repeats} | {100 * row[f'{who}_frac_limit']:.0f} % of the limit "
            f"({row['read_gb_s']:.1f} GB/s, {row['gemm_gflop_s']:.0f} GFLOP/s){ratio}",
            flush=True,
        )
    return row


def versions() -> dict[str, str]:
    """Versions of what is compared; exits with what to install where transformers is missing."""
    try:
        import transformers
    except ImportError as error:
        raise SystemExit(f"error: {error.name or error} is not installed; pip install transformers") from None
    transformers.utils.logging.disable_progress_bar()
    return {
        "transformers": transformers.__version__, "torch": torch.__version__, "python": platform.python_version(),
        "commit": _commit(),
    }  # fmt: skip


def place(name: str) -> tuple[torch.device, str]:
    """A device and what it is called."""
    device = devices.resolve(name)
    return device, devices.machine(device)


def describe(policy: Policy) -> str:
    c, count = policy.config, sum(p.numel() for p in policy.model.parameters())
    return (
        f"{c.model_type} {count / 1e6:.1f}M: {c.num_layers} layers, width {c.hidden_size}, "
        f"{c.num_heads}/{c.num_kv_heads} heads of {c.head_dim}, MLP {c.intermediate_size}, vocabulary {c.vocab_size}, "
        f"{str(policy.model.dtype).removeprefix('torch.')}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a checkpoint [random weights, SmolLM2-135M shapes]")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64], help="sequences side by side [1 16 64]")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each [128]")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each, at least 5 [5]")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N [cpu]")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of both [2]")
    parser.add_argument("--quick", action="store_true", help="a tiny model, batches of 1 and 3, 8 tokens: does it work")
    args = parser.parse_args()
    if args.repeats < 5 or args.tokens < 1 or min(args.batches) < 1:
        parser.error("--repeats must be at least 5, --tokens and --batches at least 1")
    quiet()
    found = versions()
    torch.set_num_threads(args.threads)
    device, machine = place(args.device)
    print(f"{machine} | " + ", ".join(f"{k} {v}" for k, v in found.items()), flush=True)
    if args.quick:
        args.batches, args.tokens = [1, 3], 8
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or Path(scratch)
        if args.model is None:
            build(QUICK if args.quick else SMOLLM2_135M, folder)
        engine, model = contestants(folder, device)
    print(describe(engine.policy), flush=True)
    ceilings = Ceilings(device, torch.float32)
    rows = [run_batch(engine, model, ceilings, batch, args.tokens, args.repeats) for batch in args.batches]
    head = {
        "bench": "vs_hf_generate", "machine": machine, "threads": args.threads, "model": describe(engine.policy),
        "weights": "random, seed 0" if args.model is None else args.model.name, **found,
    }  # fmt: skip
    print(json.dumps({**head, "cases": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
