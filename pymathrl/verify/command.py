"""python -m pymathrl.verify: whether an answer equals the gold answer, which stage decided, and why.

    python -m pymathrl.verify --gold "\\frac{1}{2}" --answer 0.5
    python -m pymathrl.verify --gold "\\frac{1}{2}" --response "So it is \\boxed{0.5}." --mode boxed
    python -m pymathrl.verify --response "So it is \\boxed{0.5}."                 what the response states, ungraded
    python -m pymathrl.verify --file CASES.jsonl --json VERDICTS.jsonl

CASES.jsonl has an object per line: "answer", or "response" with or without "mode", and "gold", a text or a list of
texts of which one must be equal; without "gold" the answer is only extracted. "expected" is the verdict that the row
should get (true, false, 1 or 0; of a row without "gold" the text, or null), and an option of the policy may stand
under its name, as in "choice": true. Other fields are ignored.

Exit code: of a single pair 0 where it is equal, else 1; of a file 0, but 1 where a verdict differs from "expected"; 2
where the input cannot be used.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pymathrl.errors import UserError
from pymathrl.files import explain_os_errors, write_atomic
from pymathrl.options import CommandParser, convert, flag, run_command
from pymathrl.tasks.jsonl import fail, read_objects
from pymathrl.verify.extract import MODES, extract
from pymathrl.verify.policy import Policy, Result
from pymathrl.verify.pool import VerifierPool, result_of

AHEAD = 1024  # rows of a file that are being decided at a time
SHOWN = 48  # characters of a gold or an answer in a line of the table
EXTRACTED = "extract"  # the stage of a row without gold

# What --help says of each field of `Policy`.
POLICY_HELP = {
    "choice": "the problems are multiple choice",
    "decimal_digits": "least significant digits of a decimal for a value that does not terminate",
    "decimal_round": "a gold decimal takes an answer that rounds to it",
    "abs_tol": "numbers are right within this much of the gold",
    "rel_tol": "numbers are right within this share of the gold",
    "percent": "where one side alone has a percent sign, n%% may be n / 100 too",
    "require_form": "reduced, evaluated, factored or expanded: only this form of the value counts",
}


@dataclass(frozen=True)
class Case:
    """One question. answer None: it is extracted from the response. golds (): nothing to compare with. expected: None
    if there is none; an extraction's is a tuple of the text or None."""

    golds: tuple[str, ...]
    answer: str | None
    response: str
    mode: str
    cfg: Policy
    expected: bool | tuple[str | None] | None = None
    line: int = 0


def ask(pool: VerifierPool, case: Case) -> Callable[[], Result]:
    """Begins with the case; the function that is returned waits for its result."""
    answer = extract(case.response, case.mode) if case.answer is None else case.answer
    if not case.golds or answer is None:
        reason = "no answer" if answer is None else f"mode {case.mode}"
        result = Result(float(answer is not None), answer, reason, EXTRACTED)
        return lambda: result
    verdict = pool.decide(case.golds, answer, case.cfg)
    return lambda: result_of(answer, verdict.result())


def agrees(case: Case, result: Result) -> bool:
    """Whether the result is what the case expects, or it expects nothing."""
    if isinstance(case.expected, tuple):
        return case.expected[0] == result.extracted
    return case.expected in (None, result.correct)


def read_cases(path: Path, mode: str, cfg: Policy) -> list[Case]:
    """The cases of a file; `mode` and `cfg` where a row says nothing else. A defect is a UserError with its line."""
    return [_case(path, line, row, mode, cfg) for line, row in read_objects(path)]


def _case(path: Path, line: int, row: dict[str, Any], mode: str, cfg: Policy) -> Case:
    gold = row.get("gold", [])
    golds = (gold,) if isinstance(gold, str) else tuple(gold) if isinstance(gold, list) else None
    if golds is None or not all(isinstance(g, str) for g in golds) or ("gold" in row and not golds):
        fail(path, line, row, "gold", "a text, or a list of texts")
    if ("answer" in row) == ("response" in row):
        raise UserError(f"{path}, line {line}: expected either 'answer' or 'response', got {', '.join(row) or 'none'}")
    asked = "answer" if "answer" in row else "response"
    if not isinstance(row[asked], str):
        fail(path, line, row, asked, "a text")
    if asked == "answer" and not golds:
        fail(path, line, row, "gold", "a text, or a list of texts")
    mode = row.get("mode", mode)
    if not isinstance(mode, str) or mode not in MODES:
        fail(path, line, row, "mode", f"one of {', '.join(MODES)}")
    expected = row.get("expected")
    if not golds and "expected" in row:
        if not isinstance(expected, str | None):
            fail(path, line, row, "expected", "the text that is extracted, or null")
        expected = (expected,)
    elif expected is not None:
        if expected not in (0, 1):
            fail(path, line, row, "expected", "true, false, 1 or 0")
        expected = bool(expected)
    own = {f.name: row[f.name] for f in fields(Policy) if f.name in row}
    cfg = _policy(cfg, own, lambda name: f"{path}, line {line}: field '{name}'")
    return Case(golds, row.get("answer"), row.get("response", ""), mode, cfg, expected, line)


def _policy(cfg: Policy, changes: dict[str, Any], source: Callable[[str], str]) -> Policy:
    """The policy with these fields changed, which are checked; source(name) names where one stands."""
    for name, value in changes.items():
        if not isinstance(getattr(cfg, name), bool):
            value = convert(Policy, name, value, source(name))
        elif not isinstance(value, bool):
            raise UserError(f"{source(name)}: expected true or false, got {value!r}")
        try:
            cfg = replace(cfg, **{name: value})
        except ValueError as error:
            raise UserError(f"{source(name)}: {error}") from None
    return cfg


