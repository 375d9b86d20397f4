"""python -m pymathrl.train --algo NAME: generation, verification and update in one process, on one copy of the weights.

A step is six stages, and each is one file: prompt, rollout, verify, advantage, loss, optim. This file only hands the
batch from one to the next, evaluates, and keeps what a person needs: progress, files, checkpoints.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pymathrl import devices
from pymathrl.advantage import advantage
from pymathrl.batch import STOP_LENGTH, Batch, Rollout
from pymathrl.checkpoint import (
    clean_checkpoints,
    explain_os_errors,
    latest_checkpoint,
    load_state,
    save_checkpoint,
    truncate_metrics,
    write_atomic,
)
from pymathrl.config import Run, TrainConfig, parse_train, write_toml
from pymathrl.errors import UserError
from pymathrl.eval import evaluate, sample_uids
from pymathrl.log import RunLog, StageTimer
from pymathrl.loss import WORKSPACE_BYTES, LossReport, minibatch_loss
from pymathrl.metrics import completion_stats
from pymathrl.models import ModelConfig, Policy, load, save
from pymathrl.models.paged import Buffers, PagedCache
from pymathrl.ops._call import WHY
from pymathrl.ops.attention import PAGE, fused_attention
from pymathrl.ops.policy_loss import STATS, merge_stats
from pymathrl.optim import Optimizer, StepReport
from pymathrl.prompt import Prompts, draw
from pymathrl.report import plot_run
from pymathrl.rollout import Engine, score
from pymathrl.rollout.engine import PREFILL_ROWS
from pymathrl.tasks import Task, load_task
from pymathrl.verify import Verdicts, verify

EVAL_KS = (1, 8)
# Of the trainer state in a checkpoint. 2: q and k rows in the checkpoint's own order, and master weights; the moments
# of format 1, which bore no number, belong to rows in another order.
STATE_FORMAT = 2
MAX_SKIPS = 10  # optimizer steps skipped in a row after which a run gives up


@dataclass
class State:
    """All that a resumed run needs besides the weights and the optimizer; plain data, saved with each checkpoint.

    Random numbers need no state: every draw is a pure function of (seed, problem, sample, position).
    """

    step: int = 0  # steps done
    cursor: int = 0  # next element of the task's stream
    wall_s: float = 0.0  # of all sessions of the run
    tokens: int = 0  # generated
    skipped: int = 0  # optimizer steps left out because of a nan or an infinity
    skips_in_a_row: int = 0
    before: dict[str, float] = field(default_factory=dict)  # the evaluation before training


class Stop:
    """Ctrl-C or SIGTERM once: finish the step, save, exit. Twice: exit at once; the last checkpoint stays."""

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        os.write(
            2, b"\nstopping at the next step's end; once more to stop at once\n"
        )  # print may not be re-entered here


def train(run: Run) -> int:
    """Runs the command line `run`. Returns the exit code: 0, or 130 when it was interrupted and saved."""
    config = run.train
    device = devices.resolve(config.device)
    threads = devices.set_threads(config.threads)
    task = load_task(config.task, **run.task_options)
    if config.steps:
        task.train(0, config.seed)  # a task with nothing to train on fails here: nothing was loaded or written yet
    if run.resume is not None and not run.dry_run:
        clean_checkpoints(run.resume)  # first: it puts back a checkpoint whose replacement was cut short
    checkpoint = None if run.resume is None else newest_checkpoint(run.resume)
    policy = load(str(checkpoint or config.model), device, devices.weight_dtype(config.dtype, device))
    config = fit_context(config, policy)
    run = replace(run, train=config)
    if config.prompt_style != "auto":
        policy = replace(policy, prompt_style=config.prompt_style)
    policy.model.train()
    memory = plan_memory(config, policy, device)  # before the optimizer makes masters, which are part of the plan
    optimizer = Optimizer(policy.model, config, config.steps * config.epochs * config.minibatches)
    plan = describe(run, policy, device, threads, memory)
    if run.dry_run:
        print("\n".join(plan))
        return 0
    state = State()
    if run.resume is None:
        out = new_run_dir(config.out, f"{run.algo.name}-{Path(config.task).stem}-seed{config.seed}")
    else:
        out = run.resume
        if checkpoint is not None:
            saved = load_state(checkpoint)
            if saved.get("format") != STATE_FORMAT:
                raise UserError(
                    f"--resume {out}: saved by an earlier version of pymathrl; start a new run from its weights: "
                    f"--model {checkpoint}"
                )
            optimizer.load_state_dict(saved["optimizer"])
            state = State(**saved["state"])
        if state.step >= config.steps and (out / "summary.json").exists():
            print(f"{out}: all {state.step} steps are done; give a larger --steps to go on")
            return 0
        truncate_metrics(out, state.step if checkpoint is not None else -1)
    with explain_os_errors("write the run's options", out / "config.toml"):
        write_atomic(out / "config.toml", write_toml(run.values()).encode())

    title = f"{run.algo.name} on {config.task}, seed {config.seed}"
    with Stop() as stop, RunLog(out, config.steps, start_step=state.step, title=title) as log:
        for line in plan:
            log.note(line)
        if run.resume is not None:
            log.note(f"resumed from {checkpoint}" if checkpoint else "no checkpoint was written yet: starting over")
        engine = Engine(policy, config.seed, max_batch=config.rollout_rows, max_pages=max(1, memory.pages))
        session = Session(run, policy, engine, task, optimizer, state, log, out)
        session.loop(stop)
        if stop.asked and state.step < config.steps:
            log.note(f"stopped after step {state.step}; continue with: python -m pymathrl.train --resume {out}")
            return 130
        session.finish()
    with explain_os_errors("draw the curves", out):
        plot_run(out)
    print(f"run folder: {out}")
    return 0


@dataclass
class Session:
    """One sitting of a run: what the loop works on."""

    run: Run
    policy: Policy
    engine: Engine
    task: Task
    optimizer: Optimizer
    state: State
    log: RunLog
    out: Path

    def __post_init__(self) -> None:
        self.timer = StageTimer(self.log.stage, lambda: devices.synchronize(self.policy.device))
        self.spec = self.run.algo.loss(self.run.own)
        self.started = time.perf_counter() - self.state.wall_s
        self.saved_step = self.state.step if self.run.resume is not None else -1

    def loop(self, stop: Stop) -> None:
        config, state = self.run.train, self.state
        if state.step == 0 and not state.before:
            state.before = self.evaluate(config.eval_problems, config.eval_samples)
        while state.step < config.steps and not stop.asked:
            metrics, samples = self.step()
            state.step += 1
            last = state.step == config.steps
            if not last and config.eval_every and state.step % config.eval_every == 0:
                self.evaluate(config.eval_problems_during, config.eval_samples_during)
            # The log first: a kill in between then repeats a step whose lines the resume drops, and loses none.
            self.log.samples(state.step, samples)
            self.log.step(state.step, metrics | self.timer.pop())
            due = config.checkpoint_every and state.step % config.checkpoint_every == 0
            if due or stop.asked or last:
                self.save()
        if stop.asked and self.saved_step != state.step:
            self.save()

    def step(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """One pass of the six stages: (metrics, rows for samples.jsonl)."""
        run, config, policy, state, timer = self.run, self.run.train, self.policy, self.state, self.timer
        begin = time.perf_counter()
        with timer("prompt"):
            prompts = draw(policy, self.task, cursor=state.cursor, count=config.prompts_per_step, seed=config.seed,
                           max_tokens=config.max_prompt_tokens)  # fmt: skip
        gap: dict[str, float] = {}
        with timer("rollout"):
            rollout = self.engine.generate(
                prompts.ids, config.samples_per_prompt, config.max_new_tokens, temperature=config.temperature,
                top_k=config.top_k, top_p=config.top_p, min_p=config.min_p,
                uids=sample_uids(prompts.problems, config.samples_per_prompt),
            )  # fmt: skip
            if config.old_logp == "recompute":
                logp, mean_logp, entropy = score(policy, rollout, config.temperature, config.tokens_per_microbatch)
                gap = logp_gap(rollout, logp)  # after the exchange the update could only be compared with itself
                rollout = replace(rollout, logp=logp, mean_logp=mean_logp, entropy=entropy)
        with timer("verify"):
            verdicts = verify(rollout, prompts.problems, self.task, policy.tokenizer)
        metrics = rollout_metrics(rollout, verdicts, config.samples_per_prompt)
        if bool(torch.isfinite(verdicts.reward).all()):
            with timer("advantage"):
                advantages = advantage(rollout, verdicts.reward, verdicts.correct, run.algo, run.own)
            metrics["frac_reward_zero_std"] = float(advantages.equal.float().mean())
            metrics |= self.update(advantages.batch)
        else:
            bad = int((~torch.isfinite(verdicts.reward)).sum())
            self.log.note(
                f"step {state.step + 1}: {bad} rewards are nan or infinite; no update, the weights stay as they were"
            )
            self.count_skips([False])
        metrics |= gap
        state.cursor = prompts.cursor
        generated = int(rollout.response_lengths.sum())
        state.tokens += generated
        metrics |= {
            "tokens": state.tokens,
            "tokens_per_second": generated / (time.perf_counter() - begin),
            "prompts/too_long": prompts.too_long,
            "updates/skipped": state.skipped,
        }
        return metrics, sample_rows(prompts, verdicts, config)

    def update(self, batch: Batch) -> dict[str, Any]:
        """The optimizer steps of one batch. Whole groups go into a minibatch, in the order they were drawn."""
        config = self.run.train
        rows = torch.arange(batch.rollout.rows, device=batch.rollout.device)
        losses: list[LossReport] = []
        steps: list[StepReport] = []
        for _ in range(config.epochs):
            for part in rows.chunk(config.minibatches):
                with self.timer("loss"):
                    report = minibatch_loss(
                        self.policy.model, batch, part, self.spec, temperature=config.temperature,
                        token_budget=config.tokens_per_microbatch, max_new_tokens=config.max_new_tokens,
                    )  # fmt: skip
                    finite = math.isfinite(float(report.loss))
                with self.timer("optim"):
                    steps.append(self.optimizer.step(finite))
                losses.append(report)
        self.count_skips([s.applied for s in steps])
        return update_metrics(losses, steps)

    def count_skips(self, applied: Sequence[bool]) -> None:
        """Counts optimizer steps that were left out, says so, and gives up after MAX_SKIPS in a row."""
        state = self.state
        for ok in applied:
            state.skips_in_a_row = 0 if ok else state.skips_in_a_row + 1
            state.skipped += not ok
        missed = len(applied) - sum(applied)
        if missed:
            self.log.note(f"step {state.step + 1}: {missed} of {len(applied)} updates skipped (nan or infinity)")
        if state.skips_in_a_row >= MAX_SKIPS:
            raise UserError(
                f"{state.skips_in_a_row} updates in a row had nan or infinite rewards, losses or gradients and were "
                f"skipped; the checkpoints in {self.out / 'checkpoints'} are whole: look at the task's rewards, "
                "or lower --lr"
            )

    def evaluate(self, problems: int, samples: int) -> dict[str, float]:
        """pass@1, pass@8, diversity and lengths on the held-out problems, logged under eval/."""
        config = self.run.train
        with self.timer("eval"):
            result = evaluate(
                self.engine, self.task, self.task.test(problems), samples=samples,
                ks=[k for k in EVAL_KS if k <= samples], max_new_tokens=config.max_new_tokens,
                max_prompt_tokens=config.max_prompt_tokens, temperature=config.temperature,
            )  # fmt: skip
        if result.too_long:
            self.log.note(
                f"evaluation: {result.too_long} of {problems} prompts exceed --max-prompt-tokens and are left out"
            )
        self.log.eval(self.state.step, "eval", result.metrics)
        return result.metrics

    def save(self) -> None:
        if not all(bool(torch.isfinite(p).all()) for p in self.policy.model.parameters()):
            raise UserError(
                f"the weights hold nan or infinity after step {self.state.step}; they are not saved, and the earlier "
                f"checkpoints in {self.out / 'checkpoints'} are whole: lower --lr"
            )
        with self.timer("checkpoint"):
            self.state.wall_s = time.perf_counter() - self.started
            content = {
                "format": STATE_FORMAT, "optimizer": self.optimizer.state_dict(), "state": vars(self.state).copy(),
            }  # fmt: skip
            save_checkpoint(
                self.out, self.state.step, lambda folder: save(self.policy, folder), content,
                keep=self.run.train.keep_checkpoints,
            )  # fmt: skip
        self.saved_step = self.state.step

    def finish(self) -> None:
        """The evaluation after training, and summary.json."""
        config, state = self.run.train, self.state
        after = self.evaluate(config.eval_problems, config.eval_samples)
        wall = time.perf_counter() - self.started
        self.log.summary({
            "algo": self.run.algo.name, "task": config.task, "model": config.model, "seed": config.seed,
            "steps": state.step, "before": state.before, "after": after, "wall_s": wall,
            "tokens": state.tokens, "tokens_per_second": state.tokens / wall, "skipped_updates": state.skipped,
        })  # fmt: skip


def fit_context(config: TrainConfig, policy: Policy) -> TrainConfig:
    """The options with prompts and responses that fit the model's positions together; UserError where none do."""
    room = policy.config.max_positions - config.max_new_tokens
    if room < 1:
        raise UserError(
            f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt: the model has "
            f"{policy.config.max_positions} positions; lower it"
        )
    return replace(config, max_prompt_tokens=min(config.max_prompt_tokens, room))


