"""Grading by pymathrl.verify against Math-Verify, interleaved in one process, on pairs whose truth is known.

The mix: 10,000 different pairs of a gold answer and an answer, seeded, in equal shares integers, decimals, fractions,
radicals, tuples, sets, intervals, polynomials, matrices, percentages and units; every second answer is right. The
answer is the gold's value written another way, or the value of a changed gold written so; values are changed by exact
arithmetic, so the truth of a pair never depends on a grader. No pair is one of taste: a percentage is compared with the
number that it is, a unit stands on both sides and is the same or on one side alone.

Both get the response "The answer is $\\boxed{ANSWER}$." and the gold, ours as a string, Math-Verify as `$GOLD$`, parsed
for each pair as ours is. Chunks of pairs are graded by one and then by the other. Every verdict is compared with the
truth first; where ours is wrong anywhere, no speed is printed. Then the hang list: answers made to cost much, most
against the gold 7 and wrong, some right but hard to prove; the wall time of ours in this process with a pool of one
worker, and of Math-Verify in a process of its own that is killed after --guard seconds (its own limit is 5 s to parse
and 5 s to compare).

    python bench/vs_math_verify.py [--pairs 10000] [--chunk 100] [--seed 0] [--guard 15] [--quick]

A line per kind, the pairs that the two disagree on, a line per answer of the hang list, and a JSON object last.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import select
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common import _commit, quiet

from pymathrl import devices
from pymathrl.verify import VerifierPool, verify

WANTED = "math-verify latex2sympy2_extended"
DEADLINE_S = 2.0  # of our verifier: what an answer may cost before its worker is killed
SLACK_S = 0.5  # beyond the deadline: a kill and a process switch on a busy machine
WARM_PAIRS = 110  # before the clock runs: the parser that Math-Verify stands on learns its tables from what it reads
PRIMES = (2, 3, 5, 6, 7, 10, 11, 13, 15, 17)  # square-free, so that a\sqrt{b} is in simplest form


@dataclass(frozen=True)
class Pair:
    kind: str
    gold: str
    answer: str
    equal: bool


# --- pairs ------------------------------------------------------------------------------------------------------------


def _fraction(rng: random.Random, top: int = 60, bottom: int = 40) -> Fraction:
    """A fraction that is no integer."""
    while True:
        value = Fraction(rng.randint(-top, top), rng.randint(2, bottom))
        if value.denominator > 1:
            return value


def _tex(value: Fraction | int) -> str:
    """The usual way to write a rational."""
    value = Fraction(value)
    if value.denominator == 1:
        return str(value.numerator)
    sign = "-" if value < 0 else ""
    return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def _tex_unreduced(rng: random.Random, value: Fraction) -> str:
    k = rng.randint(2, 9)
    sign = "-" if value < 0 else ""
    return f"{sign}\\dfrac{{{abs(value.numerator) * k}}}{{{value.denominator * k}}}"


def _rational(rng: random.Random, value: Fraction) -> str:
    """One of the ways to write a rational."""
    sign, size = ("-" if value < 0 else ""), abs(value)
    if size.denominator == 1:
        return rng.choice([f"{sign}{size}", f"{sign}{size}.0", f"{sign}\\frac{{{2 * size}}}{{2}}"])
    return rng.choice(
        [
            f"{sign}\\frac{{{size.numerator}}}{{{size.denominator}}}",
            f"{sign}\\dfrac{{{size.numerator}}}{{{size.denominator}}}",
            f"{sign}{size.numerator}/{size.denominator}",
            _tex_unreduced(rng, value),
        ]
    )


def _thousands(value: int) -> str:
    return f"{value:,}"


def integers(rng: random.Random, equal: bool) -> tuple[str, str]:
    gold = rng.choice([rng.randint(-999, 999), rng.randint(1000, 9_999_999)])
    value = gold if equal else gold + rng.choice([-100, -10, -2, -1, 1, 2, 10, 1000])
    shift = rng.randint(1, 50)
    ways = [
        str(value),
        f"{value}.0",
        _thousands(value) if abs(value) > 999 else str(value),
        _thousands(value).replace(",", "{,}") if abs(value) > 999 else str(value),
        f"{value - shift} + {shift}",
        f"\\frac{{{value * shift}}}{{{shift}}}",
        f"x = {value}",
    ]
    return str(gold), rng.choice(ways)


def decimals(rng: random.Random, equal: bool) -> tuple[str, str]:
    digits = rng.randint(1, 4)
    gold = Fraction(rng.randint(1, 99_999) * 10 + rng.randint(1, 9), 10**digits)
    value = gold if equal else gold + Fraction(rng.choice([-1, 1]) * rng.randint(1, 9), 10**digits)
    text = f"{int(value * 10**digits):0{digits + 1}d}"
    text = f"{text[:-digits]}.{text[-digits:]}"
    ways = [text, text + "0", f"+{text}", _rational(rng, value), f"{int(value * 10**digits)} \\cdot 10^{{-{digits}}}"]
    whole = f"{int(gold * 10**digits):0{digits + 1}d}"
    return f"{whole[:-digits]}.{whole[-digits:]}", rng.choice(ways)


def fractions(rng: random.Random, equal: bool) -> tuple[str, str]:
    gold = _fraction(rng)
    value = gold
    if not equal:
        changed = [-gold, 1 / gold, gold + 1, gold + Fraction(1, gold.denominator), gold - Fraction(1, 7)]
        value = rng.choice([c for c in changed if c != gold])
    return _tex(gold), _rational(rng, value)


def _surd(a: Fraction | int, b: int, c: int, flip: bool) -> str:
    """a + b sqrt(c) in one of its two orders; a may be 0, b is a nonzero integer."""
    root = {1: "", -1: "-"}.get(b, str(b)) + f"\\sqrt{{{c}}}"
    if a == 0:
        return root
    if flip:
        return f"{root}{'+' if a > 0 else ''}{_tex(a)}"
    return f"{_tex(a)}{'' if root.startswith('-') else '+'}{root}"


def radicals(rng: random.Random, equal: bool) -> tuple[str, str]:
    a = rng.choice([0, 0, rng.randint(-20, 20), _fraction(rng, 20, 9)])
    b, c = rng.choice([-1, 1]) * rng.randint(1, 12), rng.choice(PRIMES)
    gold = _surd(a, b, c, flip=False)
    if not equal:
        b, c, a = rng.choice([(-b, c, a), (b, rng.choice([p for p in PRIMES if p != c]), a), (b, c, a + 1)])
    inside = f"{'-' if b < 0 else ''}\\sqrt{{{b * b * c}}}"
    ways = [_surd(a, b, c, flip=True)]
    ways.append(inside if a == 0 else f"{_tex(a)}{'' if b < 0 else '+'}{inside}")
    if a == 0:
        ways += [f"\\frac{{{b * c}}}{{\\sqrt{{{c}}}}}", f"{b} \\cdot \\sqrt{{{c}}}"]
    return gold, rng.choice(ways)


def _items(rng: random.Random, n: int) -> list[Fraction]:
    """n different rationals."""
    out: list[Fraction] = []
    while len(out) < n:
        value = rng.choice([Fraction(rng.randint(-30, 30)), _fraction(rng, 20, 9)])
        if value not in out:
            out.append(value)
    return out


def tuples(rng: random.Random, equal: bool) -> tuple[str, str]:
    items = _items(rng, rng.choice([2, 3]))
    gold = f"({', '.join(map(_tex, items))})"
    if not equal:
        swap, other = items[::-1], [*items[:-1], items[-1] + 1]
        items = rng.choice([swap, other])
    left, right = rng.choice([("(", ")"), ("\\left(", "\\right)")])
    return gold, f"{left}{', '.join(_rational(rng, v) for v in items)}{right}"


def sets(rng: random.Random, equal: bool) -> tuple[str, str]:
    items = _items(rng, rng.choice([2, 3, 4]))
    gold = f"\\{{{', '.join(map(_tex, items))}\\}}"
    shuffled = rng.sample(items, len(items))
    if not equal:
        shuffled = rng.choice([shuffled[:-1], [*shuffled[:-1], max(items) + 1], [*shuffled, max(items) + 1]])
    left, right = rng.choice([("\\{", "\\}"), ("\\left\\{", "\\right\\}")])
    return gold, f"{left}{', '.join(_rational(rng, v) for v in shuffled)}{right}"


def intervals(rng: random.Random, equal: bool) -> tuple[str, str]:
    low, high = sorted(_items(rng, 2))
    left, right = rng.choice("(["), rng.choice(")]")
    bounded = rng.random() < 0.7
    # (a,b] or [a,b) and not (a,b): two numbers in round brackets are a pair as well
    if bounded and (left, right) == ("(", ")"):
        left = "["
    if not bounded:
        right = ")"
    gold = f"{left}{_tex(low)},{_tex(high) if bounded else chr(92) + 'infty'}{right}"
    if not equal:
        low, left = rng.choice([(low - 1, left), (low, "(" if left == "[" else "[")])
        if bounded and (left, right) == ("(", ")"):
            right = "]"
            low -= 1
    end = _rational(rng, high) if bounded else rng.choice(["\\infty", "+\\infty"])
    ways = [f"\\left{left}{_rational(rng, low)}, {end}\\right{right}", f"{left}{_rational(rng, low)},{end}{right}"]
    if not bounded:
        ways.append(f"x {'>' if left == '(' else chr(92) + 'ge'} {_rational(rng, low)}")
    return gold, rng.choice(ways)


def _polynomial(coefficients: Sequence[int], order: Sequence[int]) -> str:
    """coefficients[i] of x^i, written in the given order of the powers."""
    text = ""
    for power in order:
        c = coefficients[power]
        if c == 0:
            continue
        symbol = {0: "", 1: "x"}.get(power, f"x^{power}")
        number = str(abs(c)) if abs(c) != 1 or power == 0 else ""
        text += ("-" if c < 0 else "+" if text else "") + number + symbol
    return text or "0"


def _factor(root: int, symbol: str = "x") -> str:
    return f"({symbol}{'-' if root > 0 else '+'}{abs(root)})"


def polynomials(rng: random.Random, equal: bool) -> tuple[str, str]:
    roots = [rng.choice([-1, 1]) * rng.randint(1, 9) for _ in range(rng.choice([2, 2, 3]))]
    coefficients = [1]
    for root in roots:
        shifted = [0, *coefficients]
        coefficients = [s - root * c for s, c in zip(shifted, [*coefficients, 0], strict=True)]
    falling = range(len(coefficients) - 1, -1, -1)
    gold = _polynomial(coefficients, falling)
    if not equal:
        if rng.random() < 0.5:
            roots[0] += 1 if roots[0] != -1 else 2
        else:
            coefficients[rng.randrange(len(coefficients) - 1)] += rng.choice([-1, 1])
            return gold, _polynomial(coefficients, rng.choice([falling, falling[::-1]]))
    else:
        roots = rng.sample(roots, len(roots))
    product = "".join(map(_factor, roots))
    expanded = [] if not equal else [_polynomial(coefficients, falling[::-1])]
    return gold, rng.choice([product, product.replace(")(", ") \\cdot ("), *expanded])


def matrices(rng: random.Random, equal: bool) -> tuple[str, str]:
    rows, columns = rng.choice([(2, 2), (3, 1), (2, 3)])
    items = _items(rng, rows * columns)

    def write(values: Sequence[Fraction], name: str, say: Callable[[Fraction], str]) -> str:
        lines = [" & ".join(map(say, values[i * columns : (i + 1) * columns])) for i in range(rows)]
        return f"\\begin{{{name}}}{f' {chr(92)}{chr(92)} '.join(lines)}\\end{{{name}}}"

    gold = write(items, "pmatrix", _tex)
    if not equal:
        place = rng.randrange(len(items))
        items = rng.choice([[*items[:place], items[place] + 1, *items[place + 1 :]], items[::-1]])
    return gold, write(items, rng.choice(["pmatrix", "bmatrix"]), lambda v: _rational(rng, v))


def percentages(rng: random.Random, equal: bool) -> tuple[str, str]:
    """A number and so many per cent; the wrong ones are neither the number nor a hundred times it."""
    percent = Fraction(rng.randint(1, 1999), rng.choice([1, 2, 4, 5, 10]))
    shown = percent if equal else percent + rng.choice([1, -1]) * Fraction(rng.randint(1, 9), 10)
    text = f"{float(shown):.10g}"
    return _tex(percent / 100), rng.choice(
        [f"{text}\\%", f"{text}%", f"{text} \\%", f"{text}0\\%" if "." in text else f"{text}.0\\%"]
    )


UNITS = ("cm", "km", "kg", "miles", "feet", "hours", "square units", "dollars", "cm^2", "cm^3")


def units(rng: random.Random, equal: bool) -> tuple[str, str]:
    value = rng.choice([Fraction(rng.randint(1, 5000)), abs(_fraction(rng))])
    unit = rng.choice(UNITS)
    word, _, power = unit.partition("^")
    text = f"\\text{{ {word}}}" + (f"^{power}" if power else "")
    shown = value if equal else value + rng.choice([1, 2, Fraction(1, 2)])
    gold = rng.choice([_tex(value), _tex(value) + text])
    return gold, rng.choice([_tex(shown) + text, _tex_unreduced(rng, shown) + text, _tex(shown)])


KINDS: dict[str, Callable[[random.Random, bool], tuple[str, str]]] = {
    f.__name__: f
    for f in (
        integers, decimals, fractions, radicals, tuples, sets, intervals, polynomials, matrices, percentages, units,
    )
}  # fmt: skip


def make_pairs(count: int, seed: int) -> list[Pair]:
    """`count` different pairs, the kinds in equal shares, right and wrong in turn, shuffled."""
    rng = random.Random(seed)
    pairs: dict[tuple[str, str], Pair] = {}
    names = list(KINDS)
    while len(pairs) < count:
        kind, equal = names[len(pairs) % len(names)], len(pairs) // len(names) % 2 == 0
        gold, answer = KINDS[kind](rng, equal)
        pairs.setdefault((gold, answer), Pair(kind, gold, answer, equal))
    out = list(pairs.values())
    rng.shuffle(out)
    return out


# --- graders ----------------------------------------------------------------------------------------------------------


def response(answer: str) -> str:
    return f"The answer is $\\boxed{{{answer}}}$."


def ours(pair: Pair) -> bool:
    return verify(response(pair.answer), pair.gold).correct


def theirs(pair: Pair) -> bool:
    """Math-Verify as its README shows it; where it raises, or its own alarm goes off, the answer is refused."""
    from math_verify import parse
    from math_verify import verify as compare

    return bool(compare(parse(f"${pair.gold}$"), parse(response(pair.answer))))


@dataclass
class Graded:
    """Verdicts of both by pair, and the seconds that each took for each chunk."""

    ours: list[bool]
    theirs: list[bool]
    ours_s: list[float]
    theirs_s: list[float]


def grade(
    pairs: Sequence[Pair], chunk: int, our_grader: Callable[[Pair], bool] = ours,
    their_grader: Callable[[Pair], bool] = theirs,
) -> Graded:  # fmt: skip
    """Both graders on every pair, chunk by chunk in turn; who begins alternates."""
    verdicts: dict[str, list[bool]] = {"ours": [], "theirs": []}
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    graders = [("ours", our_grader), ("theirs", their_grader)]
    for begin in range(0, len(pairs), chunk):
        for who, grader in graders:
            start = time.perf_counter()
            verdicts[who] += [grader(pair) for pair in pairs[begin : begin + chunk]]
            times[who].append(time.perf_counter() - start)
        graders.reverse()
        if sys.stderr.isatty():
            print(f"\r{begin + chunk:>7} of {len(pairs)} pairs", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)
    return Graded(verdicts["ours"], verdicts["theirs"], times["ours"], times["theirs"])


def agreement(pairs: Sequence[Pair], graded: Graded) -> list[dict[str, Any]]:
    """For each kind: pairs, right verdicts of ours and of theirs, and of each the equal pairs that it refuses and the
    different pairs that it accepts."""
    rows = []
    for kind in KINDS:
        index = [i for i, pair in enumerate(pairs) if pair.kind == kind]
        row: dict[str, Any] = {"kind": kind, "pairs": len(index)}
        for who, verdicts in (("ours", graded.ours), ("theirs", graded.theirs)):
            row[f"{who}_right"] = sum(verdicts[i] == pairs[i].equal for i in index)
            row[f"{who}_refuses_equal"] = sum(pairs[i].equal and not verdicts[i] for i in index)
            row[f"{who}_accepts_different"] = sum(verdicts[i] and not pairs[i].equal for i in index)
        rows.append(row)
    return rows


# --- the hang list ----------------------------------------------------------------------------------------------------

HANGS = (
    "9^{9^{9^{9}}}", "7^{7^{7^{7}}}", "10^{10^{10}}", "10^{10^{100}}", "2^{2^{2^{2^{2^{2}}}}}", "9^9^9^9",
    "\\frac{5^{(5^{(5^{(5^5)})}-4)}-5}{16}", "999999999!", "((10^6)!)!", "((((7!)!)!)!)!", "(10^{9})!",
    "\\frac{(10^6)!}{(10^6-1)!}", "\\binom{10^9}{10^8}", "\\binom{123456789}{61728394}",
    "(1+x)^{100000}", "(x+y+z+w)^{500}", "(1+\\sqrt2+\\sqrt3+\\sqrt5+\\sqrt7)^{200}", "(a+b)^{10^{6}}",
    "\\prod_{i=1}^{1000000} (x+i)", "\\prod_{k=1}^{10^{9}} k", "\\sum_{k=1}^{10^{12}} \\frac{1}{k}",
    "\\sum_{a=1}^{10^6}\\sum_{b=1}^{10^6} ab", "\\int_0^1 x^{x^{x}} dx",
    "\\int_{0}^{\\infty} \\frac{\\sin^7 x}{x^5} dx",
    "\\lim_{n\\to\\infty} n^n", "x^{2^{100000}}", "2^{-2^{2^{2^{2^{2}}}}}", "\\sqrt{2}^{10^{9}}", "1e999999999",
    "1e-999999999", "0.1^{10^{10}}", "\\log_{2} 3^{10^{10^{10}}}", "\\sin(10^{10^{10}})", "(3^{1/3}+2^{1/2})^{1000}",
    "\\sqrt{" * 60 + "2" + "}" * 60, "(" * 400 + "7" + ")" * 400, "\\frac{1}{1+" * 60 + "1" + "}" * 60,
    "+".join(f"\\sqrt{{{p}}}" for p in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29)), "1" * 1900, "7-" * 900 + "7",
    ",".join(str(i) for i in range(400)), "\\sin(" * 50 + "x" + ")" * 50,
    "\\frac{\\sin x+\\cos x+\\tan x+\\cot x}{\\sin^{9}x\\cos^{9}x+\\tan^{9}x}", "x^{y^{z^{x^{y^{z}}}}}",
    "\\sqrt[97]{3+\\sqrt[89]{2+\\sqrt[83]{5}}}",
)  # fmt: skip

# equal, and hard to prove: these reach SymPy, so that the deadline is at stake
IDENTITIES = (
    ("\\sin^{12} x", "(\\frac{1-\\cos 2x}{2})^6"),
    ("\\sin^{40}x+\\cos^{40}x", "(\\frac{1-\\cos 2x}{2})^{20}+(\\frac{1+\\cos 2x}{2})^{20}"),
    ("\\tan 8x",
     "\\frac{8\\tan x-56\\tan^3x+56\\tan^5x-8\\tan^7x}{1-28\\tan^2x+70\\tan^4x-28\\tan^6x+\\tan^8x}"),
    ("\\sin(a+b+c+d)", "\\sin(a+b)\\cos(c+d)+\\cos(a+b)\\sin(c+d)"),
    ("\\arctan x+\\arctan\\frac1x", "\\frac{\\pi|x|}{2x}"),
    ("\\ln(x+\\sqrt{x^2+1})", "\\frac12\\ln\\frac{\\sqrt{x^2+1}+x}{\\sqrt{x^2+1}-x}"),
    ("\\cos^{-1}(\\cos^{30}x)", "\\cos^{-1}((\\frac{1+\\cos 2x}{2})^{15})"),
    ("\\frac{\\sin 9x}{\\sin x}", "1+2\\cos 2x+2\\cos 4x+2\\cos 6x+2\\cos 8x"),
    ("(x+1)^{n}\\sqrt{x^{2n}+1}", "\\sqrt{(x+1)^{2n}(x^{2n}+1)}"),
    ("\\cosh(7x)", "64\\cosh^7x-112\\cosh^5x+56\\cosh^3x-7\\cosh x"),
    ("\\sin(\\sin(\\sin x))^2", "1-\\cos^2(\\sin(\\sin x))"),
)  # fmt: skip
HANG_LIST = tuple(Pair("hang", "7", answer, False) for answer in HANGS) + tuple(
    Pair("identity", gold, answer, True) for gold, answer in IDENTITIES
)


class Guarded:
    """Math-Verify in a process of its own, killed where one pair takes longer than `guard_s` seconds."""

    def __init__(self, guard_s: float) -> None:
        self.guard_s = guard_s
        self._process: subprocess.Popen[bytes] | None = None

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(Path(__file__).resolve()), "--their-worker"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":  # the imports are not part of the first answer's time
            raise SystemExit(f"error: the process with Math-Verify did not start: {' '.join(command)}")
        return process

    def grade(self, gold: str, answer: str) -> tuple[bool | None, float]:
        """The verdict, None where it was killed, and the seconds."""
        process = self._process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        begin = time.perf_counter()
        process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], self.guard_s)
        line = process.stdout.readline() if ready else b""
        took = time.perf_counter() - begin
        if line:
            return json.loads(line), took
        self.close()
        return None, took

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


def their_worker() -> int:
    """Reads [gold, answer] lines, writes a verdict for each."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be taken for a verdict
    theirs(Pair("", "1", "1", True))
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        print(json.dumps(theirs(Pair("", gold, answer, False))), file=out, flush=True)
    return 0


