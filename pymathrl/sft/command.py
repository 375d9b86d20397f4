"""python -m pymathrl.sft: supervised stages, on given rows, on critiques, or on the model's own verified responses.

The loss of an optimizer step is sum(w m nll) / sum(w m) over all tokens of its rows (w: the row's weight, m: 1 on
trained tokens), by the fused head of the policy loss: a weighted log-likelihood is REINFORCE with advantage 1.
Rows are packed one after the other and attend only to themselves, so that packing changes speed and no result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pymathrl import devices
from pymathrl.algos import LossSpec
from pymathrl.batch import Rollout, micro_batches
from pymathrl.checkpoint import (
    clean_checkpoints,
    explain_os_errors,
    load_state,
    save_checkpoint,
    truncate_metrics,
    write_atomic,
)
from pymathrl.config import TrainConfig, write_toml
from pymathrl.errors import UserError
from pymathrl.eval import evaluate
from pymathrl.log import RunLog, StageTimer, to_json
from pymathrl.loss import TokenTerms, fused_policy_loss
from pymathrl.models import Decoder, Policy, load, save
from pymathrl.models.convert import shape_of, spread_layers, to_hybrid
from pymathrl.ops._call import WHY
from pymathrl.optim import Optimizer
from pymathrl.options import run_command
from pymathrl.prompt import draw
from pymathrl.report import plot_run
from pymathrl.rollout import Draws, Engine
from pymathrl.rollout.score import score
from pymathrl.sft.blend import Blend, DataSpec, FileRows, Solutions, file_blend, parse_data, read_file
from pymathrl.sft.collect import collect
from pymathrl.sft.distill import check_pair, distillation_loss
from pymathrl.sft.options import SftConfig, SftRun, parse_sft
from pymathrl.sft.rows import pack
from pymathrl.tasks import Task, load_task
from pymathrl.tasks.jsonl import read_objects
from pymathrl.train import EVAL_KS, MAX_SKIPS, Memory, Stop, fit_context, new_run_dir, newest_checkpoint, plan_memory

STATE_FORMAT = 1  # of the state in a checkpoint of this command
LIKELIHOOD = LossSpec("weighted", terms={"weight": "one"})


@dataclass
class State:
    """All that a resumed run needs besides the weights and the optimizer; plain data, saved with each checkpoint."""

    step: int = 0  # optimizer steps done, of all rounds
    cursor: int = 0  # next draw of the blend
    problem_cursor: int = 0  # next problem of the task's stream
    rounds: list[dict[str, Any]] = field(default_factory=list)  # of each round sampled: its numbers
    digest: list[str] = field(default_factory=list)  # of the rows that the cursor counts in
    wall_s: float = 0.0
    tokens: int = 0  # trained
    skipped: int = 0
    skips_in_a_row: int = 0
    before: dict[str, float] = field(default_factory=dict)  # the evaluation before training
    nll: list[float] = field(default_factory=list)  # of the first and of the last step, each before its update


def sft(run: SftRun) -> int:
    """Runs the command line `run`. Returns the exit code: 0, or 130 when it was interrupted and saved."""
    config = run.config
    device = devices.resolve(config.device)
    threads = devices.set_threads(config.threads)
    task = None if config.task is None else load_task(config.task, **run.task_options)
    if run.resume is not None and not run.dry_run:
        clean_checkpoints(run.resume)
    checkpoint = None if run.resume is None else newest_checkpoint(run.resume)
    teacher = first_teacher(config, device) if config.mode == "distill" else None
    if checkpoint is not None:
        policy = load_policy(config, str(checkpoint), device)
    elif teacher is not None:
        policy = first_student(config, teacher, device)
    else:
        policy = first_policy(config, device)
    if teacher is not None:
        check_pair(policy, teacher)
    common = config.common() if task is None else fit_context(config.common(), policy)
    most = min(config.max_tokens, policy.config.max_positions)
    blend = None
    if config.data is not None:
        blend = file_blend(policy, config.rows, parse_data(config.data), most, config.seed)
    elif config.mode in ("sft", "distill") and task is not None:
        blend = Blend([Solutions(policy, task, most)], [1.0], config.seed)
        blend.draw(0, 1)  # a task without problems or solutions to train on fails here: nothing was written yet
    elif task is not None:
        task.train(0, config.seed)
    held_out = None
    if config.eval_data is not None:
        held_out = read_file(policy, config.rows, parse_data(config.eval_data)[0], most)
    steps = config.steps
    if config.epochs and blend is not None:
        rows = sum(len(s.examples) for s in blend.sources if isinstance(s, FileRows))
        steps = -(-config.epochs * rows // config.rows_per_step)
    policy.model.train()
    memory = plan(config, common, policy, device)
    optimizer = Optimizer(policy.model, common, steps)
    lines = describe(config, policy, device, threads, memory, blend, steps)
    if run.dry_run:
        print("\n".join(lines))
        return 0
    state = State()
    if run.resume is None:
        out = new_run_dir(config.out, f"{config.mode}-seed{config.seed}")
    else:
        out = run.resume
        saved = None if checkpoint is None else load_state(checkpoint)
        if saved is not None:
            if saved.get("format") != STATE_FORMAT or saved.get("kind") != "sft":
                raise UserError(
                    f"--resume {out}: not saved by this version of this command; start a new run from its weights: "
                    f"--model {checkpoint}"
                )
            optimizer.load_state_dict(saved["optimizer"])
            state = State(**saved["state"])
        if state.step >= steps * config.rounds and (out / "summary.json").exists():
            print(f"{out}: all {state.step} steps are done; start a new run from its weights to go on")
            return 0
        truncate_metrics(out, state.step if checkpoint is not None else -1)
    with explain_os_errors("write the run's options", out / "config.toml"):
        write_atomic(out / "config.toml", write_toml(run.values()).encode())

    title = f"{config.mode}, seed {config.seed}"
    with Stop() as stop, RunLog(out, steps * config.rounds, start_step=state.step, title=title) as log:
        for line in lines:
            log.note(line)
        if run.resume is not None:
            log.note(f"resumed from {checkpoint}" if checkpoint else "no checkpoint was written yet: starting over")
        session = Session(
            config, common, policy, teacher, task, blend, held_out, optimizer, state, log, out, steps, memory
        )  # fmt: skip
        session.loop(stop)
        if stop.asked and state.step < session.total:
            log.note(f"stopped after step {state.step}; continue with: python -m pymathrl.sft --resume {out}")
            return 130
        session.finish()
    if session.total or task is not None:  # else there is nothing to draw
        with explain_os_errors("draw the curves", out):
            plot_run(out)
    print(f"run folder: {out}")
    return 0


def supervised_loss(model: Decoder, rollout: Rollout, weight: Tensor, token_budget: int) -> Tensor:
    """Accumulates into the gradients of `model` those of sum(w nll) / sum(w) over the sampled tokens of all rows, and
    returns that number, fp32, detached. weight fp32 [T], more than 0 on sampled tokens. How the rows are cut into
    micro-batches changes rounding only: the normaliser is that of all of them."""
    coef = (weight / weight.double().sum()).float()
    total = torch.zeros((), device=rollout.device)
    for micro in micro_batches(rollout, torch.arange(rollout.rows, device=rollout.device), token_budget):
        at = micro.token_index
        hidden = model.hidden(micro.ids, micro.starts)[micro.hidden_index]
        terms = TokenTerms(old_logp=rollout.logp[at], advantage=torch.ones_like(coef[at]), coef=coef[at])
        out = fused_policy_loss(hidden, model.head_weight, micro.targets, terms, LIKELIHOOD)
        out.loss.backward()
        total += out.loss.detach()
    return total


@torch.no_grad()
def held_out_nll(policy: Policy, rows: FileRows, config: SftConfig) -> float:
    """sum(w nll) / sum(w) over the trained tokens of all rows, in nats, summed in fp64."""
    total = weights = 0.0
    for begin in range(0, len(rows.examples), config.rows_per_step):
        rollout, weight = pack(rows.examples[begin : begin + config.rows_per_step], policy.device)
        logp = score(policy, rollout, 1.0, config.tokens_per_microbatch).logp
        total -= float((weight.double() * logp.double()).sum())
        weights += float(weight.double().sum())
    return total / weights


@dataclass
class Session:
    """One sitting of a run: what the loop works on. steps: of a round; a run of one mode but rft is one round."""

    config: SftConfig
    common: TrainConfig
    policy: Policy
    teacher: Policy | None  # mode distill
    task: Task | None
    blend: Blend | None  # mode rft: of the round's rows, None before the first
    held_out: FileRows | None
    optimizer: Optimizer
    state: State
    log: RunLog
    out: Path
    steps: int
    memory: Memory

    def __post_init__(self) -> None:
        c = self.config
        self.timer = StageTimer(self.log.stage, lambda: devices.synchronize(self.policy.device))
        self.started = time.perf_counter() - self.state.wall_s
        self.total = self.steps * c.rounds
        self.saved_step = -1
        self.engine = None
        if self.task is not None:
            pages = max(1, self.memory.pages)
            self.engine = Engine(self.policy, c.seed, max_batch=c.rollout_rows, max_pages=pages)

    def loop(self, stop: Stop) -> None:
        config, state = self.config, self.state
        if state.step == 0 and not state.before:
            state.before = self.evaluate(config.eval_problems, config.eval_samples)
        if state.step == 0 and self.total == 0:
            self.save()  # the first weights as they are, for example a mean of several
        begun = False
        while state.step < self.total and not stop.asked:
            if not begun or state.step % self.steps == 0:
                self.begin_round(state.step // self.steps)
                begun = True
            metrics = self.step()
            if state.rounds and state.step % self.steps == 0:  # in the line of a step: a resume then repeats neither
                metrics |= {f"round/{name}": value for name, value in state.rounds[-1].items()}
                self.log.samples(state.step + 1, self.accepted(len(state.rounds)))
            state.step += 1
            last = state.step == self.total
            if not last and config.eval_every and state.step % config.eval_every == 0:
                self.evaluate(config.eval_problems_during, config.eval_samples_during)
            self.log.step(state.step, metrics | self.timer.pop())
            due = config.checkpoint_every and state.step % config.checkpoint_every == 0
            # the end of a round too: what the next one samples depends on it
            if due or stop.asked or last or state.step % self.steps == 0:
                self.save()
        if stop.asked and self.saved_step != state.step:
            self.save()

    def begin_round(self, number: int) -> None:
        """Makes the round's rows where it samples them; at its first step, starts its weights and its optimizer."""
        config, state = self.config, self.state
        if config.mode == "rft":
            path = self.round_file(number + 1)
            if len(state.rounds) <= number:
                self.sample(path, number)
            most = min(config.max_tokens, self.policy.config.max_positions)
            self.blend = file_blend(self.policy, "sft", [DataSpec(str(path))], most, config.seed + number)
        assert self.blend is not None
        digest = [s.digest() for s in self.blend.sources if isinstance(s, FileRows)]
        if state.step % self.steps == 0:
            state.digest, state.cursor = digest, 0
            if config.mode == "rft":
                if config.reset_to_base == "yes" and number > 0:
                    copy_weights(first_policy(config, self.policy.device), self.policy)
                    self.optimizer.read_weights()
                self.optimizer.restart(replace(self.common, stage_optimizer="fresh"), self.steps)
        elif digest != state.digest:
            raise UserError(
                f"--resume {self.out}: the rows of {', '.join(s.name for s in self.blend.sources)} are not those that "
                "the run was started with; put them back, or start a new run"
            )

    def sample(self, path: Path, number: int) -> None:
        """Samples a round's rows and writes them: what a person reads is what the round trains on."""
        config, state, c = self.config, self.state, self.common
        assert self.task is not None and self.engine is not None
        begun = len(self.policy.tokenizer.encode(config.hint)) if config.hint else 0
        room = self.policy.config.max_positions - c.max_new_tokens - begun
        with self.timer("prompt"):
            prompts = draw(self.policy, self.task, cursor=state.problem_cursor, count=config.problems, seed=config.seed,
                           max_tokens=min(c.max_prompt_tokens, room))  # fmt: skip
        with self.timer("rollout"):
            draws = Draws(
                config.samples_per_prompt, c.max_new_tokens, c.temperature, c.top_k, c.top_p, c.min_p, config.seed
            )
            found = collect(
                self.engine, self.task, prompts, config.rules(), draws, hint=config.hint, retro=config.retro()
            )
        shown = ", ".join(f"{n} {why.removeprefix('left_out/')}" for why, n in found.metrics.items() if "/" in why)
        if "revised" in found.metrics:
            shown += "; revised {revised}, {tokens_before} to {tokens_after} tokens".format_map(found.metrics)
        sampled = f"round {number + 1}: {len(found.rows)} of {found.metrics['responses']} responses accepted"
        self.log.note(f"{sampled} ({shown})" if shown else sampled)
        if not found.rows:
            raise UserError(
                f"{sampled} ({shown}); raise --problems or --samples-per-prompt, loosen the rules, or start from a "
                "model that solves some of the problems"
            )
        with explain_os_errors("write the accepted responses", path):
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, "".join(to_json(row) + "\n" for row in found.rows).encode())
        state.problem_cursor = prompts.cursor
        state.rounds.append(found.metrics)
        self.save()  # the sampling is not done twice

    def round_file(self, number: int) -> Path:
        return self.out / "rounds" / f"round-{number}.jsonl"

    def accepted(self, number: int) -> list[dict[str, Any]]:
        """The first rows of round `number` (from 1), for samples.jsonl."""
        rows = [row for _, row in read_objects(self.round_file(number))][: self.config.samples_per_step]
        return [{"problem": r["question"], "text": r["response"], "reward": 1.0} for r in rows]

    def step(self) -> dict[str, Any]:
        """One optimizer step."""
        config, state, timer = self.config, self.state, self.timer
        assert self.blend is not None
        begin = time.perf_counter()
        with timer("prompt"):
            drawn = self.blend.draw(state.cursor, config.rows_per_step)
            rollout, weight = pack(drawn.examples, self.policy.device)
        with timer("loss"):
            losses = self.losses(rollout, weight)
            nll = losses["nll"]
        with timer("optim"):
            report = self.optimizer.step(all(map(math.isfinite, losses.values())))
        self.count_skip(report.applied)
        trained = int(rollout.sampled_mask.sum())
        state.cursor, state.tokens = drawn.cursor, state.tokens + trained
        state.nll = [*state.nll[:1], nll]
        metrics: dict[str, Any] = {
            **losses, "grad_norm": report.grad_norm, "learning_rate": report.learning_rate, "tokens": state.tokens,
            "tokens_per_second": trained / (time.perf_counter() - begin), "rows/mean_tokens": rollout.tokens /
            rollout.rows, "rows/too_long": drawn.too_long, "updates/skipped": state.skipped,
        }  # fmt: skip
        if len(drawn.per_source) > 1:
            metrics |= {f"rows/source_{i + 1}": n for i, n in enumerate(drawn.per_source)}
        return metrics

    def losses(self, rollout: Rollout, weight: Tensor) -> dict[str, float]:
        """The step's means in nats, with their gradients: nll, and in mode distill teacher_kl."""
        config = self.config
        if self.teacher is None:
            return {"nll": float(supervised_loss(self.policy.model, rollout, weight, config.tokens_per_microbatch))}
        made = distillation_loss(
            self.policy, self.teacher, rollout, weight, config.tokens_per_microbatch, kl_weight=config.kl_weight,
            ce_weight=config.ce_weight,
        )  # fmt: skip
        return {"nll": float(made.nll), "teacher_kl": float(made.kl)}

    def count_skip(self, applied: bool) -> None:
        state = self.state
        state.skips_in_a_row = 0 if applied else state.skips_in_a_row + 1
        if applied:
            return
        state.skipped += 1
        self.log.note(f"step {state.step + 1}: update skipped (nan or infinity)")
        if state.skips_in_a_row >= MAX_SKIPS:
            raise UserError(
                f"{state.skips_in_a_row} updates in a row had nan or infinite losses or gradients and were skipped; "
                f"the checkpoints in {self.out / 'checkpoints'} are whole: lower --lr"
            )

    def evaluate(self, problems: int, samples: int) -> dict[str, float]:
        """pass@1, pass@8, diversity and lengths on the held-out problems of the task, if there is one, and the loss on
        the held-out rows, if there are any."""
        metrics: dict[str, float] = {}
        with self.timer("eval"):
            if self.held_out is not None:
                metrics["nll"] = held_out_nll(self.policy, self.held_out, self.config)
            if self.task is not None and self.engine is not None:
                result = evaluate(
                    self.engine, self.task, self.task.test(problems), samples=samples,
                    ks=[k for k in EVAL_KS if k <= samples], max_new_tokens=self.common.max_new_tokens,
                    max_prompt_tokens=self.common.max_prompt_tokens, temperature=self.common.temperature,
                )  # fmt: skip
                metrics |= result.metrics
                if result.too_long:
                    self.log.note(f"evaluation: {result.too_long} of {problems} prompts exceed --max-prompt-tokens and "
                                  "are left out")  # fmt: skip
        if metrics:
            self.log.eval(self.state.step, "eval", metrics)
        return metrics

    def save(self) -> None:
        if not all(bool(torch.isfinite(p).all()) for p in self.policy.model.parameters()):
            raise UserError(
                f"the weights hold nan or infinity after step {self.state.step}; they are not saved, and the earlier "
                f"checkpoints in {self.out / 'checkpoints'} are whole: lower --lr"
            )
        with self.timer("checkpoint"):
            self.state.wall_s = time.perf_counter() - self.started
            content = {
                "format": STATE_FORMAT, "kind": "sft", "optimizer": self.optimizer.state_dict(),
                "state": vars(self.state).copy(),
            }  # fmt: skip
            save_checkpoint(
                self.out, self.state.step, lambda folder: save(self.policy, folder), content,
                keep=self.config.keep_checkpoints,
            )  # fmt: skip
        self.saved_step = self.state.step

    def finish(self) -> None:
        """The evaluation after training, and summary.json. Without anything to evaluate on, before and after are the
        loss of the first and of the last step."""
        config, state = self.config, self.state
        before, after = state.before, self.evaluate(config.eval_problems, config.eval_samples)
        if not after and state.nll:
            before, after = {"nll": state.nll[0]}, {"nll": state.nll[-1]}
        wall = time.perf_counter() - self.started
        sources = [] if self.blend is None else self.blend.sources
        self.log.summary({
            "algo": config.mode, "task": config.task, "model": config.average_of or config.model, "seed": config.seed,
            "steps": state.step, "before": before, "after": after, "wall_s": wall, "tokens": state.tokens,
            "tokens_per_second": state.tokens / wall, "skipped_updates": state.skipped, "rounds": state.rounds,
            "left_out": {s.name: dict(s.left_out) for s in sources if isinstance(s, FileRows)},
        })  # fmt: skip