def newest_checkpoint(out: Path) -> Path | None:
    """The newest whole checkpoint of the run in `out`, None before its first; damaged ones are named."""
    if not (out / "checkpoints").is_dir() or not any((out / "checkpoints").glob("step-*")):
        return None
    found = latest_checkpoint(out, on_skip=lambda text: print(f"note: {text}", file=sys.stderr))
    if found is None:
        raise UserError(f"--resume {out}: all checkpoints there are damaged; start a new run in another --out")
    return found[1]


def new_run_dir(given: str | None, name: str) -> Path:
    """The folder --out, which must not hold a run yet; without it the first free one like runs/`name`."""
    out = Path(given or Path("runs") / name)
    with explain_os_errors("make the run folder", out):
        if given is None:
            stem, number = out, 2
            while out.exists():
                out, number = Path(f"{stem}-{number}"), number + 1
        elif (out / "config.toml").exists():
            raise UserError(
                f"--out {out}: a run is there already; continue it with --resume {out}, or name another folder"
            )
        out.mkdir(parents=True, exist_ok=True)
    return out


@dataclass(frozen=True)
class Memory:
    """What a run needs of the free memory, in bytes, besides its loaded weights: gradients, moments and master weights;
    the activations of the largest micro-batch; the step buffers of generation. The KV cache gets the rest, as far as
    it can use it: `pages`."""

    free: int
    update: int
    activations: int
    buffers: int
    pages: int
    page_bytes: int
    wanted: int  # pages with which no sequence ever waits for memory

    def line(self) -> str:
        cache = self.pages * self.page_bytes
        return (
            f"memory    {_gib(self.free)} free: gradients and AdamW {_gib(self.update)}, activations "
            f"{_gib(self.activations)}, step buffers {_gib(self.buffers)}, KV cache {_gib(cache)} "
            f"({self.pages:,} pages of {PAGE} tokens, {self.wanted:,} would hold every response at full length)"
        )


