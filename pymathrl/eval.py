"""python -m pymathrl.eval: pass@k, diversity and length of a model on the held-out problems of a task.

Every sample comes from the same batched generation as training, and its random numbers depend only on (seed, problem,
sample): two models, or one model before and after training, are compared on the same draws.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymathrl import devices
from pymathrl.batch import STOP_LENGTH, STOP_NAMES, Rollout
from pymathrl.checkpoint import explain_os_errors, write_atomic
from pymathrl.config import add_task_options
from pymathrl.errors import UserError
from pymathrl.log import show_time, to_json
from pymathrl.metrics import completion_stats, evaluate_samples
from pymathrl.models import load
from pymathrl.options import CommandParser, run_command
from pymathrl.prompt import Prompts, encode
from pymathrl.rollout import Draws, Engine
from pymathrl.tasks import TASKS, Grade, Problem, Task, convert_option, load_task, task_options
from pymathrl.verify import verify

EVAL_STREAM = 0x65766131 << 32  # mixed into the seed: an evaluation never repeats a draw of a training rollout


@dataclass(frozen=True)
class Evaluation:
    """metrics: pass@k with its standard error over problems, diversity, coverage, lengths; lists per problem."""

    metrics: dict[str, float]
    problems: list[Problem]
    grades: list[list[Grade]]
    texts: list[list[str]]
    stops: list[list[str]]
    lengths: list[list[int]]
    tokens: int  # generated
    seconds: float
    too_long: int  # problems left out because of their prompt's length


def evaluate(
    engine: Engine,
    task: Task,
    problems: Sequence[Problem],
    *,
    samples: int,
    ks: Sequence[int],
    max_new_tokens: int,
    max_prompt_tokens: int,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    on_progress: Callable[[int, int], None] | None = None,
    rollout: Callable[[Prompts, Draws], Rollout] | None = None,
) -> Evaluation:
    """Samples `samples` responses per problem and grades them. pass@k counts exact correctness, never the reward.

    on_progress(done, total) is called every few tokens, in problems: done is what the finished responses amount to.
    rollout: writes the responses in the place of the engine's plain generation (then without progress).
    """
    policy = engine.policy
    start = time.perf_counter()
    encoded = [(p, encode(policy, task, p)) for p in problems]
    kept = [(p, ids) for p, ids in encoded if len(ids) <= max_prompt_tokens]
    if not encoded:
        raise UserError(f"no problem to evaluate: the task {task.name} holds out none")
    if not kept:
        raise UserError(
            f"no problem to evaluate: all {len(problems)} prompts of the task {task.name} "
            f"exceed {max_prompt_tokens} tokens"
        )
    chosen = [p for p, _ in kept]

    def progress(finished: int, responses: int, tokens: int) -> None:
        if on_progress is not None:
            on_progress(finished // samples, len(kept))

    draws = Draws(samples, max_new_tokens, temperature, top_k, top_p, min_p, seed ^ EVAL_STREAM)
    ids = [ids for _, ids in kept]
    # one call: a cut into parts would wait for the slowest response of each with most rows idle
    drawn = rollout(Prompts(chosen, ids), draws) if rollout is not None else engine.generate(
        ids, samples, max_new_tokens, seed=draws.seed, uids=draws.uids(chosen), **draws.sampling, on_progress=progress
    )  # fmt: skip
    drawn = drawn.main
    verdicts = verify(drawn, chosen, task, policy.tokenizer)
    groups = [slice(i * samples, (i + 1) * samples) for i in range(len(kept))]
    stop, length = [STOP_NAMES[s] for s in drawn.stop.tolist()], drawn.response_lengths.tolist()
    grades, texts = [verdicts.grades[g] for g in groups], [verdicts.texts[g] for g in groups]
    stops, lengths = [stop[g] for g in groups], [length[g] for g in groups]
    metrics = evaluate_samples(
        [[g.correct for g in row] for row in grades], [[g.canonical for g in row] for row in grades], ks
    )
    metrics.update(completion_stats(length, [s == STOP_NAMES[STOP_LENGTH] for s in stop]))
    seconds = time.perf_counter() - start
    return Evaluation(metrics, chosen, grades, texts, stops, lengths, sum(length), seconds, len(encoded) - len(kept))


def _parser(task_defaults: dict[str, Any]) -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m pymathrl.eval", description=__doc__, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add(
        "--model", required=True, help="a folder in the Hugging Face layout (a checkpoint), a hub name, or builtin:tiny"
    )
    add("--task", default="countdown", help="a task or a problem file PATH.jsonl, all rows of it [countdown]")
    add("--split", help="of a file: all rows, or held-out: the eighth that no training of this package ever sees [all]")
    add("--problems", type=int, help="held-out problems [1024 generated ones, or every row of a file]")
    add("--n", type=int, default=64, help="responses sampled per problem [64]")
    add("--k", default="1,8,64", help="the k of pass@k, comma-separated; those above --n are left out [1,8,64]")
    add("--temperature", type=float, default=1.0, help="sampling temperature; 0 = greedy [1.0]")
    add("--top-p", type=float, default=1.0, help="nucleus mass [1.0]")
    add("--top-k", type=int, default=0, help="most likely tokens kept; 0 = all [0]")
    add("--min-p", type=float, default=0.0, help="tokens below this share of the top probability are cut [0]")
    add(
        "--max-new-tokens",
        type=int,
        help="length limit of a response, in tokens [64 for the built-in model, else 1024]",
    )
    add(
        "--max-prompt-tokens",
        type=int,
        default=1024,
        help="problems with longer prompts are left out, and counted [1024]",
    )
    add("--rows", type=int, default=512, help="responses decoded side by side [512]")
    add("--seed", type=int, default=0, help="fixes the samples [0]")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    add("--dtype", default="auto", choices=("auto", "fp32", "bf16"),
        help="of weights and activations; auto: fp32 on a CPU, bf16 on a GPU [auto]")  # fmt: skip
    add("--threads", type=int, default=0, help="CPU threads; 0 = all cores [0]")
    add("--json", help="write metrics and every graded response to this file")
    add_task_options(parser, task_defaults)
    return parser


def _run(argv: Sequence[str] | None) -> int:
    first = CommandParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task", default="countdown")
    name = first.parse_known_args(argv)[0].task
    defaults = {k: v for k, v in task_options(name).items() if k != "split"}  # --split says it
    args = _parser(defaults).parse_args(argv)
    typed = {k: getattr(args, f"task_{k}") for k in defaults}
    options = {k: convert_option(name, k, v) for k, v in typed.items() if v is not None}
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
    device = devices.resolve(args.device)
    devices.set_threads(args.threads)
    if args.split is not None and args.task in TASKS:
        raise UserError(f"--split is for problem files; the problems of the task {args.task} are all held out")
    split = {None: "all", "all": "all", "held-out": "hash"}.get(args.split)
    if split is None:
        raise UserError(f"--split: expected all or held-out, got {args.split!r}")
    task = load_task(args.task, **options, **({} if args.task in TASKS else {"split": split}))
    if args.task not in TASKS and split == "all":
        print("note: every row of the file is graded; rows that the model may have been trained on are not left out, "
              "see --split held-out", file=sys.stderr)  # fmt: skip
    policy = load(args.model, device, devices.weight_dtype(args.dtype, device))
    limit = args.max_new_tokens or (64 if policy.prompt_style == "compact" else 1024)
    problems = task.test(args.problems)
    if args.problems is not None and len(problems) < args.problems:
        print(
            f"note: {args.task} holds {len(problems)} problems, fewer than the {args.problems} asked for",
            file=sys.stderr,
        )
    tty = sys.stderr.isatty()

    def progress(done: int, total: int) -> None:
        if tty:
            print(f"\r{done}/{total} problems", end="" if done < total else "\n", file=sys.stderr, flush=True)

    result = evaluate(
        Engine(policy, max_batch=args.rows), task, problems, samples=args.n, ks=ks, max_new_tokens=limit,
        max_prompt_tokens=args.max_prompt_tokens, seed=args.seed, temperature=args.temperature, top_k=args.top_k,
        top_p=args.top_p, min_p=args.min_p, on_progress=progress,
    )  # fmt: skip
    _print(args, ks, result)
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"} | {"max_new_tokens": limit}
        settings |= {f"task_{k}": v for k, v in (defaults | options).items()}
        path = Path(args.json)
        with explain_os_errors("write the evaluation", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, to_json(_record(settings, result), indent=1).encode())
    return 0


def _print(args: argparse.Namespace, ks: Sequence[int], result: Evaluation) -> None:
    m = result.metrics
    print(
        f"{args.model} on {args.task}: {len(result.grades)} problems x {args.n} responses, "
        f"temperature {args.temperature:g}"
    )
    if result.too_long:
        print(f"  left out        {result.too_long} problems with prompts over {args.max_prompt_tokens} tokens")
    for k in ks:
        print(
            f"  pass@{k:<10} {100 * m[f'pass@{k}']:6.2f} % +- {100 * m[f'pass@{k}_se']:.2f} "
            "(standard error over problems)"
        )
    print(
        f"  diversity       {m['diversity']:6.2f} distinct correct solutions per solved problem "
        f"({100 * m['coverage']:.1f} % solved)"
    )
    print(
        f"  response length {m['completions/mean_length']:6.1f} tokens, "
        f"{100 * m['completions/clipped_ratio']:.1f} % cut off"
    )
    print(f"  {result.tokens:,} tokens in {show_time(result.seconds)}, {result.tokens / result.seconds:,.0f} tokens/s")


def _record(settings: dict[str, Any], result: Evaluation) -> dict[str, Any]:
    rows = []
    for problem, grades, texts, stops, lengths in zip(
        result.problems, result.grades, result.texts, result.stops, result.lengths, strict=True
    ):
        responses = [
            {"text": t, "reward": g.reward, "correct": g.correct, "reason": g.reason, "stop": s, "tokens": n}
            for t, g, s, n in zip(texts, grades, stops, lengths, strict=True)
        ]
        rows.append({"question": problem.question, "answer": problem.answer, "responses": responses})
    return {
        "settings": settings,
        "metrics": result.metrics,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "problems": rows,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one sentence on stderr where the input cannot be used."""
    return run_command(lambda: _run(argv), interrupted="interrupted")


if __name__ == "__main__":
    sys.exit(main())
