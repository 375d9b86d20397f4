"""One GRPO step of pymathrl against one of TRL's GRPOTrainer on the CPU, interleaved in one process.

Both start from the same random Qwen2 (4 heads, 2 key/value heads, MLP 2d, untied head, fp32, seed 0; one character per
token) and do the same step: 4-token prompts "x+y=", 8 samples each, exactly R new tokens at temperature 1, reward 1
when the text starts with the right sum, group-normalised advantages, the clipped loss without a KL term, one AdamW
update (1e-4) with the gradient norm clipped at 1. No gradient checkpointing; one batch per update.

First both compute loss, advantages and gradients of one and the same batch, drawn with old log-probs off the policy so
that the clip decides; a case that differs by more than 1e-5 is not timed. Then one step of each in turn, the first
dropped. TRL's time is that between its on_step_begin and on_step_end: fetching the prompts is not counted.

    ours        every row takes part in the update, as in TRL: the figure to compare
    ours, idle  rows of groups with equal rewards are left out of the update, pymathrl's own default; their gradient is
                exactly 0, and a random model has many

Beside the ratio stands the share of the GEMM ceiling: arithmetic that the step needs (prompts prefilled once per group,
no recomputation) over the time, over the best fp32 matrix product timed between the same steps. "ours, idle" is charged
the arithmetic of all rows too, so its share can pass 100 %.

    python bench/vs_trl.py [--cases A B C D E] [--steps N] [--threads 2] [--quick]

One line per case for its check, one per contestant, and a JSON object last.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import _commit, quiet
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from pymathrl.advantage import advantage
from pymathrl.algos import REGISTRY, LossSpec
from pymathrl.batch import ROLE_PROMPT, ROLE_SAMPLED, STOP_LENGTH, Graded, Rollout
from pymathrl.config import Run, TrainConfig
from pymathrl.context import Context, Position
from pymathrl.devices import processor
from pymathrl.learner import Learner
from pymathrl.log import StageTimer
from pymathrl.loss import minibatch_loss
from pymathrl.models import Policy, load
from pymathrl.models.config import tensor_specs
from pymathrl.tasks import Grade, Problem

TOLERANCE = 1e-5  # relative, of loss, advantages and gradients between the two
PROMPT_TOKENS = 4  # "x+y="
GROUP = 8  # samples per prompt
TOKEN_BUDGET = 16384  # tokens of a forward pass: every case fits one, as in TRL
GEMM_SIZE = 1024
WANTED = "trl==1.16.0 transformers==5.23.0"


@dataclass(frozen=True)
class Case:
    """d: width; layers; vocab; new: new tokens per completion; batch: completions; steps: timed by default."""

    d: int
    layers: int
    vocab: int
    new: int
    batch: int = 64
    steps: int = 5

    @property
    def label(self) -> str:
        return f"d{self.d} L{self.layers} V{self.vocab} R{self.new} B{self.batch}"


CASES = {
    "A": Case(64, 2, 128, 32, steps=30),
    "B": Case(64, 2, 128, 128, steps=12),
    "C": Case(256, 4, 4096, 64),
    "D": Case(256, 4, 32000, 64),
    "E": Case(512, 8, 4096, 64, batch=32),
}
QUICK = Case(64, 2, 128, 8)


@dataclass(frozen=True)
class Sums:
    """The task: one-digit sums, reward 1 when the response starts with the right one."""

    name: str = "sums"

    def train(self, index: int, seed: int) -> Problem:
        draws = random.Random(f"{seed}/{index}")
        x, y = draws.randrange(10), draws.randrange(10)
        return Problem(index, f"{x}+{y}=", str(x + y))

    def test(self, n: int | None = None) -> list[Problem]:
        return [self.train(index, seed=-1) for index in range(n or 100)]

    def prompt(self, problem: Problem, style: str) -> str:
        return problem.question

    def grade(self, problem: Problem, response: str) -> Grade:
        right = response.startswith(problem.answer)
        return Grade(float(right), right, None, None, "correct" if right else "another start")

    def solution(self, problem: Problem, rng: random.Random) -> str:
        return problem.answer


def characters(vocab: int) -> list[str]:
    """`vocab` distinct characters, printable ASCII first; surrogates, which are no characters, left out."""
    codes = (code for code in range(0x20, 0x110000) if not 0x7F <= code < 0xA1 and not 0xD800 <= code < 0xE000)
    return [chr(next(codes)) for _ in range(vocab)]


def backend(vocab: int) -> Backend:
    """One token per character. No special token: whatever is sampled is text."""
    built = Backend(models.WordLevel({char: i for i, char in enumerate(characters(vocab))}))
    built.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    built.decoder = decoders.Fuse()
    return built


class Ours:
    """The six stages of `pymathrl.train` on one policy, without its log and files."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        policy = replace(load(folder), eos_ids=(case.vocab,))  # an id that no row of the head can draw
        algo = REGISTRY["grpo"]
        config = TrainConfig(
            prompts_per_step=case.batch // GROUP, samples_per_prompt=GROUP, max_new_tokens=case.new,
            max_prompt_tokens=16, minibatches=1, tokens_per_microbatch=TOKEN_BUDGET, lr=1e-4, weight_decay=0.0,
            max_grad_norm=1.0,
        )  # fmt: skip
        run = Run(algo, config, algo.config(adv_eps=1e-4), {})  # TRL's epsilon
        self.ctx = Context(run, Learner(policy, config, updates=1), Sums(), Position())
        self.spec = replace(algo.loss(run.own), idle_when_zero=False)
        self.spec_idle = replace(self.spec, idle_when_zero=True)
        self.timer = StageTimer()

    @property
    def policy(self) -> Policy:
        return self.ctx.policy

    def step(self, spec: LossSpec) -> None:
        ctx, timer = self.ctx, self.timer
        with timer("prompt"):
            prompts = ctx.draw(ctx.train.prompts_per_step)
        with timer("rollout"):
            rollout = ctx.generate(prompts)
        with timer("verify"):
            graded = ctx.verify(rollout, prompts.problems)
        with timer("advantage"):
            batch = advantage(ctx, graded)
        ctx.learner.update(batch, spec, timer=timer)
        if rollout.response_lengths.tolist() != [self.case.new] * self.case.batch:
            raise AssertionError(f"ours: expected {self.case.new} new tokens in every row")


