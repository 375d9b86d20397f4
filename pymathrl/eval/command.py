"""python -m pymathrl.eval: models on the held-out problems of tasks: pass@k, votes, diversity, lengths, side by side.

Every number has a 95 % interval over problems; two models or more are compared in pairs, on the same problems and the
same random numbers. With --out DIR the samples are kept as they come: the same command goes on where it was stopped,
and ends with the same numbers; DIR holds summary.json, table.md, plots.png, samples/*.jsonl and the times of
--budget-s, which compares models at equal time.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import math
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch

import pymathrl
from pymathrl import devices
from pymathrl.config import add_task_options
from pymathrl.errors import UserError
from pymathrl.eval.budget import Timing, search, time_batch
from pymathrl.eval.compare import Comparison, compare
from pymathrl.eval.plot import draw
from pymathrl.eval.record import Sample, record
from pymathrl.eval.sample import EVAL_STREAM, encode_all
from pymathrl.eval.store import Store, open_store
from pymathrl.eval.stream import stream
from pymathrl.eval.summary import Summary, summarize, verifier_of
from pymathrl.eval.table import budget_rows, comparison_rows, markdown, plain_table, score_rows, short_names
from pymathrl.files import explain_os_errors, write_atomic
from pymathrl.log import show_time, to_json
from pymathrl.metrics import TIES, token_budgets
from pymathrl.models import Policy, load
from pymathrl.options import CommandParser, run_command
from pymathrl.prompt import Prompts, stop_strings
from pymathrl.rollout import Draws, Engine
from pymathrl.tasks import TASK_HELP, Problem, Task, convert_option, load_task, task_options

LINE_S = 15.0  # between two lines of progress where standard error is no terminal
SAMPLED_WEIGHTS = 64  # of each parameter, for the fingerprint


@dataclass(frozen=True)
class Outcome:
    """A model on a task: the numbers, and the samples [P][n] of the problems. tokens and seconds: of this session."""

    summary: Summary
    problems: list[Problem]
    samples: list[list[Sample]]
    tokens: int
    seconds: float


def _parser(task_defaults: dict[str, Any]) -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m pymathrl.eval", description=__doc__, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--model", required=True, action="append", help="a folder in the Hugging Face layout (a checkpoint), a hub "
        "name, or builtin:tiny, builtin:tiny-m1; several: again, or by commas, compared with the first")  # fmt: skip
    add("--task", action="append", help=f"{TASK_HELP}; several: again, or comma-separated [countdown]")
    add("--split", help="of a file: all rows, or held-out: the eighth that no training of this package ever sees [all]")
    add("--problems", type=int, help="held-out problems [1024 generated ones, or every row of a file]")
    add("--n", type=int, default=64, help="responses sampled per problem [64]")
    add("--k", default="1,8,64",
        help="the k of pass@k and maj@k, comma-separated; those above --n are left out [1,8,64]")  # fmt: skip
    add("--budget-s", metavar="S[,S...]", help="votes at equal time: for each budget of seconds the vote of the most "
        "samples per problem, up to --n, whose generation fits it. A budget is for all problems of a task together. "
        "Batches of 1, 2, 4, ... samples per problem, and those between that the budgets ask for, are drawn and timed "
        "by themselves, without grading, after an untimed one that fills the --rows; nothing is extrapolated. In all "
        "this takes some 5 to 8 times the largest budget, beside the evaluation")  # fmt: skip
    add("--ties", default=TIES[0], choices=TIES, help="which of several largest groups of answers wins a vote: a share "
        "each, the first, the one with the likeliest or the shortest response [expected]")  # fmt: skip
    add("--temperature", type=float, default=1.0, help="sampling temperature; 0 = greedy [1.0]")
    add("--top-p", type=float, default=1.0, help="nucleus mass [1.0]")
    add("--top-k", type=int, default=0, help="most likely tokens kept; 0 = all [0]")
    add("--min-p", type=float, default=0.0, help="tokens below this share of the top probability are cut [0]")
    add("--max-new-tokens", type=int, help="length limit of a response, in tokens; one that is cut off counts as wrong "
        "[64 for the built-in model, else 1024]")  # fmt: skip
    add("--max-prompt-tokens", type=int, default=1024,
        help="problems with longer prompts are left out, and counted [1024]")  # fmt: skip
    add("--rows", type=int, default=512, help="responses decoded side by side [512]")
    add("--seed", type=int, default=0, help="fixes the samples [0]")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    add("--dtype", default="auto", choices=("auto", "fp32", "bf16"),
        help="of weights and activations; auto: fp32 on a CPU, bf16 on a GPU [auto]")  # fmt: skip
    add("--threads", type=int, default=0, help="CPU threads; 0 = all cores [0]")
    add("--out", type=Path, metavar="DIR", help="folder for the samples, the tables and the picture; with what is "
        "there, the evaluation goes on")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write metrics and every graded response to this file")
    add_task_options(parser, task_defaults)
    return parser


def _names(given: Sequence[str], what: str) -> list[str]:
    """The names of a flag that may be repeated and may list several; a path with a comma in it is one name."""
    names = [name for text in given for name in ([text] if Path(text).exists() else text.split(",")) if name]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None or not names:
        raise UserError(f"{what}: expected different names, got {', '.join(map(repr, names)) or 'none'}")
    return names


def _check(args: argparse.Namespace) -> tuple[list[int], list[float]]:
    """Bounds of the options; the k and the budgets in seconds that are asked for."""
    for name, low in (("n", 1), ("rows", 1), ("max_prompt_tokens", 1), ("seed", 0), ("threads", 0), ("top_k", 0)):
        if getattr(args, name) < low:
            raise UserError(f"--{name.replace('_', '-')}: expected at least {low}, got {getattr(args, name)}")
    for name in ("problems", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1 or not 0 <= args.min_p <= 1:
        raise UserError(
            f"expected --temperature >= 0, --top-p in (0, 1] and --min-p in [0, 1], "
            f"got {args.temperature}, {args.top_p} and {args.min_p}"
        )
    try:
        wanted = sorted({int(k) for k in args.k.split(",")})
    except ValueError:
        raise UserError(f"--k: expected whole numbers like 1,8,64, got {args.k!r}") from None
    if wanted[0] < 1:
        raise UserError(f"--k: expected numbers of at least 1, got {args.k!r}")
    ks = [k for k in wanted if k <= args.n]
    if not ks:
        raise UserError(f"--k: expected a k of at most --n {args.n}, got {args.k!r}")
    return ks, _check_budgets(args)


def _check_budgets(args: argparse.Namespace) -> list[float]:
    if args.budget_s is None:
        return []
    try:
        budgets = sorted({float(budget) for budget in args.budget_s.split(",")})
    except ValueError:
        budgets = [math.nan]
    if not all(0 < budget < math.inf for budget in budgets):
        raise UserError(f"--budget-s: expected seconds above 0 like 5,20,80, got {args.budget_s!r}")
    if args.n < 2:
        raise UserError(f"--budget-s: a vote needs samples, expected --n of at least 2, got {args.n}")
    if args.temperature == 0:
        raise UserError("--budget-s: greedy samples are all the same, expected --temperature above 0, got 0")
    return budgets


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _load_tasks(names: Sequence[str], args: argparse.Namespace) -> dict[str, tuple[Task, dict[str, Any]]]:
    """Each task with the options that it was made with. An option goes to the tasks that have it."""
    split = {None: "all", "all": "all", "held-out": "hash"}.get(args.split)
    if split is None:
        raise UserError(f"--split: expected all or held-out, got {args.split!r}")
    known = {name: task_options(name) for name in names}
    if args.split is not None and not any("split" in options for options in known.values()):
        raise UserError(f"--split is for problem files; the problems of the task {names[0]} are all held out")
    tasks = {}
    for name, defaults in known.items():
        typed = {k: getattr(args, f"task_{k}") for k in defaults if k != "split"}
        options = {k: convert_option(name, k, v) for k, v in typed.items() if v is not None}
        if "split" in defaults:
            options["split"] = split
        task = load_task(name, **options)
        if options.get("split") == "all" and not getattr(task, "own_test", False):
            _note(f"every row of {name} is graded; rows that the model may have been trained on are not left out, see "
                  "--split held-out")  # fmt: skip
        for text in getattr(task, "notes", ()):
            _note(text)
        tasks[name] = task, defaults | options
    return tasks


def _run(argv: Sequence[str] | None) -> int:
    first = CommandParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task", action="append")
    task_names = _names(first.parse_known_args(argv)[0].task or ["countdown"], "--task")
    defaults = {k: v for name in task_names for k, v in task_options(name).items() if k != "split"}  # --split says it
    args = _parser(defaults).parse_args(argv)
    ks, budgets_s = _check(args)
    models = _names(args.model, "--model")
    device = devices.resolve(args.device)
    dtype = devices.weight_dtype(args.dtype, device)
    devices.set_threads(args.threads)
    tasks = _load_tasks(task_names, args)
    problems = {name: task.test(args.problems) for name, (task, _) in tasks.items()}
    for name, some in problems.items():
        if args.problems is not None and len(some) < args.problems:
            _note(f"{name} holds {len(some)} problems, fewer than the {args.problems} asked for")
    outcomes: list[Outcome] = []
    with nullcontext() if args.out is None else open_store(args.out) as store:
        if store is not None:
            names = ("n", "seed", "temperature", "top_p", "top_k", "min_p", "max_prompt_tokens")
            store.agree("sampling", "all", {name: getattr(args, name) for name in names})
        for model in models:
            policy = load(model, device, dtype)
            limit = args.max_new_tokens or (64 if policy.prompt_style == "compact" else 1024)
            if store is not None:
                store.agree("models", model, {
                    "weights": fingerprint(policy), "device": device.type, "dtype": str(dtype).removeprefix("torch."),
                    "max_new_tokens": limit,
                })  # fmt: skip
            engine = Engine(policy, max_batch=args.rows)
            for name, (task, options) in tasks.items():
                if store is not None:
                    store.agree("tasks", name, {
                        "options": options, "problems": len(problems[name]), "questions": _digest(problems[name]),
                        "verifier": verifier_of(task, problems[name]),
                    })  # fmt: skip
                outcomes.append(_evaluate(engine, model, name, task, problems[name], args, ks, budgets_s, limit, store))
            del policy, engine
            if model != models[-1]:  # two models at a time may not fit
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
        comparisons = _compare([o.summary for o in outcomes], models[0])
        settings = {k: v for k, v in vars(args).items() if k not in ("json", "out") and not k.startswith("task")}
        settings |= {"model": models, "task": task_names, "k": ks, "budget_s": budgets_s or None}
        for _, options in tasks.values():
            settings |= {f"task_{k}": v for k, v in options.items()}
        _print(args, outcomes, comparisons, models)
        if args.out is not None:
            _write_folder(args.out, settings, outcomes, comparisons, args.ties)
    if args.json is not None:
        _write(args.json, to_json(_record(settings, outcomes), indent=1).encode())
    return 0


def _evaluate(
    engine: Engine, model: str, name: str, task: Task, problems: Sequence[Problem], args: argparse.Namespace,
    ks: Sequence[int], budgets_s: Sequence[float], limit: int, store: Store | None,
) -> Outcome:  # fmt: skip
    begin = time.perf_counter()
    prompts = encode_all(engine.policy, task, problems, args.max_prompt_tokens)
    uids = [p.uid for p in prompts.problems]
    done = {} if store is None else store.read(model, name, uids, args.n)
    if done:
        _note(f"{model} on {name}: {len(done)} of {len(uids)} problems are there already")
    draws = Draws(args.n, limit, args.temperature, args.top_k, args.top_p, args.min_p, args.seed ^ EVAL_STREAM)
    budgets = token_budgets(limit)
    tokens = 0
    if len(done) < len(uids):
        if store is not None:
            store.rewrite(model, name, [s for rows in done.values() for s in rows])  # without half written lines
        tokens = _sample(engine, model, name, task, prompts, draws, budgets, done, store)
    rows = [done[uid] for uid in uids]
    if store is not None:
        store.rewrite(model, name, [s for row in rows for s in row])
    seconds = time.perf_counter() - begin
    timings = _time(engine, model, name, task, prompts, draws, budgets_s, store) if budgets_s else []
    summary = summarize(
        model, name, task, prompts.problems, rows, ks=ks, budgets=budgets, ties=args.ties, left_out=prompts.too_long,
        timings=timings, budgets_s=budgets_s,
    )  # fmt: skip
    return Outcome(summary, list(prompts.problems), rows, tokens, seconds)


def _sample(
    engine: Engine, model: str, name: str, task: Task, prompts: Prompts, draws: Draws, budgets: Sequence[int],
    done: dict[int, list[Sample]], store: Store | None,
) -> int:  # fmt: skip
    """Adds to `done` the samples of the problems that are not there, problem by problem as they are complete. Returns
    how many tokens were drawn. Verdicts are waited for one look later than they are asked for: meanwhile the next
    tokens are drawn."""
    todo = [at for at, p in enumerate(prompts.problems) if p.uid not in done]
    partial: dict[int, list[Sample]] = {}

    def keep(samples: Sequence[Sample]) -> None:
        complete: list[Sample] = []
        for sample in samples:
            some = partial.setdefault(sample.id, [])
            some.append(sample)
            if len(some) == draws.samples:
                done[sample.id] = sorted(partial.pop(sample.id), key=lambda s: s.sample)
                complete += done[sample.id]
        if store is not None and complete:
            store.add(model, name, complete)

    progress = Progress(f"{model} on {name}", len(prompts.problems), len(done), draws.samples)
    grading = None
    tokens = 0
    with closing(stream(engine, prompts, draws, todo, stop_strings(task))) as ended_responses:
        for ended in ended_responses:
            if grading is not None:
                keep(grading())
            at = [p for p, _ in ended.rows]
            grading = record(
                ended.rollout, [prompts.problems[p] for p in at], [prompts.ids[p] for p in at],
                [s for _, s in ended.rows], task, engine.policy.tokenizer, budgets,
            )  # fmt: skip
            tokens = ended.tokens
            progress.update(len(ended.rows), tokens)
    if grading is not None:
        keep(grading())
    progress.end()
    return tokens


def _time(
    engine: Engine, model: str, name: str, task: Task, prompts: Prompts, draws: Draws, budgets_s: Sequence[float],
    store: Store | None,
) -> list[Timing]:  # fmt: skip
    """The measured batches that say how many samples fit the budgets; those of an earlier session, on the same machine
    and with as many rows, are not measured again."""
    conditions = {"machine": devices.machine(engine.device), "rows": engine.max_batch}
    known = [] if store is None else store.read_times(model, name, conditions)
    if known:
        _note(f"{model} on {name}: the times of {', '.join(str(t.samples) for t in known)} samples are there already")
    problems = len(prompts.problems)
    warm = False

    def batch(samples: int, what: str) -> Timing:
        progress = Progress(f"{model} on {name}, {what}: {samples} per problem", problems, 0, samples)
        timing = time_batch(engine, prompts, replace(draws, samples=samples), stop_strings(task), progress.update)
        progress.end()
        return timing

    def measure(samples: int) -> Timing:
        nonlocal warm
        if not warm:  # caches grow, and a GPU's graphs are captured, for every number of rows down from the most
            batch(min(-(-engine.max_batch // problems), draws.samples), "warm-up")
            warm = True
        timing = batch(samples, "timed")
        if store is not None:
            store.add_time(model, name, timing, conditions)
        return timing

    return search(measure, budgets_s, draws.samples, known)


class Progress:
    """How far the responses are: one line that is written over on a terminal, plain lines elsewhere. On standard
    error."""

    def __init__(
        self, title: str, problems: int, done: int, samples: int, stream: TextIO | None = None
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._title, self._problems, self._samples = title, problems, samples
        self._first = self._responses = done * samples
        self._tokens = 0
        self._begin = self._shown = time.monotonic()

    def update(self, responses: int, tokens: int) -> None:
        """responses: that ended since the last call. tokens: drawn in all."""
        self._responses += responses
        self._tokens = tokens
        if self._stream.isatty():
            width = shutil.get_terminal_size().columns
            print(f"\r\x1b[K{self._text()[: width - 1]}", end="", file=self._stream, flush=True)
        elif time.monotonic() - self._shown >= LINE_S and self._responses < self._problems * self._samples:
            self._shown = time.monotonic()
            print(self._text(), file=self._stream, flush=True)

    def end(self) -> None:
        start = "\r\x1b[K" if self._stream.isatty() else ""
        print(f"{start}{self._text()}", file=self._stream, flush=True)

    def _text(self) -> str:
        seconds = max(time.monotonic() - self._begin, 1e-9)
        left, drawn = self._problems * self._samples - self._responses, self._responses - self._first
        eta = f", ETA {show_time(left * seconds / drawn)}" if left and drawn else ""
        return (
            f"{self._title}: {self._responses // self._samples}/{self._problems} problems, "
            f"{self._tokens / seconds:,.0f} tokens/s, {show_time(seconds)}{eta}"
        )


def fingerprint(policy: Policy) -> str:
    """16 hexadecimal digits that change with the weights: of the SHA-256 over names, shapes and 64 values of each
    parameter."""
    digest = hashlib.sha256()
    for name, parameter in sorted(policy.model.named_parameters()):
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // SAMPLED_WEIGHTS)].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def _digest(problems: Sequence[Problem]) -> str:
    text = repr([(p.uid, p.question, p.answer, sorted(p.meta.items())) for p in problems])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _compare(summaries: Sequence[Summary], base: str) -> list[Comparison]:
    """Each other model against the base, task by task."""
    bases = {s.task: s for s in summaries if s.model == base}
    pairs = [compare(bases[s.task], s) for s in summaries if s.model != base]
    return [c for c in pairs if c is not None]


# --- what comes out ---------------------------------------------------------------------------------------------------


def _print(
    args: argparse.Namespace, outcomes: Sequence[Outcome], comparisons: Sequence[Comparison], models: Sequence[str]
) -> None:
    for o in outcomes:
        s = o.summary
        left_out = f"; {s.left_out} with prompts over {args.max_prompt_tokens} tokens left out" if s.left_out else ""
        speed = ""
        if o.tokens:
            speed = f", {o.tokens:,} tokens in {show_time(o.seconds)}, {o.tokens / o.seconds:,.0f} tokens/s"
        print(
            f"{s.model} on {s.task}: {s.problems} problems x {s.samples} responses, "
            f"temperature {args.temperature:g}{speed}{left_out}"
        )
    print(f"\n{plain_table(score_rows([o.summary for o in outcomes], True))}")
    if args.budget_s is not None:
        print(f"\n{plain_table(budget_rows([o.summary for o in outcomes]))}")
    if comparisons:
        print(f"\n{plain_table(comparison_rows(comparisons, short_names(models), True))}")


def _write_folder(
    folder: Path, settings: dict[str, Any], outcomes: Sequence[Outcome], comparisons: Sequence[Comparison], ties: str
) -> None:
    summaries = [o.summary for o in outcomes]
    content = {
        "version": pymathrl.__version__, "settings": settings, "evaluations": [s.record() for s in summaries],
        "comparisons": [c.record() for c in comparisons],
    }  # fmt: skip
    lines = [f"{name}: {value}" for name, value in settings.items() if value is not None]
    _write(folder / "summary.json", (to_json(content, indent=1) + "\n").encode())
    _write(folder / "table.md", markdown(summaries, comparisons, lines, ties).encode())
    _write(folder / "plots.png", draw(summaries))
    print(f"\nfolder: {folder}")


def _write(path: Path, data: bytes) -> None:
    with explain_os_errors("write the evaluation", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)


def _record(settings: dict[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """settings, and of each model on each task: metrics, tokens, seconds, problems with their responses. Of one model
    on one task these stand beside the settings, of several in a list "evaluations"."""
    evaluations = []
    for o in outcomes:
        rows = []
        for problem, samples in zip(o.problems, o.samples, strict=True):
            responses = [
                {"text": s.response, "reward": s.reward, "correct": s.verdict, "reason": s.reason,
                 "stop": s.finish_reason, "tokens": s.n_tokens}
                for s in samples
            ]  # fmt: skip
            rows.append({"question": problem.question, "answer": problem.answer, "responses": responses})
        evaluations.append({
            "model": o.summary.model, "task": o.summary.task, "metrics": o.summary.metrics,
            "tokens": sum(s.n_tokens for row in o.samples for s in row), "seconds": o.seconds,
            **o.summary.time_record(), "problems": rows,
        })  # fmt: skip
    if len(evaluations) == 1:
        return {"settings": settings, **evaluations[0]}
    return {"settings": settings, "evaluations": evaluations}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, 2 with one sentence on stderr where the input cannot be used, 130 after Ctrl-C."""
    return run_command(lambda: _run(argv), interrupted="\ninterrupted; with --out the same command goes on from here")
