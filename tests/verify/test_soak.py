"""Thousands of answers made to hang, crash or leak, one after the other. PYMATHRL_SOAK is how many [1000]; 50000 take
about a quarter of an hour on a core."""

import gc
import os
import random
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

import pymathrl.verify.pool as pool_module
from pymathrl.verify import VerifierPool

COUNT = int(os.environ.get("PYMATHRL_SOAK", "1000"))
DEADLINE_S = 0.5
LATE_S = 2.0  # beyond the deadline, on a machine that others use too
GROWTH_BYTES = 64 << 20  # of this process, after the first tenth
WORKER_BYTES = 1 << 30

_WORDS = (
    "\\frac \\sqrt \\left( \\right) \\pi e i x y n \\infty \\sin \\cos \\tan \\log \\ln \\exp \\binom \\cdot "
    "\\times \\pm ^ _ { } ( ) [ ] | ! , ; = < > \\le \\cup \\in \\text{ \\begin{pmatrix} \\end{pmatrix} & \\\\ "
    "\\sum \\int \\prod \\lim % $ 0 1 2 3 7 12 99 10^{9} 1e999 0.\\overline{3} - + / * . \\circ \\bmod \\to "
    "\\mathbb{R} \\lfloor \\rfloor"
)
TOKENS = _WORDS.split()


def soup(rng):
    return "".join(rng.choice(TOKENS) + rng.choice(("", " ")) for _ in range(rng.randint(1, 60)))


def bytes_of_all_kinds(rng):
    return "".join(chr(rng.choice((rng.randint(0, 127), rng.randint(0, 0x10FFFF)))) for _ in range(rng.randint(1, 80)))


def expression(rng, depth=4):
    """An expression that makes sense, over x and y: what only SymPy can tell about is among these."""
    if not depth or rng.random() < 0.2:
        return rng.choice(("x", "y", "2", "3", "\\pi", str(rng.randint(1, 999))))
    a, b = expression(rng, depth - 1), expression(rng, depth - 1)
    return rng.choice((
        f"({a})+({b})", f"({a})-({b})", f"({a})({b})", f"\\frac{{{a}}}{{{b}}}", f"({a})^{{{rng.randint(-3, 4)}}}",
        f"\\sqrt{{{a}}}", f"\\sqrt[{rng.randint(2, 5)}]{{{a}}}", f"\\sin({a})", f"\\cos({a})", f"\\tan({a})",
        f"\\ln({a})", f"e^{{{a}}}", f"\\arctan({a})", f"({a})^{{{b}}}", f"|{a}|",
    ))  # fmt: skip


def tower(rng):
    return "^{".join(str(rng.randint(2, 9999)) for _ in range(rng.randint(2, 30))) + "}" * 40


def huge(rng):
    n, k = rng.randint(10**3, 10**12), rng.randint(2, 10**6)
    return rng.choice((
        f"{n}!", f"(({n})!)!", f"{n}!!", f"\\binom{{{n}}}{{{n // 2}}}", f"{n}^{{{k}}}", f"(1+x)^{{{k}}}", f"x^{{{n}}}",
        f"\\sum_{{k=1}}^{{{n}}}\\frac1k", f"\\prod_{{k=1}}^{{{n}}}(x+k)", f"\\int_0^{{{n}}}e^{{-x^2}}dx", f"1e{n}",
        f"\\sqrt[{n}]{{{k}}}", f"\\log_{{{k}}}({n})", f"0.{'3' * (k % 1900)}", "9" * (k % 3000), f"\\sin({n})",
        f"{n}\\bmod {k}",
    ))  # fmt: skip


def deep(rng):
    n = rng.randint(10, 400)
    pairs = (("(", ")"), ("{", "}"), ("\\sqrt{", "}"), ("\\frac{1}{", "}"), ("[", "]"), ("-(", ")"), ("|", "|"))
    opening, closing = rng.choice(pairs)
    return opening * n + "x" + closing * rng.choice((n, n - 1))