def kept_bytes(m: ModelConfig, size: int) -> int:
    """Bytes per token that `Decoder.hidden` keeps until the backward pass; size: bytes of an activation.

    Per layer: the residual stream and its norm at both norms, q, k and v as attention reads them, what it gives, gate
    and up, their product; under q and k norms also q, k and v before them; in fp32 the scale of both norms and, per
    head, attention's log-sum-exp.
    """
    qkv = (m.num_heads + 2 * m.num_kv_heads) * m.head_dim
    kept = 4 * m.hidden_size + (1 + m.qk_norm) * qkv + m.num_heads * m.head_dim + 3 * m.intermediate_size
    return m.num_layers * (kept * size + 4 * (2 + m.num_heads))


def plan_memory(c: TrainConfig, policy: Policy, device: torch.device) -> Memory:
    model, m = policy.model, policy.config
    count, size = sum(p.numel() for p in model.parameters()), model.embed.element_size()
    update = count * (4 + 8) if size == 4 else count * (2 + 4 + 8 + 4)  # bf16: also a master and its gradient
    context = c.max_prompt_tokens + c.max_new_tokens
    rows = c.prompts_per_step * c.samples_per_prompt
    tokens = min(max(c.tokens_per_microbatch, context), rows // c.minibatches * context)
    beside = 4 * m.hidden_size + 4 * m.intermediate_size  # per token, in one layer's backward pass and in the head
    activations = tokens * (kept_bytes(m, size) + beside * size)
    activations += WORKSPACE_BYTES[device.type] + m.vocab_size * m.hidden_size * size
    side = min(rows, c.rollout_rows)
    buffers = Buffers.nbytes(model, max(c.rollout_rows, PREFILL_ROWS))
    page, free = PagedCache.page_bytes(model), devices.free_bytes(device)
    wanted = side * -(-context // PAGE) + c.prompts_per_step * -(-c.max_prompt_tokens // PAGE)
    pages = max(0, min(wanted, (free - update - activations - buffers) // page))
    return Memory(free, update, activations, buffers, pages, page, wanted)


def describe(run: Run, policy: Policy, device: torch.device, threads: int, memory: Memory) -> list[str]:
    """The plan of a run, a few lines: model, kernels, memory, tokens per step."""
    c, m = run.train, policy.config
    count = sum(p.numel() for p in policy.model.parameters())
    rows = c.prompts_per_step * c.samples_per_prompt
    where = f"{threads} CPU threads"
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}; attention of the update: {fused_attention()[1]}"
    lines = [
        f"algorithm {run.algo.name} ({run.algo.paper}): {run.algo.summary}",
        f"model     {c.model}: {count / 1e6:.2f}M parameters, {m.num_layers} layers, width {m.hidden_size}, "
        f"vocabulary {m.vocab_size}, {str(policy.model.dtype).removeprefix('torch.')}, prompts '{policy.prompt_style}'",
        f"device    {device}: {where}; {WHY}",
        memory.line(),
        f"step      {c.prompts_per_step} problems x {c.samples_per_prompt} responses of at most "
        f"{c.max_new_tokens} tokens = {rows * c.max_new_tokens:,} tokens at most; "
        f"{c.epochs * c.minibatches} updates of {rows // c.minibatches} responses; {c.steps} steps",
    ]  # fmt: skip
    if memory.pages * PAGE < c.max_prompt_tokens + c.max_new_tokens:
        lines.append("warning   this may not fit: lower --tokens-per-microbatch (activations) or --max-new-tokens")
    return lines


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def rollout_metrics(rollout: Rollout, verdicts: Verdicts, group: int) -> dict[str, Any]:
    """What the rollouts say, before any update."""
    sampled = rollout.sampled_mask
    lengths = rollout.response_lengths
    rewards = verdicts.reward.double()
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.view(-1, group).std(1).mean()),
        "accuracy": float(verdicts.correct.float().mean()),
        "entropy": float(rollout.entropy[sampled].mean()),
        "completions/min_length": int(lengths.min()),
        "completions/max_length": int(lengths.max()),
        **completion_stats(lengths.tolist(), (rollout.stop == STOP_LENGTH).tolist()),
    }


def logp_gap(rollout: Rollout, logp: torch.Tensor) -> dict[str, float]:
    """How far the sampler's log-probs are from `logp` fp32 [T], over the sampled tokens: the nats |sampler - logp|."""
    gap = (rollout.logp - logp)[rollout.sampled_mask].abs()
    return {"logp_gap/mean": float(gap.mean()), "logp_gap/max": float(gap.max())}


def update_metrics(losses: Sequence[LossReport], steps: Sequence[StepReport]) -> dict[str, Any]:
    """What the optimizer steps of a batch say. logp_gap compares sampler and update pass before the first of them."""
    metrics: dict[str, Any] = {
        "loss": sum(float(r.loss) for r in losses) / len(losses),
        "grad_norm": sum(s.grad_norm for s in steps) / len(steps),
        "learning_rate": steps[-1].learning_rate,
        "updates/idle_rows": sum(r.idle_rows for r in losses),
    }
    tables = [t for r in losses for t in r.stats]
    if not tables:
        return metrics
    s = dict(zip(STATS, merge_stats(tables).tolist(), strict=True))
    tokens = max(1.0, s["tokens"])
    metrics |= {
        "ratio/mean": s["ratio"] / tokens,
        "ratio/max": s["ratio_max"],
        "kl": s["old_k3"] / tokens,  # of the sampling policy to the current one, mean over tokens
        "clip_ratio/low": s["clip_low"] / tokens,
        "clip_ratio/high": s["clip_high"] / tokens,
    }
    if math.isfinite(s["q_max"]):  # a ROVER run
        for name in ("q", "next_q", "target"):
            metrics |= {
                f"rover/{name}_min": s[f"{name}_min"],
                f"rover/{name}_mean": s[name] / tokens,
                f"rover/{name}_max": s[f"{name}_max"],
            }
        metrics |= {"rover/q_above": s["q_above"] / tokens, "rover/q_below": s["q_below"] / tokens}
    if losses[0].stats:
        first = dict(zip(STATS, merge_stats(losses[0].stats).tolist(), strict=True))
        metrics["logp_gap/mean"] = first["log_ratio_abs"] / max(1.0, first["tokens"])
        metrics["logp_gap/max"] = first["log_ratio_abs_max"]
    return metrics


def sample_rows(prompts: Prompts, verdicts: Verdicts, config: Any) -> list[dict[str, Any]]:
    """The first response of each of the first problems, for reading."""
    rows = []
    for i, problem in enumerate(prompts.problems[: config.samples_per_step]):
        at = i * config.samples_per_prompt
        grade = verdicts.grades[at]
        rows.append({
            "problem": problem.question, "text": verdicts.texts[at], "reward": grade.reward,
            "correct": grade.correct, "reason": grade.reason,
        })  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 with one sentence on stderr where the input cannot be used; 130 when interrupted."""
    try:
        return train(parse_train(None if argv is None else list(argv)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, torch.OutOfMemoryError) as error:
        print(f"error: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; checkpoints written before are whole", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