def results(pool: VerifierPool, cases: Sequence[Case]) -> Iterator[Result]:
    """The result of each case, in their order; the pool works on the next ones meanwhile."""
    waiting: deque[Callable[[], Result]] = deque()
    for case in cases:
        waiting.append(ask(pool, case))
        if len(waiting) > AHEAD:
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()


def word(case: Case, result: Result) -> str:
    """What is said of a case in one word."""
    if not case.golds:
        return "no answer" if result.extracted is None else "extracted"
    return "equal" if result.correct else "different"


def record(case: Case, result: Result) -> dict[str, Any]:
    """A line of --json."""
    row: dict[str, Any] = {"line": case.line} if case.line else {}
    if case.golds:
        row |= {"gold": list(case.golds), "equal": result.correct}
    if case.answer is None:
        row["mode"] = case.mode
    row |= {"answer": result.extracted, "stage": result.stage, "reason": result.reason}
    if case.expected is not None:
        row["agrees"] = agrees(case, result)
    return row


def _show(case: Case, result: Result) -> str:
    left = f"{case.line:>6}  " if case.line else ""
    texts = [*(_short(g) for g in case.golds), "-" if result.extracted is None else _short(result.extracted)]
    end = "" if agrees(case, result) else "   <- not as expected"
    return f"{left}{word(case, result):<9}  {result.stage:<8}  {result.reason:<28}  {' | '.join(texts)}{end}"


def _short(text: str) -> str:
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: SHOWN + 1])
    return shown if len(shown) <= SHOWN else f"{shown[: SHOWN - 3]}..."


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m pymathrl.verify", description=__doc__, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--gold", action="append", default=[], help="the gold answer; may be given again: one of them must be equal")
    add("--answer", help="the answer to grade")
    add("--response", help="a text that states the answer, in the place of --answer")
    add("--file", type=Path, help="cases to decide, an object per line")
    add("--mode", default="boxed", choices=tuple(MODES), help="how a response states its answer [boxed]")
    add("--json", type=Path, help="write an object per case to this file")
    add("--workers", type=int, default=1, help="processes that decide what is hard [1]")
    add("--deadline", type=float, default=2.0, help="seconds for one pair; then it is different, reason timeout [2]")
    policy = parser.add_argument_group("policy")
    for field in fields(Policy):
        meaning = POLICY_HELP[field.name]
        if isinstance(field.default, bool):
            shown = "on" if field.default else "off"
            policy.add_argument(
                flag(field.name), action=argparse.BooleanOptionalAction, default=None, help=f"{meaning} [{shown}]"
            )
        else:
            shown = "any" if field.default == "" else f"{field.default:g}"
            policy.add_argument(flag(field.name), help=f"{meaning} [{shown}]")
    return parser


def _run(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    changes = {f.name: getattr(args, f.name) for f in fields(Policy) if getattr(args, f.name) is not None}
    cfg = _policy(Policy(), changes, flag)
    if args.workers < 1 or not 0 < args.deadline < math.inf:
        raise UserError(
            f"expected --workers >= 1 and --deadline > 0 and finite, got {args.workers} and {args.deadline}"
        )
    if args.file is not None:
        if args.gold or args.answer is not None or args.response is not None:
            raise UserError("--file: its rows hold golds and answers; leave out --gold, --answer and --response")
        cases = read_cases(args.file, args.mode, cfg)
    else:
        if (args.answer is None) == (args.response is None):
            raise UserError("expected --gold with --answer or with --response, --response alone, or --file; see --help")
        if args.answer is not None and not args.gold:
            raise UserError("--answer: expected a --gold to compare it with")
        cases = [Case(tuple(args.gold), args.answer, args.response or "", args.mode, cfg)]
    begin = time.perf_counter()
    done = []
    with VerifierPool(args.workers, args.deadline) as pool:
        for case, result in zip(cases, results(pool, cases), strict=True):
            done.append(result)
            print(_show(case, result))
            _progress(len(done), len(cases))
    if args.json is not None:
        lines = [json.dumps(record(case, result)) for case, result in zip(cases, done, strict=True)]
        with explain_os_errors("write the verdicts", args.json):
            args.json.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(args.json, ("\n".join(lines) + "\n").encode())
    if args.file is None:
        return int(not done[0].correct)
    wrong = [case.line for case, result in zip(cases, done, strict=True) if not agrees(case, result)]
    _sum_up(cases, done, wrong, time.perf_counter() - begin)
    return int(bool(wrong))


def _progress(done: int, total: int) -> None:
    """On a terminal whose lines go elsewhere: how far it is."""
    if sys.stderr.isatty() and not sys.stdout.isatty() and (done == total or not done % 100):
        print(f"\r{done}/{total} cases", end="" if done < total else "\n", file=sys.stderr, flush=True)


def _sum_up(cases: Sequence[Case], done: Sequence[Result], wrong: Sequence[int], seconds: float) -> None:
    words = Counter(word(case, result) for case, result in zip(cases, done, strict=True))
    stages = Counter(result.stage for result in done)
    print(f"{len(done)} cases in {seconds:.2f} s: {', '.join(f'{n} {name}' for name, n in words.most_common())}")
    print(f"decided by: {', '.join(f'{name} {n}' for name, n in stages.most_common())}")
    expecting = sum(case.expected is not None for case in cases)
    if expecting:
        where = f"; not in line{'s' * (len(wrong) > 1)} {', '.join(map(str, wrong))}" if wrong else ""
        print(f"as expected: {expecting - len(wrong)} of {expecting}{where}")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code, as the text above says; 130 when interrupted."""
    return run_command(lambda: _run(argv), interrupted="interrupted")
