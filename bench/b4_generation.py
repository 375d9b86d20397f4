"""Generation at the shapes of nano-vllm's own benchmark: 256 requests of unlike lengths on a Qwen3-0.6B.

The model: 28 layers, width 1024, 16 heads and 8 key/value heads of 128, MLP 3072, vocabulary 151,936, tied, norms on q
and k; random weights of seed 0, made in memory; bf16 on a GPU, fp32 on a CPU. The requests come from Python's `random`
with seed 0: 256 prompts of randint(100, 1024) ids in randint(0, 10000), then 256 output lengths randint(100, 1024),
133,966 tokens in all. Temperature 0.6, no filter, ends ignored. A CPU takes the first --requests of them, with both
lengths of each multiplied by --scale.

    ours          one call of the engine: continuous batching
    transformers  generate in static batches of at most 64, requests of like output length together, prompts padded on
                  the left; a batch runs until its longest output is done, and only the tokens asked for count
    nano-vllm     one call, its defaults; on a GPU alone, and in a process of its own before the others, since it takes
                  90 % of the memory for its cache. After a short warm-up, once

First the log-probs that our sampler reports for a few short requests are compared with those of transformers for the
same tokens (of our own update pass, where transformers is not installed); nothing is timed where they differ by more
than 1e-4 (bf16: 3e-2) nats on average. Then ours and transformers in turn, after one untimed run of ours and a short
one of transformers; transformers, which takes many times as long on a GPU, --peer-repeats times only.

Beside tokens/s stands the fraction of the limit, see `limit_s` of vs_hf_generate.py: all requests side by side, memory
and matrix product at their measured best.

    python bench/b4_generation.py [--device cpu|cuda] [--requests N] [--scale F] [--repeats 5] [--quick]

One line per contestant, and a JSON object last.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from common import _commit, quiet
from vs_hf_generate import Ceilings, describe, limit_s, never_ends, place, seconds

from pymathrl.models import Decoder, ModelConfig, Policy, char_tokenizer, save
from pymathrl.models.load import state_tensors
from pymathrl.rollout import Engine, score

QWEN3_06B = ModelConfig(
    vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_layers=28, num_heads=16, num_kv_heads=8,
    head_dim=128, max_positions=4096, rope_theta=1e6, tie_embeddings=True, qk_norm=True, model_type="qwen3",
)  # fmt: skip
QUICK = replace(
    QWEN3_06B, vocab_size=10016, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=32,
)  # fmt: skip
REQUESTS, OUTPUT_TOKENS = 256, 133_966
TEMPERATURE = 0.6
STATIC_ROWS = 64  # of transformers: the cache of 256 rows, padded to the longest, would fill a GPU of 80 GB
CHECKED = 4  # requests whose log-probs are compared, of at most CHECKED_TOKENS new tokens
CHECKED_TOKENS = 16
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # nats, mean over tokens
Requests = tuple[list[list[int]], list[int]]  # prompts, output lengths


def requests(count: int = REQUESTS, scale: float = 1.0) -> Requests:
    """The first `count` requests, with both lengths of each multiplied by `scale` (1 token at the least)."""
    rng = random.Random(0)
    prompts = [[rng.randint(0, 10000) for _ in range(rng.randint(100, 1024))] for _ in range(REQUESTS)]
    new = [rng.randint(100, 1024) for _ in range(REQUESTS)]
    if sum(new) != OUTPUT_TOKENS:
        raise AssertionError(f"requests: expected {OUTPUT_TOKENS} output tokens, got {sum(new)}")
    short = lambda length: max(1, round(scale * length))
    return [p[: short(len(p))] for p in prompts[:count]], [short(n) for n in new[:count]]


def random_policy(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Policy:
    """Random weights; the tokenizer is never asked."""
    model = Decoder(config, seed=0, device=device, dtype=dtype)
    tokenizer = char_tokenizer()
    return Policy(model, tokenizer, config, (tokenizer.eos_id,), "plain")


def twin(policy: Policy) -> Any:
    """transformers' model with the same weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = policy.config.to_hf(policy.model.dtype)
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    with policy.device:
        model = AutoModelForCausalLM.from_config(config, dtype=policy.model.dtype).eval()
    left, extra = model.load_state_dict(state_tensors(policy.model), strict=False)
    if extra or set(left) - {"lm_head.weight"}:  # tied to the embedding
        raise AssertionError(f"transformers' tensors differ: it lacks {extra}, and ours lack {left}")
    never_ends(model)
    return model


def ours(engine: Engine, prompts: Sequence[Sequence[int]], new: Sequence[int]) -> Any:
    rollout = engine.generate(prompts, 1, new, temperature=TEMPERATURE, stop_ids=())
    if rollout.response_lengths.tolist() != list(new):
        raise AssertionError("ours: expected as many new tokens as were asked for")
    return rollout


