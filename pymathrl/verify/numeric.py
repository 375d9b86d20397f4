"""Values of expressions to many digits: they tell apart what differs, and prove equal what is algebraic.

Two constants made of whole numbers with + - * / and real roots that differ, differ by more than a bound that follows
from how they are built (Burnikel, Fleischer, Mehlhorn, Schirra 2000, "A strong and easily computable separation bound
for arithmetic expressions involving radicals"). Agreement past that bound is a proof; agreement elsewhere is none.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

from pymathrl.verify import nodes as t
from pymathrl.verify.canonical import MAX_TERMS, Undefined
from pymathrl.verify.lexer import TooLarge
from pymathrl.verify.nodes import Node

POINTS = 5
AGREE_DIGITS = 40
DIGITS = 60  # of the first evaluation; a doubtful difference is computed again with MORE
MORE = 240
MAX_PROOF_BITS = 24_000  # of the precision that a proof may take
MAX_RESIDUE_FACTORIAL = 20_000  # 20 ms
MAX_STEPS = 10_000  # of one comparison
_PRICES = {"power": 5, "factorial": 100, "binom": 200}  # of functions, in steps; the first is that of all others
MAX_MAGNITUDE = 200_000  # bits of an intermediate value's exponent

_OF_INTEGERS = frozenset(("factorial", "factorial2", "binom", "sum", "prod", "gcd", "lcm"))
_PIECEWISE = frozenset(("abs", "max", "min", "floor", "ceil", "sgn", "norm"))
DIFFER, AGREE, UNKNOWN = "differ", "agree", "unknown"
_MODULI = (2305843009213693921, 2305843009213693907, 2305843009213693723)  # the three largest primes below 2^61 - 1


class Outside(Exception):
    """The point lies outside of an expression's real domain."""


class Budget:
    """What one comparison may cost, in steps of about 10 us: it ends in milliseconds, whatever the texts hold."""

    def __init__(self) -> None:
        self.left = MAX_STEPS

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise TooLarge("too much to compute")


@lru_cache(maxsize=8)
def _context(digits: int) -> Any:
    import mpmath  # not at the top: most answers never need it, and it takes 0.1 s

    context = mpmath.MPContext()
    context.dps = digits
    return context


def compare(a: Node, b: Node, budget: Budget | None = None) -> str:
    """DIFFER (certain up to rounding), AGREE (to 40 digits, at 5 points if there are variables) or UNKNOWN."""
    budget = budget or Budget()
    names = sorted(t.symbols(a) | t.symbols(b))
    if not names:  # one point only, so more digits: \sqrt{10^{60}+1} is not 10^{30}
        found = _compare_at(a, b, {}, False, budget)
        return _gap(a, b, MORE, {}, False, budget) if found == AGREE else found
    rng = random.Random(_checksum(a) ^ _checksum(b))
    integers = has_integer_parameter(a) or has_integer_parameter(b)
    for real in (True, False):
        agreed = 0
        for attempt in range(24):
            point = _point(names, rng, attempt, integers, positive=not real)
            try:
                found = _compare_at(a, b, point, real, budget)
            except (Outside, Undefined):
                continue
            if found == DIFFER:
                return DIFFER
            agreed += found == AGREE
            if agreed == POINTS:
                return AGREE
        if agreed:  # defined in places, which are too few to tell
            return UNKNOWN
    return UNKNOWN


def _checksum(node: Node) -> int:
    """The same in every process; numbers may be too long to print."""
    parts = (n.name if isinstance(n, t.Sym | t.Call) else hash(n.value) if isinstance(n, t.Num) else type(n).__name__
             for n in t.walk(node))  # fmt: skip
    return zlib.crc32(" ".join(map(str, parts)).encode())


def has_integer_parameter(node: Node) -> bool:
    """Whether a variable must be a whole number: n!, binomials, (-1)^n."""
    for n in t.walk(node):
        if isinstance(n, t.Call) and n.name in _OF_INTEGERS and any(t.symbols(a) for a in n.args):
            return True
        if isinstance(n, t.Pow) and t.symbols(n.exponent) and not t.symbols(n.base) and _is_negative(n.base):
            return True
    return False


def has_pieces(node: Node) -> bool:
    """Whether the value depends on a variable in another way here and there: |x - 3| is 3 - x below 3."""
    return any(isinstance(n, t.Call) and n.name in _PIECEWISE and t.symbols(n) for n in t.walk(node))