# --- weights ----------------------------------------------------------------------------------------------------------


def first_policy(config: SftConfig, device: torch.device) -> Policy:
    """The model that a run starts from: --model, or the mean of those of --average-of."""
    if config.average_of is None:
        return load_policy(config, config.model, device)
    paths = [path for path in config.average_of.split(",") if path]
    if len(paths) < 2:
        raise UserError(f"--average-of: expected two or more models, comma-separated, got {config.average_of!r}")
    policy = load_policy(config, paths[0], device)
    average_weights(policy, paths[1:], config, device)
    return policy


def first_teacher(config: SftConfig, device: torch.device) -> Policy:
    """The model of --teacher, or of --model where that is a transformer. Frozen."""
    teacher = load_policy(config, config.teacher or config.model, device)
    if config.teacher is None and teacher.config.mamba is not None:
        raise UserError(f"--model {config.model} is a hybrid: name the model to be like with --teacher")
    teacher.model.requires_grad_(False)
    return teacher


def first_student(config: SftConfig, teacher: Policy, device: torch.device) -> Policy:
    """What a distillation starts from: --model as it is where it is a hybrid, or a mean of models; else its start of
    M1. The teacher itself is that --model where no --teacher is named, and is not loaded twice."""
    policy = teacher if config.teacher is None else first_policy(config, device)
    if policy.config.mamba is None and config.average_of is None:
        kept = config.kept_layers()
        return to_hybrid(policy, spread_layers(policy.config.num_layers) if kept is None else kept, config.seed)
    if config.attention_layers is not None:
        raise UserError(f"--attention-layers: {config.model} is a hybrid already; leave it out to go on with it")
    return policy


