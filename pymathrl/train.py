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
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from pymathrl import devices
from pymathrl.advantage import advantage, mask_tokens, reference_terms, steer_kl
from pymathrl.batch import STOP_LENGTH, Graded, Rollout
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
from pymathrl.context import Context, Position
from pymathrl.errors import UserError
from pymathrl.eval import evaluate
from pymathrl.filter import Filter
from pymathrl.learner import Learner, Update
from pymathrl.log import RunLog, StageTimer
from pymathrl.loss import WORKSPACE_BYTES, with_options
from pymathrl.metrics import completion_stats
from pymathrl.models import ModelConfig, Policy, load, save
from pymathrl.models.paged import Buffers, PagedCache
from pymathrl.ops._call import _C, WHY
from pymathrl.ops.attention import PAGE, fused_attention
from pymathrl.ops.policy_loss import STATS, merge_stats
from pymathrl.options import run_command
from pymathrl.prompt import check_spelling
from pymathrl.report import plot_run
from pymathrl.rollout.engine import PREFILL_ROWS
from pymathrl.tasks import Task, load_task, short_name
from pymathrl.verify.stage import Tally

EVAL_KS = (1, 8)
# Of the trainer state in a checkpoint. 3: position in a schedule, memory of the algorithm, carry buffer.
STATE_FORMAT = 3
MAX_SKIPS = 10  # optimizer steps skipped in a row, or steps without a group, after which a run gives up


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
    config, stages = run.train, run.stages or (run,)
    device = devices.resolve(config.device)
    threads = devices.set_threads(config.threads)
    tasks = [load_task(stage.train.task, **stage.task_options) for stage in stages]
    for stage, task in zip(stages, tasks, strict=True):
        if stage.train.steps:
            task.train(0, config.seed)  # a task with nothing to train on fails here: nothing was loaded or written yet
    if run.resume is not None and not run.dry_run:
        clean_checkpoints(run.resume)  # first: it puts back a checkpoint whose replacement was cut short
    checkpoint = None if run.resume is None else newest_checkpoint(run.resume)
    policy = load(str(checkpoint or config.model), device, devices.weight_dtype(config.dtype, device))
    run = replace(run, train=fit_context(config, policy))
    stages = tuple(replace(stage, train=fit_context(stage.train, policy)) for stage in stages)
    if config.prompt_style != "auto":
        policy = replace(policy, prompt_style=config.prompt_style)
    for stage, task in zip(stages, tasks, strict=True):
        if stage.train.steps:
            check_spelling(policy, task, task.train(0, config.seed))
    policy.model.train()
    # before the optimizer makes masters, which are part of the plan
    memory = [plan_memory(stage.train, policy, device, stage.algo.trained_beside) for stage in stages]
    plan = describe(run, stages, policy, device, threads, memory)
    plan += [f"data      {text}" for text in dict.fromkeys(n for task in tasks for n in getattr(task, "notes", ()))]
    if run.dry_run:
        print("\n".join(plan))
        return 0
    at, saved = Position(), dict[str, Any]()
    if run.resume is None:
        out = new_run_dir(config.out, f"{run.algo.name}-{short_name(config.task)}-seed{config.seed}")
    else:
        out = run.resume
        if checkpoint is not None:
            saved = load_state(checkpoint)
            if saved.get("format") != STATE_FORMAT:
                raise UserError(
                    f"--resume {out}: saved by an earlier version of pymathrl; start a new run from its weights: "
                    f"--model {checkpoint}"
                )
            at = Position(**saved["state"])
        if at.step >= run.steps and (out / "summary.json").exists():
            print(f"{out}: all {at.step} steps are done; give a larger --steps to go on")
            return 0
        truncate_metrics(out, at.step if checkpoint is not None else -1)
    with explain_os_errors("write the run's options", out / "config.toml"):
        write_atomic(out / "config.toml", write_toml(run.values()).encode())

    title = f"{run.algo.name} on {config.task}, seed {config.seed}"
    with Stop() as stop, RunLog(out, run.steps, start_step=at.step, title=title) as log:
        for line in plan:
            log.note(line)
        if run.resume is not None:
            log.note(f"resumed from {checkpoint}" if checkpoint else "no checkpoint was written yet: starting over")
        stage, task = stages[at.stage], tasks[at.stage]
        learner = Learner(policy, stage.train, updates=stage.train.updates, max_pages=max(1, memory[at.stage].pages))
        if saved:
            learner.optimizer.load_state_dict(saved["optimizer"])
        ctx = Context(stage, learner, task, at, log.note)
        ctx.memory = None if stage.algo.memory is None else stage.algo.memory(ctx)
        if ctx.memory is not None and saved:
            ctx.memory.load_state_dict(saved["memory"])
        session = Session(run, ctx, log, out, load_task(config.task, **run.task_options))
        if saved:
            session.filter.load_state_dict(saved["filter"])
        for number in range(at.stage, len(stages)):
            if number != at.stage:
                session.next_stage(stages[number], tasks[number], memory[number].pages)
            session.loop(stop)
            if stop.asked and at.step < run.steps:
                log.note(f"stopped after step {at.step}; continue with: python -m pymathrl.train --resume {out}")
                return 130
        session.finish()
    with explain_os_errors("draw the curves", out):
        plot_run(out)
    print(f"run folder: {out}")
    return 0