@torch.inference_mode()
def static_batches(model: Any, prompts: Sequence[Sequence[int]], new: Sequence[int]) -> None:
    """transformers' generate over batches of requests of like output length, the longest first."""
    order = sorted(range(len(new)), key=lambda i: -new[i])
    for begin in range(0, len(order), STATIC_ROWS):
        part = order[begin : begin + STATIC_ROWS]
        width, steps = max(len(prompts[i]) for i in part), new[part[0]]
        ids = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i] for i in part], device=model.device)
        seen = torch.tensor(
            [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in part], device=model.device
        )
        out = model.generate(
            ids, attention_mask=seen, max_new_tokens=steps, min_new_tokens=steps, do_sample=True,
            temperature=TEMPERATURE, top_k=0, top_p=1.0,
        )  # fmt: skip
        if out.shape[1] != width + steps:
            raise AssertionError(f"transformers: expected {steps} new tokens, got {out.shape[1] - width}")


@torch.no_grad()
def gap(engine: Engine, model: Any | None, prompts: Sequence[Sequence[int]], new: Sequence[int]) -> float:
    """Mean absolute difference, in nats, of the sampler's log-probs to those of the same tokens under transformers'
    model, or, without one, in our update pass; over a few requests."""
    rollout = ours(engine, prompts[:CHECKED], [min(n, CHECKED_TOKENS) for n in new[:CHECKED]])
    if model is None:
        expected = score(engine.policy, rollout, TEMPERATURE)[0]
    else:
        expected = torch.zeros_like(rollout.logp)
        for begin, end in zip(rollout.offsets.tolist(), rollout.offsets.tolist()[1:], strict=False):
            ids = rollout.ids[begin:end]
            logp = torch.log_softmax(model(ids[None, :-1]).logits[0].float() / TEMPERATURE, -1)
            expected[begin + 1 : end] = logp.gather(1, ids[1:, None])[:, 0]
    sampled = rollout.sampled_mask
    return float((rollout.logp - expected)[sampled].abs().mean())


def nano_vllm_seconds(folder: str, prompts: list[list[int]], new: list[int]) -> float:
    """One run of nano-vllm on the checkpoint in `folder`. For a process of its own."""
    from nanovllm import LLM, SamplingParams

    llm = LLM(folder, enforce_eager=False, max_model_len=QWEN3_06B.max_positions)
    params = [SamplingParams(temperature=TEMPERATURE, ignore_eos=True, max_tokens=n) for n in new]
    llm.generate(prompts[:1], [SamplingParams(temperature=TEMPERATURE, ignore_eos=True, max_tokens=8)], use_tqdm=False)
    begin = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    taken = time.perf_counter() - begin
    if [len(output["token_ids"]) for output in outputs] != new:
        raise AssertionError("nano-vllm: expected as many new tokens as were asked for")
    return taken