def hang_list(pairs: Sequence[Pair], guard_s: float) -> list[dict[str, Any]]:
    """Wall time and verdict of both on each pair."""
    short = lambda text: text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"
    guarded = Guarded(guard_s)
    rows = []
    try:
        with VerifierPool(workers=1, deadline_s=DEADLINE_S) as pool:
            # a pair that only a worker can tell, so that its start is not part of the first answer's time
            pool.map([(response("1-\\cos^2(\\sin(\\cos x))"), "\\sin(\\sin(\\cos x))^2", "boxed")])
            for pair in pairs:
                begin = time.perf_counter()
                result = pool.map([(response(pair.answer), pair.gold, "boxed")])[0]
                took = time.perf_counter() - begin
                verdict, their_s = guarded.grade(pair.gold, pair.answer)
                rows.append(
                    {
                        "gold": pair.gold, "answer": short(pair.answer), "equal": pair.equal, "ours_s": took,
                        "ours_accepts": result.correct, "ours_reason": result.reason, "theirs_s": their_s,
                        "theirs_accepts": verdict, "theirs_killed": verdict is None,
                    }
                )  # fmt: skip
    finally:
        guarded.close()
    return rows


# --- the report -------------------------------------------------------------------------------------------------------


def report_pairs(pairs: Sequence[Pair], graded: Graded, shown: int) -> dict[str, Any]:
    """Prints the agreement, then the speeds; raises SystemExit without speeds where ours is wrong anywhere."""
    rows = agreement(pairs, graded)
    print(
        f"\n{'kind':<13} {'pairs':>6} | {'ours right':>10} {'FN':>4} {'FP':>4} | "
        f"{'theirs right':>12} {'FN':>4} {'FP':>4}"
    )
    total = {key: sum(row[key] for row in rows) for key in rows[0] if key != "kind"}
    for row in [*rows, {"kind": "all", **total}]:
        print(
            f"{row['kind']:<13} {row['pairs']:>6} | {row['ours_right']:>10} {row['ours_refuses_equal']:>4} "
            f"{row['ours_accepts_different']:>4} | {row['theirs_right']:>12} {row['theirs_refuses_equal']:>4} "
            f"{row['theirs_accepts_different']:>4}"
        )
    print("FN: equal pairs refused, FP: different pairs accepted, by the truth of the construction")
    verdicts = list(zip(graded.ours, graded.theirs, strict=True))
    table = Counter(verdicts)
    counts = {
        "both_equal": table[True, True], "both_different": table[False, False],
        "only_ours_equal": table[True, False], "only_theirs_equal": table[False, True],
    }  # fmt: skip
    print("agreement: " + ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in counts.items()))
    apart = [(pair, o, t) for pair, (o, t) in zip(pairs, verdicts, strict=True) if o != t]
    for pair, mine, _ in apart[:shown]:
        who = "ours" if mine == pair.equal else "Math-Verify"
        truth = "equal" if pair.equal else "different"
        print(f"  {pair.kind}: {pair.gold}  |  {pair.answer}  ->  {truth}: {who} is right")
    if len(apart) > shown:
        print(f"  and {len(apart) - shown} more (--show {len(apart)})")
    wrong = [pair for pair, mine in zip(pairs, graded.ours, strict=True) if mine != pair.equal]
    if wrong:
        listed = "\n".join(
            f"  {p.kind}: {p.gold}  |  {p.answer}  ->  {'equal' if p.equal else 'different'}" for p in wrong[:20]
        )
        raise SystemExit(f"error: ours is wrong on {len(wrong)} of {len(pairs)} pairs, no speed is reported:\n{listed}")
    ratios = [t / o for o, t in zip(graded.ours_s, graded.theirs_s, strict=True)]
    x = statistics.median(ratios)
    speed = {who: len(pairs) / sum(times) for who, times in (("ours", graded.ours_s), ("theirs", graded.theirs_s))}
    low, high = (statistics.quantiles(ratios, n=5)[i] for i in (0, 3)) if len(ratios) > 1 else (x, x)
    print(
        f"ours {speed['ours']:,.0f} pairs/s | Math-Verify {speed['theirs']:,.0f} pairs/s | {x:.1f}x, median of "
        f"{len(ratios)} chunks (p20 {low:.1f}, p80 {high:.1f})",
        flush=True,
    )
    return {
        "pairs": len(pairs), **counts, "ours_pairs_s": speed["ours"], "theirs_pairs_s": speed["theirs"], "x": x,
        "x_p20": low, "x_p80": high, "kinds": rows,
        "disagreements": [
            {**asdict(pair), "right": "ours" if mine == pair.equal else "theirs"} for pair, mine, _ in apart
        ],
    }  # fmt: skip