@dataclass
class Session:
    """One sitting of a run: what the loop works on. run: its options, those of evaluations; ctx.run: the stage's."""

    run: Run
    ctx: Context
    log: RunLog
    out: Path
    test_task: Task

    def __post_init__(self) -> None:
        self.at = self.ctx.at
        self.timer = StageTimer(self.log.stage, lambda: devices.synchronize(self.ctx.policy.device))
        self.filter = Filter(self.ctx)
        self.started = time.perf_counter() - self.at.wall_s
        self.saved_step = self.at.step if self.run.resume is not None else -1

    def next_stage(self, stage: Run, task: Task, pages: int) -> None:
        """Goes on with the weights, and by default the optimizer's moments, under the options of another stage. The
        algorithm's memory stays where the algorithm does."""
        ctx, before = self.ctx, self.ctx.run
        self.at.stage, self.at.stage_step, self.at.kl_coef = self.at.stage + 1, 0, None
        self.log.note(f"stage {self.at.stage + 1}: {stage_line(stage)}")
        ctx.run, ctx.task = stage, task
        ctx.learner.restart(stage.train, updates=stage.train.updates, max_pages=max(1, pages))
        if stage.algo.memory is not before.algo.memory:
            ctx.memory = None if stage.algo.memory is None else stage.algo.memory(ctx)
        self.filter = Filter(ctx)

    def loop(self, stop: Stop) -> None:
        """The steps of the stage that are left."""
        config, at = self.ctx.train, self.at
        if at.step == 0 and not at.before:
            at.before = self.evaluate(self.run.train.eval_problems, self.run.train.eval_samples)
        while at.stage_step < config.steps and not stop.asked:
            metrics, samples = self.step()
            at.step += 1
            at.stage_step += 1
            last = at.step == self.run.steps
            if not last and config.eval_every and at.step % config.eval_every == 0:
                self.evaluate(self.run.train.eval_problems_during, self.run.train.eval_samples_during)
            # The log first: a kill in between then repeats a step whose lines the resume drops, and loses none.
            self.log.samples(at.step, samples)
            self.log.step(at.step, metrics | self.timer.pop())
            due = config.checkpoint_every and at.step % config.checkpoint_every == 0
            if due or stop.asked or last:
                self.save()
        if stop.asked and self.saved_step != at.step:
            self.save()

    def step(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """One pass of the six stages: (metrics, rows for samples.jsonl)."""
        ctx, config, algo, at, timer = self.ctx, self.ctx.train, self.ctx.run.algo, self.at, self.timer
        begin, before = time.perf_counter(), at.tokens
        ctx.metrics, ctx.tally = {}, Tally()
        metrics: dict[str, Any] = {}
        graded = self.collect()
        at.empty_in_a_row = at.empty_in_a_row + 1 if graded is None else 0
        if graded is None:
            self.log.note(f"step {at.step + 1}: --filter {config.filter} kept no group; no update")
            if at.empty_in_a_row >= MAX_SKIPS:
                raise UserError(
                    f"--filter {config.filter} kept no group in {at.empty_in_a_row} steps of {config.filter_rounds} "
                    "draws each: the problems are too easy or too hard for the policy; choose others, raise "
                    "--samples-per-prompt, or use --filter off"
                )
        elif not bool(torch.isfinite(graded.reward).all()):
            bad = int((~torch.isfinite(graded.reward)).sum())
            self.log.note(
                f"step {at.step + 1}: {bad} rewards are nan or infinite; no update, the weights stay as they were"
            )
            metrics |= rollout_metrics(graded)
            self.count_skips([False])
        else:
            metrics |= rollout_metrics(graded)
            with timer("advantage"):
                graded = reference_terms(ctx, graded)
                batch = mask_tokens(algo.shape(ctx, graded, advantage(ctx, graded)), config)
            update = ctx.learner.update(
                batch, with_options(algo.loss(ctx.own), config, ctx.kl_coef),
                terms=None if algo.terms is None else partial(algo.terms, ctx), learn=partial(algo.learn, ctx),
                timer=timer,
            )  # fmt: skip
            self.count_skips([s.applied for s in update.steps])
            metrics |= update_metrics(update)
            with timer("optim"):
                algo.after_step(ctx, batch)
                steer_kl(ctx, graded.rollout.main_rows.numel())
        metrics |= ctx.metrics | ctx.tally.metrics()
        metrics |= {
            "tokens": at.tokens,
            "tokens_per_second": (at.tokens - before) / (time.perf_counter() - begin),
            "updates/skipped": at.skipped,
        }
        return metrics, [] if graded is None else sample_rows(graded, config.samples_per_step)

    def collect(self) -> Graded | None:
        """The groups of a step, graded; with --filter those that it keeps, from as many draws as that takes."""
        ctx, algo, timer = self.ctx, self.ctx.run.algo, self.timer
        kept, too_long = self.filter.start(), 0
        while count := self.filter.wanted(0 if kept is None else kept.groups):
            with timer("prompt"):
                prompts = algo.draw(ctx, count)
                too_long += prompts.too_long
            with timer("rollout"):
                rollout = algo.rollout(ctx, prompts, ctx.draws)
                self.at.tokens += int(rollout.sampled_mask.sum())
                extra = {}
                if ctx.train.old_logp == "recompute":
                    scores = ctx.score(rollout)
                    # now: after the exchange the update could only be compared with itself
                    ctx.metrics |= logp_gap(rollout, scores.logp)
                    extra = {"behaviour_logp": rollout.logp}
                    rollout = replace(rollout, logp=scores.logp, mean_logp=scores.mean_logp, entropy=scores.entropy)
            with timer("verify"):
                graded = algo.judge(ctx, replace(algo.verify(ctx, rollout, prompts), extra=extra))
            kept = self.filter.take(kept, graded)
        ctx.metrics["prompts/too_long"] = too_long
        return self.filter.finish(kept)

    def count_skips(self, applied: Sequence[bool]) -> None:
        """Counts optimizer steps that were left out, says so, and gives up after MAX_SKIPS in a row."""
        at = self.at
        for ok in applied:
            at.skips_in_a_row = 0 if ok else at.skips_in_a_row + 1
            at.skipped += not ok
        missed = len(applied) - sum(applied)
        if missed and len(applied) > 1:
            self.log.note(f"step {at.step + 1}: {missed} of {len(applied)} updates skipped (nan or infinity)")
        if at.skips_in_a_row >= MAX_SKIPS:
            raise UserError(
                f"{at.skips_in_a_row} updates in a row had nan or infinite rewards, losses or gradients and were "
                f"skipped; the checkpoints in {self.out / 'checkpoints'} are whole: look at the task's rewards, "
                "or lower --lr"
            )

    def evaluate(self, problems: int, samples: int) -> dict[str, float]:
        """pass@1, pass@8, diversity and lengths on the held-out problems, logged under eval/."""
        config, ctx = self.run.train, self.ctx
        algo = ctx.run.algo
        with self.timer("eval"):
            result = evaluate(
                ctx.engine, self.test_task, self.test_task.test(problems), samples=samples,
                ks=[k for k in EVAL_KS if k <= samples], max_new_tokens=config.max_new_tokens,
                max_prompt_tokens=config.max_prompt_tokens, temperature=config.temperature,
                rollout=(lambda prompts, draws: algo.rollout(ctx, prompts, draws)) if algo.tools else None,
            )  # fmt: skip
        if result.too_long:
            self.log.note(
                f"evaluation: {result.too_long} of {problems} prompts exceed --max-prompt-tokens and are left out"
            )
        self.log.eval(self.at.step, "eval", result.metrics)
        return result.metrics

    def save(self) -> None:
        ctx, at = self.ctx, self.at
        if not all(bool(torch.isfinite(p).all()) for p in ctx.policy.model.parameters()):
            raise UserError(
                f"the weights hold nan or infinity after step {at.step}; they are not saved, and the earlier "
                f"checkpoints in {self.out / 'checkpoints'} are whole: lower --lr"
            )
        with self.timer("checkpoint"):
            at.wall_s = time.perf_counter() - self.started
            content = {
                "format": STATE_FORMAT, "optimizer": ctx.learner.optimizer.state_dict(), "state": vars(at).copy(),
                "memory": {} if ctx.memory is None else ctx.memory.state_dict(), "filter": self.filter.state_dict(),
            }  # fmt: skip
            save_checkpoint(
                self.out, at.step, lambda folder: save(ctx.policy, folder), content,
                keep=self.run.train.keep_checkpoints,
            )  # fmt: skip
        self.saved_step = at.step

    def finish(self) -> None:
        """The evaluation after training, and summary.json."""
        config, at = self.run.train, self.at
        after = self.evaluate(config.eval_problems, config.eval_samples)
        wall = time.perf_counter() - self.started
        self.log.summary({
            "algo": self.run.algo.name, "task": config.task, "model": config.model, "seed": config.seed,
            "steps": at.step, "before": at.before, "after": after, "wall_s": wall,
            "tokens": at.tokens, "tokens_per_second": at.tokens / wall, "skipped_updates": at.skipped,
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
    the activations of the largest micro-batch; the step buffers of generation, and a hybrid's states. The KV cache gets
    the rest, as far as it can use it: `pages`."""

    free: int
    update: int
    activations: int
    buffers: int
    states: int
    pages: int
    page_bytes: int
    wanted: int  # pages with which no sequence ever waits for memory

    def line(self, generates: bool = True) -> str:
        text = (
            f"memory    {_gib(self.free)} free: gradients and AdamW {_gib(self.update)}, activations "
            f"{_gib(self.activations)}"
        )
        if not generates:
            return text
        cache = self.pages * self.page_bytes
        states = f", states {_gib(self.states)}" if self.states else ""
        return (
            f"{text}, step buffers {_gib(self.buffers)}{states}, KV cache {_gib(cache)} "
            f"({self.pages:,} pages of {PAGE} tokens, {self.wanted:,} would hold every response at full length)"
        )


def _mamba_layers(m: ModelConfig) -> str:
    return "" if m.mamba is None else f" ({m.num_layers - m.attention_count} of them Mamba)"


def kept_bytes(m: ModelConfig, size: int) -> int:
    """Bytes per token that `Decoder.hidden` keeps until the backward pass; size: bytes of an activation.

    Per layer: the residual stream and its norm at both norms, q, k and v as attention reads them, what it gives, gate
    and up, their product; under q and k norms also q, k and v before them; in fp32 the scale of both norms and, per
    head, attention's log-sum-exp. A Mamba layer instead of attention: its projection, dt, the convolution's and the
    scan's result.
    """
    qkv = (m.num_heads + 2 * m.num_kv_heads) * m.head_dim
    attention = ((1 + m.qk_norm) * qkv + m.num_heads * m.head_dim) * size + 4 * m.num_heads
    kept = m.num_layers * ((4 * m.hidden_size + 3 * m.intermediate_size) * size + 4 * 2)
    kept += m.attention_count * attention
    if m.mamba is not None:
        kept += (m.num_layers - m.attention_count) * (sum(m.mamba.parts) + 3 * m.mamba.inner_size) * size
    return kept


def kept_states(m: ModelConfig, tokens: int, sequences: int) -> int:
    """Bytes of the fp32 states that the scans keep besides."""
    if m.mamba is None:
        return 0
    tiles = _C.selective_scan_tiles(tokens, sequences)
    return (m.num_layers - m.attention_count) * tiles * 4 * m.mamba.state_size * m.mamba.inner_size


def plan_memory(c: TrainConfig, policy: Policy, device: torch.device, beside_policy: int = 0) -> Memory:
    """beside_policy: more models of its size, not loaded yet, that are trained beside it, one after the other."""
    model, m = policy.model, policy.config
    count, size = sum(p.numel() for p in model.parameters()), model.embed.element_size()
    update = count * (4 + 8) if size == 4 else count * (2 + 4 + 8 + 4)  # bf16: also a master and its gradient
    update += beside_policy * (count * size + update) + (c.kl != "none") * count * size  # the reference is loaded late
    context = c.max_prompt_tokens + c.max_new_tokens
    rows = c.prompts_per_step * c.samples_per_prompt
    tokens = min(max(c.tokens_per_microbatch, context), rows // c.minibatches * context)
    beside = 4 * m.hidden_size + 4 * m.intermediate_size  # per token, in one layer's backward pass and in the head
    activations = tokens * (kept_bytes(m, size) + beside * size)
    activations += kept_states(m, tokens, min(rows // c.minibatches, tokens // PAGE + 1))  # few are shorter than a page
    activations += WORKSPACE_BYTES[device.type] + m.vocab_size * m.hidden_size * size
    side = min(rows, c.rollout_rows)
    buffers = Buffers.nbytes(model, max(c.rollout_rows, PREFILL_ROWS))
    states = PagedCache.state_bytes(model) * (side + min(side, c.prompts_per_step))
    page, free = max(1, PagedCache.page_bytes(model)), devices.free_bytes(device)
    wanted = side * -(-context // PAGE) + c.prompts_per_step * -(-c.max_prompt_tokens // PAGE)
    pages = max(0, min(wanted, (free - update - activations - buffers - states) // page))
    return Memory(free, update, activations, buffers, states, pages, page, wanted)


def describe(
    run: Run, stages: Sequence[Run], policy: Policy, device: torch.device, threads: int, memory: Sequence[Memory]
) -> list[str]:
    """The plan of a run, a few lines: model, kernels, memory, tokens per step, stages."""
    c, m = run.train, policy.config
    count = sum(p.numel() for p in policy.model.parameters())
    where = f"{threads} CPU threads"
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}; attention of the update: {fused_attention()[1]}"
    lines = [
        f"algorithm {run.algo.name} ({run.algo.paper}): {run.algo.summary}",
        f"model     {c.model}: {count / 1e6:.2f}M parameters, {m.num_layers} layers{_mamba_layers(m)}, "
        f"width {m.hidden_size}, vocabulary {m.vocab_size}, {str(policy.model.dtype).removeprefix('torch.')}, prompts "
        f"'{policy.prompt_style}'",
        f"device    {device}: {where}; {WHY}",
        max(memory, key=lambda plan: plan.update + plan.activations + plan.wanted * plan.page_bytes).line(),
    ]  # fmt: skip
    for number, stage in enumerate(stages, 1):
        lines.append((f"stage {number:<4}" if run.stages else "step     ") + stage_line(stage))
    for stage, plan in zip(stages, memory, strict=True):
        if plan.pages * PAGE < stage.train.max_prompt_tokens + stage.train.max_new_tokens:
            lines.append("warning   this may not fit: lower --tokens-per-microbatch (activations) or --max-new-tokens")
            break
    return lines


def stage_line(run: Run) -> str:
    """What the steps of a stage are, in one line."""
    c = run.train
    rows = c.prompts_per_step * c.samples_per_prompt
    return (
        f"{run.algo.name} on {c.task}: {c.prompts_per_step} problems x {c.samples_per_prompt} responses of at most "
        f"{c.max_new_tokens} tokens = {rows * c.max_new_tokens:,} tokens at most; "
        f"{c.epochs * c.minibatches} updates of {rows // c.minibatches} responses; {c.steps} steps"
    )


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def rollout_metrics(graded: Graded) -> dict[str, Any]:
    """What the rollouts say, before any update."""
    entropy = float(graded.rollout.entropy[graded.rollout.sampled_mask].mean())
    graded = graded.main
    rollout, rewards = graded.rollout, graded.reward.double()
    lengths, bounds = rollout.response_lengths, rollout.group_offsets.tolist()
    groups = [rewards[a:b] for a, b in pairwise(bounds)]
    spread = [float(g.std()) if g.numel() > 1 else 0.0 for g in groups]
    return {
        "reward": float(rewards.mean()),
        "reward_std": sum(spread) / len(spread),
        "accuracy": float(graded.correct.float().mean()),
        "frac_reward_zero_std": float(graded.equal.float().mean()),
        "entropy": entropy,
        "completions/min_length": int(lengths.min()),
        "completions/max_length": int(lengths.max()),
        **completion_stats(lengths.tolist(), (rollout.stop == STOP_LENGTH).tolist()),
    }


def logp_gap(rollout: Rollout, logp: torch.Tensor) -> dict[str, float]:
    """How far the sampler's log-probs are from `logp` fp32 [T], over the sampled tokens: the nats |sampler - logp|."""
    gap = (rollout.logp - logp)[rollout.sampled_mask].abs()
    return {"logp_gap/mean": float(gap.mean()), "logp_gap/max": float(gap.max())}


def update_metrics(update: Update) -> dict[str, Any]:
    """What the optimizer steps of a batch say. logp_gap compares sampler and update pass before the first of them."""
    losses, steps = update.losses, update.steps
    metrics: dict[str, Any] = {
        "loss": sum(float(r.loss) for r in losses) / len(losses),
        "grad_norm": sum(s.grad_norm for s in steps) / len(steps),
        "learning_rate": steps[-1].learning_rate,
        "updates/idle_rows": sum(r.idle_rows for r in losses),
    }
    for name in {name for row in update.beside for name in row}:
        values = [row[name] for row in update.beside if name in row]
        metrics[name] = sum(values) / len(values)
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
    for name, column in (("clip_ratio/dual", "dual_clip"), ("kl/reference", "kl"), ("selected", "selected")):
        if s[column]:
            metrics[name] = s[column] / tokens
    if math.isfinite(s["tis_weight_max"]) and s["tis_weight_square"]:
        metrics |= {
            "is_weight/mean": s["tis_weight"] / tokens, "is_weight/max": s["tis_weight_max"],
            "is_weight/clipped": s["tis_clipped"] / tokens,
            "is_weight/ess": s["tis_weight"] ** 2 / (tokens * s["tis_weight_square"]),  # 1 = all weights equal
        }  # fmt: skip
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


def sample_rows(graded: Graded, count: int) -> list[dict[str, Any]]:
    """The first response of each of the first `count` problems, for reading."""
    rows = []
    first_rows = graded.rollout.group_offsets.tolist()
    for problem, at in list(zip(graded.problems, first_rows, strict=False))[:count]:
        grade = graded.grades[at]
        rows.append({
            "problem": problem.question, "text": graded.texts[at], "reward": float(graded.reward[at]),
            "correct": grade.correct, "reason": grade.reason,
        })  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 with one sentence on stderr where the input cannot be used; 130 when interrupted."""
    return run_command(lambda: train(parse_train(None if argv is None else list(argv))))


if __name__ == "__main__":
    sys.exit(main())