def nano_vllm_in_child(config: ModelConfig, count: int, scale: float) -> float:
    with tempfile.TemporaryDirectory() as folder:
        save(random_policy(config, torch.device("cpu"), torch.bfloat16), folder)
        command = [
            sys.executable,
            str(Path(__file__)),
            "--nano-vllm",
            folder,
            "--requests",
            str(count),
            "--scale",
            str(scale),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: nano-vllm failed:\n{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def run(policy: Policy, model: Any | None, count: int, scale: float, repeats: int, peer_repeats: int) -> dict[str, Any]:
    """Check and time ours and transformers'; returns the JSON fields. Raises SystemExit where the check fails."""
    engine, device = Engine(policy, seed=0), policy.device
    prompts, new = requests(count, scale)
    difference, limit = gap(engine, model, prompts, new), TOLERANCE[policy.model.dtype]
    against = "our update pass" if model is None else "transformers"
    print(f"log-probs: mean difference to {against} {difference:.1e} nats", flush=True)
    if not difference <= limit:  # also refuses nan
        raise SystemExit(f"error: log-probs differ from those of {against} by more than {limit:.0e} nats; not timed")
    ceilings = Ceilings(device, policy.model.dtype)
    jobs: dict[str, Callable[[], Any]] = {"ours": lambda: ours(engine, prompts, new)}
    jobs["ours"]()
    if model is not None:
        jobs["hf"] = lambda: static_batches(model, prompts, new)
        static_batches(model, prompts[:STATIC_ROWS], [2] * len(prompts[:STATIC_ROWS]))
    times: dict[str, list[float]] = {who: [] for who in jobs}
    for repeat in range(repeats):
        for who, job in jobs.items():
            if who == "ours" or repeat < peer_repeats:
                times[who].append(seconds(job, device))
        ceilings.measure()
    tokens = sum(new)
    least = limit_s(
        policy.config, policy.model.embed.element_size(), [len(p) for p in prompts], new, ceilings.read_bytes_s,
        ceilings.gemm_flop_s,
    )  # fmt: skip
    row: dict[str, Any] = {
        "requests": len(new), "scale": scale, "prompt_tokens": sum(len(p) for p in prompts), "output_tokens": tokens,
        "checked_against": against, "logp_gap": difference, "read_gb_s": ceilings.read_bytes_s / 1e9,
        "gemm_gflop_s": ceilings.gemm_flop_s / 1e9, "limit_s": least, "preemptions": engine.preemptions,
    }  # fmt: skip
    for who, samples in times.items():
        median = statistics.median(samples)
        row |= {
            f"{who}_s": median, f"{who}_best_s": min(samples), f"{who}_repeats": len(samples),
            f"{who}_tokens_s": tokens / median, f"{who}_frac_limit": least / median,
        }  # fmt: skip
    return row


def report(row: dict[str, Any]) -> None:
    names = {"nano_vllm": "nano-vllm", "hf": "transformers"}
    ceilings = f"{row['read_gb_s']:.1f} GB/s, {row['gemm_gflop_s']:.0f} GFLOP/s"
    ratios = "".join(f" | {row[f'x_{peer}']:.2f}x {name}" for peer, name in names.items() if f"x_{peer}" in row)
    for who, label in (names | {"ours": "ours"}).items():
        if f"{who}_s" in row:
            print(
                f"  {label:<12} {row[f'{who}_tokens_s']:,.1f} tokens/s | {row[f'{who}_s']:.4g} s median, "
                f"{row[f'{who}_best_s']:.4g} best of {row[f'{who}_repeats']} | "
                f"{100 * row[f'{who}_frac_limit']:.0f} % of the limit ({ceilings}){ratios if who == 'ours' else ''}",
                flush=True,
            )


def found_version(module: str, package: str) -> str | None:
    """The version of an importable module, None where there is none."""
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    add("--requests", type=int, help="the first N of the 256 [GPU 256, CPU 4]")
    add("--scale", type=float, help="factor of prompt and output lengths [GPU 1, CPU 0.1]")
    add("--repeats", type=int, default=5, help="timed runs of ours, at least 5 [5]")
    add("--peer-repeats", type=int, help="timed runs of transformers [GPU 1, CPU as --repeats]")
    add("--threads", type=int, default=2, help="CPU threads of all [2]")
    add("--quick", action="store_true", help="a tiny model, 3 requests, lengths times 0.02: does it work at all")
    add("--nano-vllm", metavar="DIR", help="only print the seconds of one run of nano-vllm on this checkpoint")
    args = parser.parse_args()
    on_gpu = args.device != "cpu"
    count = args.requests or (REQUESTS if on_gpu else 4)
    scale = args.scale or (1.0 if on_gpu else 0.1)
    config = QWEN3_06B
    if args.quick:
        count, scale, config = 3, 0.02, QUICK
    peer_repeats = args.peer_repeats or (1 if on_gpu else args.repeats)
    if args.repeats < 5 or not 1 <= count <= REQUESTS or not 0 < scale <= 1 or peer_repeats < 1:
        parser.error(f"--repeats must be at least 5, --requests in 1..{REQUESTS}, --scale in 0..1, --peer-repeats >= 1")
    quiet()
    if args.nano_vllm:
        print(nano_vllm_seconds(args.nano_vllm, *requests(count, scale)))
        return 0
    torch.set_num_threads(args.threads)
    device, machine = place(args.device)
    found = {
        "torch": torch.__version__, "transformers": found_version("transformers", "transformers"),
        "nano_vllm": found_version("nanovllm", "nano-vllm"), "python": platform.python_version(), "commit": _commit(),
    }  # fmt: skip
    print(f"{machine} | " + ", ".join(f"{k} {v or 'not installed'}" for k, v in found.items()), flush=True)
    nano_s = None
    if found["nano_vllm"] is None or not on_gpu:
        print("nano-vllm: left out, " + ("it is not installed" if on_gpu else "it needs a GPU"), flush=True)
    else:
        nano_s = nano_vllm_in_child(config, count, scale)
    policy = random_policy(config, device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    model = twin(policy) if found["transformers"] else None
    if model is None:
        print("transformers: left out, it is not installed", flush=True)
    print(describe(policy), flush=True)
    row = run(policy, model, count, scale, args.repeats, peer_repeats)
    if nano_s is not None:
        row |= {"nano_vllm_s": nano_s, "nano_vllm_best_s": nano_s, "nano_vllm_repeats": 1}
        row |= {"nano_vllm_tokens_s": row["output_tokens"] / nano_s, "nano_vllm_frac_limit": row["limit_s"] / nano_s}
    row |= {f"x_{peer}": row[f"{peer}_s"] / row["ours_s"] for peer in ("hf", "nano_vllm") if f"{peer}_s" in row}
    row = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
    report(row)
    head = {"bench": "b4_generation", "machine": machine, "threads": args.threads, "model": describe(policy), **found}
    print(json.dumps({**head, **row}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