def long(rng):
    piece = rng.choice(("+x", "x^{2}+", "\\sin x ", "1,", "1\\pm", "\\sqrt{2}+\\sqrt{3}+", "x=", "a\\cup ", "(1,2),"))
    return piece * rng.randint(20, 1900 // len(piece))


def code(rng):
    return rng.choice((
        "__import__('os').system('touch pymathrl-was-here')", "open('pymathrl-was-here','w').close()",
        "().__class__.__bases__[0].__subclasses__()", "exec('while 1: pass')", "lambda: 0", "{}" * 20, "%s%n%x" * 9,
    )) + str(rng.random())  # fmt: skip


MAKERS = (soup, bytes_of_all_kinds, expression, expression, tower, huge, deep, long, code)


def identity(rng):
    """Two forms of one function, or of nearly one: these go to the worker."""
    a, b = expression(rng, 2), expression(rng, 3)
    left, right = rng.choice((
        (f"\\sin^2({b})+\\cos^2({b})", "1"), (f"\\sin(2({b}))", f"2\\sin({b})\\cos({b})"),
        (f"\\tan({b})\\cos({b})", f"\\sin({b})"), (f"\\ln(({b})^2)", f"2\\ln({b})"), (f"\\sqrt{{({b})^2}}", f"|{b}|"),
        ("\\arctan(x)+\\arctan(\\frac1x)", "\\frac{\\pi}{2}"), (f"e^{{2({b})}}", f"(e^{{{b}}})^2"),
    ))  # fmt: skip
    return f"({a})({left})", f"({a})({right})"


def pairs(count):
    rng = random.Random(0)
    for _ in range(count):
        if rng.random() < 0.1:
            yield identity(rng)
            continue
        answer = rng.choice(MAKERS)(rng)
        gold = rng.choice((answer + "+0", expression(rng), rng.choice(MAKERS)(rng), "\\frac{1}{2}", f"({answer})"))
        yield gold, answer


def rss(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def below(pid, but=()):
    """Every process below this one but those of other tests, {pid: state}."""
    out = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in set(map(int, (task / "children").read_text().split())) - set(but):
            out[child] = Path(f"/proc/{child}/stat").read_text().rpartition(") ")[2][0]
            out |= below(child, but)
    return out


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])


@pytest.mark.timeout(300 + COUNT // 5)
def test_soak(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # and so the workers
    monkeypatch.setattr(pool_module, "CACHED", 1000)  # full long before the first tenth is over
    others = set(below(os.getpid()))
    reasons, stages, slowest, sizes = Counter(), Counter(), (0.0, "", ""), []
    with VerifierPool(deadline_s=DEADLINE_S, max_tasks=500) as pool:
        assert pool.decide("1", "\\sin^2 x+\\cos^2 x").result()
        (server,) = {pid for pid in below(os.getpid(), others) if parent_of(pid) == os.getpid()}
        descriptors = len(os.listdir("/proc/self/fd"))
        for number, (gold, answer) in enumerate(pairs(COUNT)):
            begin = time.monotonic()
            verdict = pool.decide(gold, answer).result()
            slowest = max(slowest, (time.monotonic() - begin, gold, answer))
            reasons[verdict.reason.split(":")[0]] += 1
            stages[verdict.stage] += 1
            if number % max(1, COUNT // 10) == COUNT // 20:
                gc.collect()
                sizes.append(rss("self"))
                states = below(os.getpid(), others)
                assert set(states.values()) <= {"R", "S"} and len(states) <= 2, states
                assert server in states, "the process that forks is another one"
                assert max(rss(pid) for pid in states) < WORKER_BYTES
        assert len(os.listdir("/proc/self/fd")) == descriptors
        threads = threading.active_count()
    growth = sizes[-1] - sizes[0]
    print(f"{COUNT} answers, slowest {slowest[0]:.2f} s, {growth / 2**20:.1f} MiB of growth, {stages}, {reasons}")
    assert slowest[0] < DEADLINE_S + LATE_S, slowest
    assert stages["symbolic"] + stages["worker"] > COUNT / 50, stages  # the workers had something to do
    assert not {"worker died", "error", "not decided"} & set(reasons), reasons
    assert reasons["timeout"] < COUNT / 20, reasons
    assert growth < GROWTH_BYTES, sizes
    assert below(os.getpid(), others) == {} and threading.active_count() == threads - 1
    assert os.listdir(tmp_path) == []