def _is_negative(node: Node) -> bool:
    if isinstance(node, t.Num):
        return node.value < 0
    return isinstance(node, t.Mul) and any(isinstance(f, t.Num) and f.value < 0 for f in node.factors)


def _point(names: list[str], rng: random.Random, attempt: int, integers: bool, positive: bool) -> dict[str, Fraction]:
    """Every third point is all negative (|x| is not x), every third all positive, others mixed."""
    if integers:
        return {name: Fraction(rng.randint(2, 9) + attempt // 8 * 6) for name in names}
    span = (4, 30, 1, 12, 100)[attempt % 5]
    size = {name: Fraction(rng.randint(1, span * 997), 997) for name in names}
    sign = 1 if positive else (-1, 1, 0)[attempt % 3]
    return {name: v * (sign or rng.choice((-1, 1))) for name, v in size.items()}


def _compare_at(a: Node, b: Node, point: Mapping[str, Fraction], real: bool, budget: Budget) -> str:
    """With the first digits; with more where a small difference may be the rounding of what cancelled."""
    found = _gap(a, b, DIGITS, point, real, budget)
    return _gap(a, b, MORE, point, real, budget) if found == UNKNOWN else found


def _gap(a: Node, b: Node, digits: int, point: Mapping[str, Fraction], real: bool, budget: Budget) -> str:
    m = _context(digits)
    evaluate = _Evaluator(m, point, real, budget)
    x, y = evaluate(a), evaluate(b)
    scale, gap = max(abs(x), abs(y)), abs(x - y)
    noise = m.mpf(10) ** (-digits + 20)
    rounding = max(scale, evaluate.largest) * noise
    if gap > (rounding if digits == MORE else rounding * 10**10):
        return DIFFER
    if gap <= scale * noise:
        return AGREE
    # what is left is the rounding of what cancelled, or of a 0
    return AGREE if digits == MORE and rounding < m.mpf(10) ** -AGREE_DIGITS * max(scale, 1) else UNKNOWN


def value(node: Node, digits: int = DIGITS, budget: Budget | None = None) -> Any:
    """A constant, real or complex, as an mpmath number. Raises Undefined, Outside, TooLarge."""
    return _Evaluator(_context(digits), {}, False, budget or Budget())(node)


class _Evaluator:
    """Values in the mpmath context `m`. real: leave the reals nowhere, raise Outside instead."""

    def __init__(self, m: Any, point: Mapping[str, Fraction], real: bool, budget: Budget) -> None:
        self.m, self.point, self.real, self.budget = m, dict(point), real, budget
        self.price = 1 + m.dps // 100  # of one step
        self.largest = m.mpf(0)  # term of a sum or argument of a function: what rounds

    def __call__(self, node: Node) -> Any:
        m = self.m
        self.budget.spend(self.price)
        match node:
            case t.Num(v):
                return m.mpf(v.numerator) / v.denominator
            case t.Sym("pi"):
                return +m.pi
            case t.Sym("e"):
                return +m.e
            case t.Sym(name) if name in self.point:
                return m.mpf(self.point[name].numerator) / self.point[name].denominator
            case t.Sym("i"):
                return m.mpc(0, 1)
            case t.Sym(name):
                raise Outside(name)
            case t.Add(x):
                return m.fsum(self.noted([self(a) for a in x]))
            case t.Mul(x):
                return m.fprod(self(a) for a in x)
            case t.Pow(base, exponent):
                self.budget.spend(_PRICES["power"] * self.price)
                return _power(m, self(base), self(exponent), self.real)
            case t.Root(arg, n):
                x = self(arg)
                if n % 2 and _is_real(m, x) and m.re(x) < 0:
                    return -m.root(-m.re(x), n)
                if self.real and _is_real(m, x) and m.re(x) < 0:
                    raise Outside("root")
                return m.root(x, n)
            case t.Call("sum" | "prod" as name, (body, t.Sym(index), low, high)):
                return self.series(name, body, index, self(low), self(high))
            case t.Call(name, args):
                self.budget.spend(_PRICES.get(name, _PRICES["power"]) * self.price)
                return _function(name, self.noted([self(a) for a in args]), m, self.real)
        raise Outside(type(node).__name__)

    def noted(self, values: list[Any]) -> list[Any]:
        self.largest = max(self.largest, *map(abs, values))
        return values

    def series(self, name: str, body: Node, index: str, first: Any, last: Any) -> Any:
        m = self.m
        if not (m.isint(first) and m.isint(last)) or last - first >= MAX_TERMS:
            raise TooLarge(f"a sum of more than {MAX_TERMS} terms")
        outer = self.point.get(index)
        values = []
        for k in range(int(first), int(last) + 1):
            self.point[index] = Fraction(k)
            values.append(self(body))
        if outer is None:
            self.point.pop(index, None)
        else:
            self.point[index] = outer
        return m.fsum(values) if name == "sum" else m.fprod(values)


def _is_real(m: Any, x: Any) -> bool:
    return not isinstance(x, m.mpc) or x.imag == 0


def _magnitude(m: Any, x: Any) -> float:
    """log2 |x|, 0 for 0."""
    return float(m.mag(x)) if x else 0.0


def _power(m: Any, base: Any, exponent: Any, real: bool) -> Any:
    if base == 0:
        if not _is_real(m, exponent) or m.re(exponent) <= 0:
            raise Undefined("a power of 0")
        return m.mpf(0)
    if abs(exponent) > MAX_MAGNITUDE or (abs(_magnitude(m, base)) + 1) * abs(exponent) > MAX_MAGNITUDE:
        raise TooLarge("a power too large")
    if real and _is_real(m, base) and m.re(base) < 0 and not m.isint(exponent):
        raise Outside("power")
    return m.power(base, exponent)


def _function(name: str, x: list[Any], m: Any, real: bool) -> Any:
    a = x[0]
    is_real = _is_real(m, a)
    if name in ("exp", "sinh", "cosh") and abs(a) > MAX_MAGNITUDE:
        raise TooLarge("an exponential too large")
    if name in ("sin", "cos", "tan", "cot", "sec", "csc") and _magnitude(m, a) > 200:
        raise TooLarge("an angle too large")
    if name in ("ln", "log"):
        if a == 0:
            raise Undefined("the logarithm of 0")
        if real and m.re(a) < 0:
            raise Outside("log")
        if name == "ln":
            return m.ln(a)
        base = m.ln(x[1]) if x[1] != 0 else m.mpf(0)
        if base == 0:
            raise Undefined("the base of a logarithm")
        return m.ln(a) / base
    if name in ("arcsin", "arccos") and real and is_real and abs(a) > 1:
        raise Outside(name)
    if name in ("cot", "csc", "sec"):
        below = m.cos(a) if name == "sec" else m.sin(a)
        if abs(below) < m.mpf(10) ** (-m.dps + 10):
            raise Undefined(name)
        return (m.cos(a) if name == "cot" else 1) / below
    if name == "tan":
        if abs(m.cos(a)) < m.mpf(10) ** (-m.dps + 10):
            raise Undefined(name)
        return m.tan(a)
    if name in ("floor", "ceil"):
        nearest = m.nint(m.re(a))
        if abs(a - nearest) < m.mpf(10) ** (-m.dps // 2):
            return nearest
        return m.floor(a) if name == "floor" else m.ceil(a)
    if name == "factorial":
        if not is_real or a < 0 or a > 3000:
            raise TooLarge("a factorial too large")
        return m.factorial(a)
    if name == "factorial2":
        if not is_real or a < 0 or a > 3000 or not m.isint(a):
            raise TooLarge("a factorial too large")
        return m.fac2(a)
    if name == "binom":
        if abs(x[0]) > 10_000 or abs(x[1]) > 10_000:
            raise TooLarge("a binomial coefficient too large")
        return m.binomial(x[0], x[1])
    if name in ("max", "min"):
        if not all(_is_real(m, v) for v in x):
            raise Outside(name)
        return (max if name == "max" else min)(m.re(v) for v in x)
    simple = {
        "sin": m.sin, "cos": m.cos, "exp": m.exp, "abs": abs, "sinh": m.sinh, "cosh": m.cosh, "tanh": m.tanh,
        "arcsin": m.asin, "arccos": m.acos, "arctan": m.atan, "arccot": m.acot, "arcsec": m.asec, "arccsc": m.acsc,
        "arcsinh": m.asinh, "arccosh": m.acosh, "arctanh": m.atanh, "re": m.re, "im": m.im, "arg": m.arg,
        "sgn": m.sign, "coth": m.coth, "sech": m.sech, "csch": m.csch, "norm": abs,
    }  # fmt: skip
    if name not in simple:
        raise Outside(name)
    try:
        return simple[name](a)
    except (ValueError, ZeroDivisionError):
        raise Undefined(name) from None


# --- proofs ---


def same_algebraic(a: Node, b: Node, budget: Budget | None = None) -> bool | None:
    """Whether two real algebraic constants are equal, with certainty; None for others and where it costs too much."""
    difference = t.Add((a, t.negate(b)))
    roots: dict[Node, int] = {}
    try:
        upper, lower = _bound(difference, roots)
    except Outside:
        return None
    bits = (math.prod(roots.values()) - 1) * upper + lower
    precision = 2 * (bits + upper) + 64  # what cancels on the way is at most 2^upper
    if precision > MAX_PROOF_BITS:
        return None
    m = _context(1 << int(precision * 0.30103).bit_length())
    try:
        gap = abs(_Evaluator(m, {}, True, budget or Budget())(difference))
    except Outside:
        return None
    return bool(gap < m.mpf(2) ** (-int(bits) - 2))


def _bound(node: Node, roots: dict[Node, int]) -> tuple[float, float]:
    """log2 of BFMSS's u and l, rounded up; collects the roots below with their degrees. A value that is not 0 is at
    least 1 / (u^(D-1) low), where D is the product of the degrees."""
    up = 1e-6
    match node:
        case t.Num(v):
            return math.log2(max(abs(v.numerator), 1)) + up, math.log2(v.denominator) + up
        case t.Add(terms):
            u, low = _bound(terms[0], roots)
            for term in terms[1:]:
                u2, low2 = _bound(term, roots)
                u, low = max(u + low2, u2 + low) + 1, low + low2
            return u, low
        case t.Mul(factors):
            parts = [_bound(factor, roots) for factor in factors]
            return sum(u for u, _ in parts), sum(low for _, low in parts)
        case t.Pow(base, t.Num(n)) if abs(n) <= MAX_PROOF_BITS and n.denominator <= 12:
            u, low = _bound(base, roots)
            u, low = u * abs(n.numerator), low * abs(n.numerator)
            if n < 0:
                u, low = low, u
            return _root_bound(node, n.denominator, u, low, roots)
        case t.Root(arg, k):
            return _root_bound(node, k, *_bound(arg, roots), roots)
    raise Outside("not algebraic")


def _root_bound(node: Node, k: int, u: float, low: float, roots: dict[Node, int]) -> tuple[float, float]:
    if k == 1:
        return u, low
    roots[node] = k
    return ((u + (k - 1) * low) / k + 1e-6, low) if u >= low else (u, ((k - 1) * u + low) / k + 1e-6)


def same_residues(a: Node, b: Node) -> bool:
    """Whether two rational constants with powers too large to write out agree modulo three primes of 61 bits. For
    unequal ones that chance is below 1e-50. Raises TooLarge for what this cannot compute."""
    return all(_residue(a, p) == _residue(b, p) for p in _MODULI)


def _residue(node: Node, p: int) -> int:
    match node:
        case t.Num(v):
            if v.denominator % p == 0:
                raise TooLarge("a residue")
            return v.numerator * pow(v.denominator, -1, p) % p
        case t.Add(x):
            return sum(_residue(a, p) for a in x) % p
        case t.Mul(x):
            product = 1
            for a in x:
                product = product * _residue(a, p) % p
            return product
        case t.Pow(base, exponent):
            n = _small_integer(exponent)
            b = _residue(base, p)
            if b == 0:
                raise TooLarge("a residue")
            return pow(b, n, p)
        case t.Call("factorial", (t.Num(v),)) if v.denominator == 1 and 0 <= v <= MAX_RESIDUE_FACTORIAL:
            product = 1
            for k in range(2, int(v) + 1):
                product = product * k % p
            return product
    raise TooLarge("a number too large to evaluate")


def _small_integer(node: Node) -> int:
    """An exponent: a whole number of at most 100,000 bits."""
    match node:
        case t.Num(v) if v.denominator == 1:
            return int(v)
        case t.Mul((t.Num(v), inner)) if v.denominator == 1:
            return int(v) * _small_integer(inner)
        case t.Add(x):
            return sum(_small_integer(a) for a in x)
        case t.Pow(base, exponent):
            b, n = _small_integer(base), _small_integer(exponent)
            if n >= 0 and b.bit_length() * n <= 100_000:
                return int(b**n)
    raise TooLarge("an exponent too large to evaluate")