def load_policy(config: SftConfig, path: str, device: torch.device) -> Policy:
    policy = load(path, device, devices.weight_dtype(config.dtype, device))
    return policy if config.prompt_style == "auto" else replace(policy, prompt_style=config.prompt_style)


@torch.no_grad()
def average_weights(policy: Policy, others: Sequence[str], config: SftConfig, device: torch.device) -> None:
    """Each weight of `policy` becomes the mean of its own and those of the other models, summed in fp64 (the checkpoint
    average of SSP, VibeThinker, and of model soups, arXiv 2203.05482)."""
    total = [p.double() for p in policy.model.parameters()]
    for path in others:
        other = load_policy(config, path, device)
        if [p.shape for p in other.model.parameters()] != [p.shape for p in total]:
            raise UserError(f"--average-of {path}: its weights have other shapes than those of {policy.path}")
        for t, p in zip(total, other.model.parameters(), strict=True):
            t.add_(p)
    for t, p in zip(total, policy.model.parameters(), strict=True):
        p.copy_(t / (1 + len(others)))


@torch.no_grad()
def copy_weights(source: Policy, target: Policy) -> None:
    """In place, as the engine and the optimizer hold the target's tensors."""
    for t, s in zip(target.model.parameters(), source.model.parameters(), strict=True):
        t.copy_(s)