class Reward:
    """TRL's reward function: the protocol's, or fixed values while the two are compared."""

    __name__ = "starts_with_sum"  # TRL names its metrics by it

    def __init__(self, new: int) -> None:
        self.new = new
        self.fixed: list[float] | None = None

    def __call__(
        self, completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any
    ) -> list[float]:
        if any(len(ids) != self.new for ids in completion_ids):
            raise AssertionError(f"TRL: expected {self.new} new tokens in every row")
        if self.fixed is not None:
            return self.fixed
        return [float(text.startswith(right)) for text, right in zip(completions, answer, strict=True)]


def build(case: Case, folder: Path) -> Any:
    """The random Qwen2, saved into `folder` with its tokenizer; returned as transformers' model."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=case.vocab, hidden_size=case.d, intermediate_size=2 * case.d, num_hidden_layers=case.layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=PROMPT_TOKENS + case.new,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=0, pad_token_id=None, dtype="float32",
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).float()
    model.save_pretrained(folder)
    backend(case.vocab).save(str(folder / "tokenizer.json"))
    return model


def trainer_for(case: Case, model: Any, steps: int, folder: Path) -> tuple[Any, Reward]:
    """TRL's trainer for the same step, with nothing on that costs time: no log, no file, no evaluation, no worker."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend(case.vocab), clean_up_tokenization_spaces=False)
    # the end token gets the id after the vocabulary: the model cannot draw it, so every completion has R tokens
    tokenizer.add_special_tokens({"eos_token": "<end>", "pad_token": "<end>"})
    if tokenizer.eos_token_id != case.vocab:
        raise AssertionError(f"end token: expected id {case.vocab}, got {tokenizer.eos_token_id}")
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    config = GRPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, seed=0, max_steps=steps,
        per_device_train_batch_size=case.batch, gradient_accumulation_steps=1, num_generations=GROUP, num_iterations=1,
        max_completion_length=case.new, temperature=1.0, beta=0.0, epsilon=0.2, loss_type="grpo",
        scale_rewards="group", learning_rate=1e-4, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
        gradient_checkpointing=False, dataloader_num_workers=0, dataloader_pin_memory=False, logging_strategy="no",
        save_strategy="no", eval_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    problems = [Sums().train(index, seed=0) for index in range(64 * case.batch // GROUP)]
    data = Dataset.from_list([{"prompt": p.question, "answer": p.answer} for p in problems])
    reward = Reward(case.new)
    trainer = GRPOTrainer(model=model, reward_funcs=reward, args=config, train_dataset=data, processing_class=tokenizer)
    return trainer, reward


@dataclass(frozen=True)
class Agreement:
    """Relative differences of ours to TRL's on one batch: loss, advantages (L2), all gradients together (L2), and the
    worst single tensor's gradient (L2)."""

    loss_ours: float
    loss_trl: float
    loss: float
    advantage: float
    gradient: float
    worst: float
    worst_name: str

    @property
    def ok(self) -> bool:
        return all(error <= TOLERANCE for error in (self.loss, self.advantage, self.gradient))  # False for nan


def compare(trainer: Any, reward: Reward, ours: Ours, spec: LossSpec | None = None) -> Agreement:
    """Both losses and gradients of completions that TRL sampled. Old log-probs are 0.3 N(0,1) off the policy's, so that
    about half of the ratios are outside the clip range; rewards are coin flips, one group's are all equal."""
    case, model = ours.case, trainer.model
    spec = ours.spec if spec is None else spec
    generator = torch.Generator().manual_seed(1)
    rewards = (torch.rand(case.batch, generator=generator) < 0.5).float()
    rewards[:GROUP] = 1.0
    rows = [row for i in range(case.batch // GROUP) for row in [trainer.train_dataset[i]] * GROUP]
    model.train()
    trainer.current_gradient_accumulation_steps = 1  # set by the training loop, which has not run yet
    reward.fixed = rewards.tolist()
    inputs = trainer._generate_and_score_completions(rows)
    reward.fixed = None
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    with torch.no_grad():
        logp, _, _ = trainer._get_per_token_logps_and_entropies(model, ids, torch.ones_like(ids), case.new)
    old = logp + 0.3 * torch.randn(logp.shape, generator=generator)
    loss = trainer.compute_loss(model, inputs | {"old_per_token_logps": old})
    loss.backward()

    grades = [Grade(float(r), bool(r > 0), None, None, "by hand") for r in rewards]
    problems = [ours.ctx.task.train(i, 0) for i in range(case.batch // GROUP)]
    graded = Graded(packed(ids, old), problems, rewards, rewards > 0, grades, [""] * case.batch)
    batch = advantage(ours.ctx, graded)
    report = minibatch_loss(
        ours.policy.model, batch, torch.arange(case.batch), spec, temperature=1.0, token_budget=TOKEN_BUDGET,
        max_new_tokens=case.new,
    )  # fmt: skip
    mine, theirs = gradients(ours.policy), dict(model.named_parameters())
    pairs = {name: (grad.double(), theirs[name].grad.double()) for name, grad in mine.items()}
    if set(theirs) != set(pairs):
        raise AssertionError(f"parameters differ: {sorted(set(theirs) ^ set(pairs))}")
    errors = {name: float((a - b).norm() / b.norm()) for name, (a, b) in pairs.items()}
    worst = max(errors, key=errors.__getitem__)
    norm = math.sqrt(sum(float(b.norm()) ** 2 for _, b in pairs.values()))
    gap = math.sqrt(sum(float((a - b).norm()) ** 2 for a, b in pairs.values()))
    mine_a = batch.advantage.view(case.batch, -1)[:, -1].double()
    theirs_a = inputs["advantages"].double()
    model.zero_grad(set_to_none=True)
    ours.policy.model.zero_grad(set_to_none=True)
    return Agreement(
        float(report.loss), float(loss), abs(float(report.loss) - float(loss)) / abs(float(loss)),
        float((mine_a - theirs_a).norm() / theirs_a.norm()), gap / norm, errors[worst], worst,
    )  # fmt: skip


def packed(ids: torch.Tensor, old: torch.Tensor) -> Rollout:
    """ids [B,S] and the old log-probs [B,R] of its last R columns as a rollout, groups in order."""
    rows, width = ids.shape
    role = torch.full((rows, width), ROLE_PROMPT, dtype=torch.int8)
    role[:, PROMPT_TOKENS:] = ROLE_SAMPLED
    logp = torch.zeros(rows, width)
    logp[:, PROMPT_TOKENS:] = old
    zeros = torch.zeros(rows * width)
    rollout = Rollout(
        ids=ids.flatten(), role=role.flatten(), logp=logp.flatten(), mean_logp=zeros, entropy=zeros,
        offsets=torch.arange(rows + 1) * width, prompt_len=torch.full((rows,), PROMPT_TOKENS),
        group=torch.arange(rows) // GROUP, uid=torch.arange(rows),
        stop=torch.full((rows,), STOP_LENGTH, dtype=torch.int8),
    )  # fmt: skip
    rollout.validate()
    return rollout


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    """The gradients under their checkpoint names."""
    params = policy.model.named_parameters()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in params}
    return {spec.name: spec.view(grads) for spec in tensor_specs(policy.config)}


def step_flops(case: Case) -> float:
    """Floating-point operations that one step needs: matrix products and attention, a backward pass as two forwards.

    Generation scores R tokens of each row and feeds R-1 of them, the prompts once per group; the update feeds all but
    the last token of each row.
    """
    d, new, rows = case.d, case.new, case.batch
    linear = case.layers * (2 * d * d + 2 * d * (d // 2) + 3 * d * 2 * d)  # q and out, k and v at 2 of 4 heads, MLP

    def feed(first: int, last: int) -> float:
        """Tokens at positions first..last-1 of one row: each sees itself and all before it."""
        seen = (last * (last + 1) - first * (first + 1)) / 2
        return (last - first) * 2.0 * linear + case.layers * 4.0 * d * seen

    head = 2.0 * d * case.vocab * new
    end = PROMPT_TOKENS + new - 1
    generation = rows / GROUP * feed(0, PROMPT_TOKENS) + rows * (feed(PROMPT_TOKENS, end) + head)
    return generation + 3 * rows * (feed(0, end) + head)


def seconds(job: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    job()
    return time.perf_counter() - begin


def run_case(name: str, case: Case, steps: int) -> dict[str, Any]:
    """Check, time and print one case; returns its JSON object. Raises SystemExit where the two do not agree."""
    from transformers import PrinterCallback, TrainerCallback

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = build(case, folder)
        ours = Ours(case, folder)
        trainer, reward = trainer_for(case, model, steps + 1, folder)
        parameters = sum(p.numel() for p in model.parameters())
        agreement = compare(trainer, reward, ours)
        print(
            f"{name} {case.label} {parameters / 1e6:.2f}M | loss ours {agreement.loss_ours:.8f}, TRL "
            f"{agreement.loss_trl:.8f}: rel. {agreement.loss:.1e} | advantages {agreement.advantage:.1e} | gradients "
            f"{agreement.gradient:.1e} (worst tensor {agreement.worst:.1e}, {agreement.worst_name})",
            flush=True,
        )
        if not agreement.ok:
            raise SystemExit(f"error: case {name}: ours and TRL differ by more than {TOLERANCE:.0e}; not timed")
        times: dict[str, list[float]] = {"trl": [], "ours": [], "idle": [], "gemm": []}
        stages: list[dict[str, float]] = []
        square = torch.randn(2, GEMM_SIZE, GEMM_SIZE)
        product = torch.empty(GEMM_SIZE, GEMM_SIZE)

        class Interleave(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                self.begin = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                times["trl"].append(time.perf_counter() - self.begin)
                times["ours"].append(seconds(lambda: ours.step(ours.spec)))
                stages.append(ours.timer.pop())
                times["idle"].append(seconds(lambda: ours.step(ours.spec_idle)))
                ours.timer.pop()
                times["gemm"].append(seconds(lambda: torch.mm(square[0], square[1], out=product)))

        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Interleave())
        trainer.train()
    if len(times["trl"]) != steps + 1:
        raise AssertionError(f"TRL: expected {steps + 1} steps, got {len(times['trl'])}")
    times = {who: samples[1:] for who, samples in times.items()}
    ceiling = 2 * GEMM_SIZE**3 / min(times["gemm"])
    flops, tokens = step_flops(case), case.batch * case.new
    row: dict[str, Any] = {
        "case": name, "shape": case.label, "parameters": parameters, "steps": steps, "flop": flops,
        "gemm_gflop_s": ceiling / 1e9, "loss_error": agreement.loss, "advantage_error": agreement.advantage,
        "gradient_error": agreement.gradient,
    }  # fmt: skip
    for who in ("trl", "ours", "idle"):
        median, best = statistics.median(times[who]), min(times[who])
        row |= {
            f"{who}_s": median, f"{who}_best_s": best, f"{who}_tokens_s": tokens / median,
            f"{who}_frac_gemm": flops / median / ceiling,
        }  # fmt: skip
    for who in ("ours", "idle"):
        row[f"{who}_x"], row[f"{who}_best_x"] = row["trl_s"] / row[f"{who}_s"], row["trl_best_s"] / row[f"{who}_best_s"]
    shares = ("rollout", "verify", "loss", "optim")
    row |= {f"ours_{name}_s": statistics.median(s[f"time/{name}"] for s in stages[1:]) for name in shares}
    row = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
    for who, label in (("trl", "TRL"), ("ours", "ours"), ("idle", "ours, idle rows left out")):
        ratio = f" | {row[f'{who}_x']:.2f}x (best {row[f'{who}_best_x']:.2f}x)" if who != "trl" else ""
        print(
            f"  {label:<24} {row[f'{who}_s']:.4f} s/step median, {row[f'{who}_best_s']:.4f} best of {steps} | "
            f"{row[f'{who}_tokens_s']:,.0f} tokens/s | {100 * row[f'{who}_frac_gemm']:.1f} % of GEMM "
            f"({row['gemm_gflop_s']:.0f} GFLOP/s){ratio}"
        )
    print("  ours by stage: " + ", ".join(f"{name} {row[f'ours_{name}_s']:.4f} s" for name in shares), flush=True)
    return row


def versions() -> dict[str, str]:
    """Versions of what is compared; exits with what to install where a package is missing."""
    try:
        import datasets
        import transformers
        import trl
    except ImportError as error:
        raise SystemExit(f"error: {error.name or error} is not installed; pip install {WANTED} datasets") from None
    transformers.utils.logging.disable_progress_bar()
    return {
        "trl": trl.__version__, "transformers": transformers.__version__, "datasets": datasets.__version__,
        "torch": torch.__version__, "python": platform.python_version(), "commit": _commit(),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["A", "B", "C"], help="[A B C]; D takes minutes")
    parser.add_argument("--steps", type=int, help="timed steps of each, at least 5 [A 30, B 12, else 5]")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of both [2]")
    parser.add_argument("--quick", action="store_true", help="case A with 8 new tokens, 5 steps: does it work at all")
    args = parser.parse_args()
    if args.steps is not None and args.steps < 5:
        parser.error(f"--steps must be at least 5, got {args.steps}")
    quiet()
    found = versions()
    torch.set_num_threads(args.threads)
    print(f"{processor()}, {args.threads} threads | " + ", ".join(f"{k} {v}" for k, v in found.items()), flush=True)
    cases = {"quick": QUICK} if args.quick else {name: CASES[name] for name in args.cases}
    rows = [run_case(name, case, args.steps or case.steps) for name, case in cases.items()]
    print(json.dumps({"bench": "vs_trl", "machine": processor(), "threads": args.threads, **found, "cases": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