def report_hangs(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Prints the hang list; raises SystemExit where ours accepts a wrong answer or takes longer than its deadline."""
    print(f"\n{'hang list':<74} {'ours':>17} {'Math-Verify':>20}")
    say = {True: "equal", False: "different", None: "killed"}
    for row in rows:
        pair = f"{row['gold']}  |  {row['answer']}"
        print(
            f"{pair:<74} {row['ours_s']:>6.3f} s {say[row['ours_accepts']]:<9} {row['theirs_s']:>8.3f} s "
            f"{say[row['theirs_accepts']]:<9} {'(they are equal)' if row['equal'] else ''}"
        )
    worst, theirs_worst = max(row["ours_s"] for row in rows), max(row["theirs_s"] for row in rows)
    limit = DEADLINE_S + SLACK_S
    print(f"worst: ours {worst:.3f} s (limit {limit:.1f} s), Math-Verify {theirs_worst:.3f} s", flush=True)
    accepted = [row["answer"] for row in rows if row["ours_accepts"] and not row["equal"]]
    if accepted:
        raise SystemExit(f"error: ours accepts {accepted}")
    if worst > limit:
        raise SystemExit(f"error: ours took {worst:.3f} s on one answer, more than {limit:.1f} s")
    return {
        "pairs": len(rows), "ours_worst_s": worst, "theirs_worst_s": theirs_worst, "deadline_s": DEADLINE_S,
        "theirs_killed": sum(row["theirs_killed"] for row in rows), "rows": list(rows),
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of what is compared; exits with what to install where a package is missing."""
    try:
        import math_verify  # noqa: F401

        found = {name: version(name) for name in ("math-verify", "latex2sympy2_extended", "sympy")}
    except (ImportError, PackageNotFoundError) as error:
        raise SystemExit(f"error: {error.name or error} is not installed; pip install {WANTED}") from None
    return {**found, "python": platform.python_version(), "commit": _commit()}


def _rounded(value: Any) -> Any:
    """Floats to four digits, in depth."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10_000, help="pairs of the mix [10000]")
    parser.add_argument("--chunk", type=int, default=100, help="pairs that one grades before the other does [100]")
    parser.add_argument("--seed", type=int, default=0, help="of the mix [0]")
    parser.add_argument("--guard", type=float, default=15.0, help="seconds before Math-Verify is killed [15]")
    parser.add_argument("--show", type=int, default=40, help="disagreements that are printed [40]; all are in the JSON")
    parser.add_argument("--quick", action="store_true", help="110 pairs, two of the hang list: does it work at all")
    parser.add_argument("--their-worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.pairs < 1 or args.chunk < 1 or args.guard <= 0:
        parser.error("--pairs and --chunk must be at least 1, --guard more than 0")
    quiet()
    logging.disable(logging.CRITICAL)  # Math-Verify logs each of its time-outs
    found = versions()
    if args.their_worker:
        return their_worker()
    hangs = HANG_LIST
    if args.quick:
        args.pairs, args.chunk, args.guard, hangs = 110, 22, 2.0, HANG_LIST[:1] + HANG_LIST[-1:]
    print(f"{devices.processor()} | " + ", ".join(f"{k} {v}" for k, v in found.items()), flush=True)
    load = os.getloadavg()[0]  # in the result: how busy the machine was, 1 is this process alone
    grade(make_pairs(22 if args.quick else WARM_PAIRS, args.seed + 1), WARM_PAIRS)
    pairs = make_pairs(args.pairs, args.seed)
    mix = report_pairs(pairs, grade(pairs, args.chunk), args.show)
    hang = report_hangs(hang_list(hangs, args.guard))
    row = {
        "bench": "vs_math_verify",
        "machine": devices.processor(),
        "seed": args.seed,
        "load": max(load, os.getloadavg()[0]),
        **found,
        "mix": mix,
        "hang_list": hang,
    }
    print(json.dumps(_rounded(row)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