# --- the plan ---------------------------------------------------------------------------------------------------------


def plan(config: SftConfig, common: TrainConfig, policy: Policy, device: torch.device) -> Memory:
    """What the run needs of the free memory; generation is that of the rounds, or of the evaluations."""
    rft, most = config.mode == "rft", min(config.max_tokens, policy.config.max_positions)
    tokens = min(max(config.tokens_per_microbatch, most), config.rows_per_step * most)  # of one forward pass
    asked = replace(
        common, tokens_per_microbatch=tokens, minibatches=1,
        prompts_per_step=config.problems if rft else config.eval_problems,
        samples_per_prompt=config.samples_per_prompt if rft else config.eval_samples,
    )  # fmt: skip
    return plan_memory(asked, policy, device)


def describe(
    config: SftConfig, policy: Policy, device: torch.device, threads: int, memory: Memory, blend: Blend | None,
    steps: int,
) -> list[str]:  # fmt: skip
    """The plan of a run, a few lines: model, memory, rows."""
    m = policy.config
    count = sum(p.numel() for p in policy.model.parameters())
    where = f"{threads} CPU threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    lines = [
        f"model     {config.average_of or config.model}: {count / 1e6:.2f}M parameters, {m.num_layers} layers, width "
        f"{m.hidden_size}, vocabulary {m.vocab_size}, {str(policy.model.dtype).removeprefix('torch.')}, prompts "
        f"'{policy.prompt_style}'",
        f"device    {device}: {where}; {WHY}",
    ]
    lines.append(memory.line(generates=config.task is not None))
    if memory.update + memory.activations > memory.free:
        lines.append("warning   this may not fit: lower --tokens-per-microbatch (activations) or --max-tokens")
    if blend is not None:
        total = sum(blend.counts)
        for source, share in zip(blend.sources, blend.counts, strict=True):
            text = f"data      {source.name}: {100 * share / total:.1f} % of the rows"
            if isinstance(source, FileRows):
                gone = ", ".join(f"{n} {why}" for why, n in source.left_out.items())
                text += f"; {len(source.examples):,} rows" + (f", left out: {gone}" if gone else "")
            lines.append(text)
    if config.mode == "distill":
        like = config.teacher or config.model
        lines.append(f"teacher   {like}; student: {shape_of(m) if m.mamba is not None else 'a transformer'}")
    if config.mode == "rft":
        lines.append(
            f"data      {config.task}: {config.rounds} rounds of {config.problems} problems x "
            f"{config.samples_per_prompt} responses of at most {config.max_new_tokens} tokens, kept: {config.accept}"
        )
    lines.append(
        f"step      {config.rows_per_step} rows of at most {min(config.max_tokens, m.max_positions)} tokens; "
        f"{steps} steps" + (" a round" if config.rounds > 1 else "")
    )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 with one sentence on stderr where the input cannot be used; 130 when interrupted."""
    return run_command(lambda: sft(parse_sft(None if argv is None else list(argv))))
