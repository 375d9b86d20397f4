r"""The exact normal form of an expression: a quotient of polynomials with rational coefficients.

A monomial is a product of atoms with rational exponents. Atoms are variables, pi, e, primes with an exponent in (0, 1)
(so \sqrt{12} is 2 * 3^(1/2)), -1 with an exponent in (0, 1) (i is (-1)^(1/2)), and what has no rule here: functions,
absolute values, powers of sums.  Products of different radicals are linearly independent over the rationals
(Besicovitch 1940), so without the last kind two expressions are equal just where their forms are.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from fractions import Fraction
from functools import lru_cache
from typing import Any

from pymathrl.verify import nodes as t
from pymathrl.verify.lexer import TooLarge
from pymathrl.verify.nodes import Node

Mono = tuple[tuple[int, Fraction], ...]  # (atom, exponent), by atom
Poly = dict[Mono, Fraction]
Form = tuple[Poly, Poly]  # numerator, denominator

MAX_BITS = 100_000  # of an integer that a power makes
MAX_FACTORIAL = 3000
MAX_TERMS = 1000  # of a \sum or \prod that is evaluated
MAX_WORK = 5_000  # steps of about 10 us in one comparison
MAX_SHIFT = 20  # (n+c)! is written with n! for |c| up to this
_TRIAL = 10_000  # primes below it are divided out of radicands

ONE, ZERO = Fraction(1), Fraction(0)
_SINES = {  # sin(r pi) for r in [0, 1/2]: coefficient and radicand
    Fraction(0): (ZERO, 1), Fraction(1, 6): (Fraction(1, 2), 1), Fraction(1, 4): (Fraction(1, 2), 2),
    Fraction(1, 3): (Fraction(1, 2), 3), Fraction(1, 2): (ONE, 1),
}  # fmt: skip


class Undefined(Exception):
    """A division by zero or another value that does not exist; it equals nothing."""


class NoForm(Exception):
    """Too much work for this stage; another one may tell."""


class Former:
    """Makes forms that can be compared with each other: atoms are numbered within one Former."""

    def __init__(self) -> None:
        self.atoms: dict[Hashable, int] = {}
        self.keys: list[Any] = []
        self.work = 0
        self.minus_one = self.atom(("minus one",))
        self.i: Mono = ((self.minus_one, Fraction(1, 2)),)

    def atom(self, key: Hashable) -> int:
        number = self.atoms.setdefault(key, len(self.atoms))
        if number == len(self.keys):
            self.keys.append(key)
        return number

    def spend(self, steps: int) -> None:
        self.work += steps
        if self.work > MAX_WORK:
            raise NoForm("too much work")

    # --- comparisons ---

    def equal(self, a: Form, b: Form) -> bool | None:
        """Whether two forms are the same value; None where they differ and atoms without rules might make it so."""
        difference = self.difference(a, b)
        if not difference:
            return True
        return False if self.is_exact(difference) and self.is_exact(a[1]) and self.is_exact(b[1]) else None

    def difference(self, a: Form, b: Form) -> Poly:
        """Numerator of a - b over the product of the denominators."""
        return _plus(self.times(a[0], b[1]), self.times(b[0], a[1]), -1)

    def is_exact(self, poly: Poly) -> bool:
        """Whether only atoms with rules occur: then different is unequal. pi and e are taken as independent."""
        for mono in poly:
            for atom, exponent in mono:
                kind = self.keys[atom][0]
                if kind == "minus one":
                    if exponent != Fraction(1, 2):
                        return False
                elif kind == "prime":
                    if self.keys[atom][1] > _TRIAL**2:
                        return False
                elif kind not in ("variable", "constant"):
                    return False
        return True

    # --- arithmetic ---

    def times(self, a: Poly, b: Poly) -> Poly:
        self.spend(len(a) * len(b) * (1 + (_bits(a) + _bits(b)) ** 2 // 10**8))
        if len(a) == 1 and () in a:
            return {m: c * a[()] for m, c in b.items()}
        if len(b) == 1 and () in b:
            return {m: c * b[()] for m, c in a.items()}
        out: Poly = {}
        for m1, c1 in a.items():
            for m2, c2 in b.items():
                mono, c = self.mono_times(m1, m2)
                total = out.get(mono, ZERO) + c * c1 * c2
                if total:
                    out[mono] = total
                else:
                    out.pop(mono, None)
        return out

    def mono_times(self, a: Mono, b: Mono) -> tuple[Mono, Fraction]:
        """The product and the rational number that comes out of its radicals."""
        if not a:
            return b, ONE
        if not b:
            return a, ONE
        exponents = dict(a)
        for atom, exponent in b:
            exponents[atom] = exponents.get(atom, ZERO) + exponent
        return self.reduced(exponents)

    def reduced(self, exponents: dict[int, Fraction]) -> tuple[Mono, Fraction]:
        coefficient = ONE
        kept = []
        for atom, exponent in exponents.items():
            key = self.keys[atom]
            if key[0] == "prime" and not 0 < exponent < 1:
                whole = math.floor(exponent)
                coefficient *= _power(Fraction(key[1]), whole)
                exponent -= whole
            elif key[0] == "minus one" and not 0 < exponent < 1:
                whole = math.floor(exponent)
                coefficient = -coefficient if whole % 2 else coefficient
                exponent -= whole
            elif key[0] == "power" and key[1] == self.minus_one:
                exponent %= 2
            if exponent:
                kept.append((atom, exponent))
        return tuple(sorted(kept)), coefficient

    def multiply(self, a: Form, b: Form) -> Form:
        return self.fraction(self.times(a[0], b[0]), self.times(a[1], b[1]))

    def add(self, a: Form, b: Form) -> Form:
        self.spend((len(a[0]) + len(b[0])) // 10 + (_bits(a[0]) + _bits(b[0])) ** 2 // 10**8)
        if a[1] == b[1]:
            return _plus(a[0], b[0]), a[1]
        return self.fraction(_plus(self.times(a[0], b[1]), self.times(b[0], a[1])), self.times(a[1], b[1]))

    def fraction(self, numerator: Poly, denominator: Poly) -> Form:
        """A denominator of one term goes into the numerator."""
        if not denominator:
            raise Undefined("division by zero")
        if not numerator:
            return {}, {(): ONE}
        if len(denominator) == 1:
            ((mono, c),) = denominator.items()
            if not mono and c == 1:
                return numerator, denominator
            inverse, factor = self.reduced({atom: -exponent for atom, exponent in mono})
            return self.times(numerator, {inverse: factor / c}), {(): ONE}
        return numerator, denominator

    def inverse(self, a: Form) -> Form:
        return self.fraction(a[1], a[0])

    # --- trees ---

    def form(self, node: Node) -> Form:
        """The form of an expression. Raises Undefined, TooLarge, NoForm."""
        self.spend(1)
        match node:
            case t.Num(value):
                return number(value)
            case t.Sym("pi") | t.Sym("e"):
                return self.single(self.atom(("constant", node.name)))
            case t.Sym("i"):
                return {self.i: ONE}, {(): ONE}
            case t.Sym("oo"):
                raise NoForm("infinity")
            case t.Sym(name):
                return self.single(self.atom(("variable", name)))
            case t.Add(terms):
                total = self.form(terms[0])
                for term in terms[1:]:
                    total = self.add(total, self.form(term))
                return total
            case t.Mul(factors):
                product = self.form(factors[0])
                for factor in factors[1:]:
                    product = self.multiply(product, self.form(factor))
                return product
            case t.Pow(base, exponent):
                return self.power(base, exponent)
            case t.Root(arg, degree):
                return self.root(self.form(arg), degree)
            case t.Call(name, args):
                return self.call(name, args)
        raise NoForm(type(node).__name__)

    def single(self, atom: int, exponent: Fraction = ONE) -> Form:
        return {((atom, exponent),): ONE}, {(): ONE}

    def opaque(self, kind: str, *parts: Hashable) -> Form:
        return self.single(self.atom((kind, *parts)))

    def power(self, base: Node, exponent: Node) -> Form:
        e = self.form(exponent)
        r = rational(e)
        if r is not None:
            if r.denominator == 1:
                return self.integer_power(self.form(base), int(r))
            return self.rational_power(self.form(base), r)
        b = self.form(base)
        if len(e[1]) != 1 or () not in e[1] or not b[0]:
            return self.opaque("sum power", freeze(b), freeze(e))
        constant = e[0].get((), ZERO)
        rest = {m: c / e[1][()] for m, c in e[0].items() if m}
        result = self.rational_power(b, constant) if constant else number(ONE)
        for mono, c in rest.items():
            result = self.multiply(result, self.symbolic_power(b, mono, c))
        return result

    def symbolic_power(self, b: Form, mono: Mono, c: Fraction) -> Form:
        """b^(c mono), with each factor of b raised on its own."""
        if len(b[0]) != 1 or len(b[1]) != 1:
            return self.single(self.atom(("sum power", freeze(b), mono)), c)
        ((factors, coefficient),) = b[0].items()
        exponents: dict[int, Fraction] = {}
        bases = [(self.prime(p), Fraction(k)) for p, k in factor_rational(abs(coefficient))]
        if coefficient < 0:
            bases.append((self.minus_one, ONE))
        for atom, k in [*bases, *factors]:
            if self.keys[atom] == ("constant", "e") and (turn := self.turn(mono)) is not None:
                exponents[self.minus_one] = exponents.get(self.minus_one, ZERO) + turn * c * k
                continue
            raised = self.atom(("power", atom, mono))
            exponents[raised] = exponents.get(raised, ZERO) + c * k
        product, factor = self.reduced(exponents)
        return {product: factor}, {(): ONE}

    def turn(self, mono: Mono) -> Fraction | None:
        """1 for pi i: e^(r pi i) = (-1)^r."""
        pi = self.atom(("constant", "pi"))
        return ONE if dict(mono) == {pi: ONE, self.minus_one: Fraction(1, 2)} else None

    def prime(self, p: int) -> int:
        return self.atom(("prime", p))

    def integer_power(self, b: Form, n: int) -> Form:
        if n == 0:
            if not b[0]:
                raise Undefined("0^0")
            return number(ONE)
        if n < 0:
            return self.integer_power(self.inverse(b), -n)
        if not b[0]:
            return {}, {(): ONE}
        if len(b[0]) == 1 and len(b[1]) == 1:
            ((mono, c),) = b[0].items()
            power, factor = self.reduced({atom: e * n for atom, e in mono})
            return {power: factor * _power(c, n)}, {(): ONE}
        if n * max(len(b[0]), len(b[1])) > 600:
            return self.single(self.atom(("sum power", freeze(b))), Fraction(n))
        result = number(ONE)
        while n:
            if n % 2:
                result = self.multiply(result, b)
            n //= 2
            if n:
                b = self.multiply(b, b)
        return result

    def rational_power(self, b: Form, r: Fraction) -> Form:
        """The principal power. Of a lone variable to an odd power the root is taken as if it were positive, to an even
        one its absolute value (variables are real)."""
        if r.denominator == 1:
            return self.integer_power(b, int(r))
        if not b[0]:
            if r < 0:
                raise Undefined("division by zero")
            return {}, {(): ONE}
        if len(b[0]) == 1 and len(b[1]) == 1:
            ((mono, c),) = b[0].items()
            c /= b[1].get((), ONE)
            exponents: dict[int, Fraction] = {}

            def raise_atom(atom: int, exponent: Fraction) -> None:
                exponents[atom] = exponents.get(atom, ZERO) + exponent

            for p, k in factor_rational(abs(c)):
                raise_atom(self.prime(p), k * r)
            if c < 0:
                raise_atom(self.minus_one, r)
            for atom, exponent in mono:
                kind = self.keys[atom][0]
                even = exponent.numerator % 2 == 0 and exponent.denominator == 1
                if kind == "minus one" and (c < 0 or not -1 < exponent <= 1):
                    return self.single(self.atom(("sum power", freeze(b))), r)
                if kind in ("variable", "function") and even and (exponent * r) % 2 != 0:
                    raise_atom(self.atom(("absolute", freeze(self.single(atom)))), exponent * r)
                else:
                    raise_atom(atom, exponent * r)
            power, factor = self.reduced(exponents)
            return {power: factor}, {(): ONE}
        if len(b[1]) != 1:
            if r < 0:
                return self.rational_power(self.inverse(b), -r)
            return self.single(self.atom(("sum power", freeze(b))), r)
        content = math.gcd(*(c.numerator for c in b[0].values()))
        divisor = math.lcm(*(c.denominator for c in b[0].values()))
        scale = Fraction(content, divisor)
        primitive = {m: c / scale for m, c in b[0].items()}
        outer = self.rational_power(number(scale), r) if scale != 1 else number(ONE)
        return self.multiply(outer, self.single(self.atom(("sum power", freeze((primitive, b[1])))), r))

    def root(self, b: Form, degree: int) -> Form:
        value = rational(b)
        if value is not None and value < 0 and degree % 2:
            ((mono, c),) = self.rational_power(number(-value), Fraction(1, degree))[0].items()
            return {mono: -c}, {(): ONE}
        if degree % 2 and len(b[0]) == 1 and self.is_odd_monomial(b):
            ((mono, c),) = b[0].items()
            root = self.rational_power(({mono: abs(c)}, b[1]), Fraction(1, degree))
            return root if c > 0 else ({m: -k for m, k in root[0].items()}, root[1])
        return self.rational_power(b, Fraction(1, degree))

    def is_odd_monomial(self, b: Form) -> bool:
        ((mono, _),) = b[0].items()
        return len(b[1]) == 1 and all(self.keys[a][0] != "minus one" for a, _ in mono)

    # --- functions ---

    def call(self, name: str, args: tuple[Node, ...]) -> Form:
        if name in ("sum", "prod"):
            return self.series(name, args)
        if name == "det":
            return self.determinant(args[0])
        forms = [self.form(a) for a in args]
        values = [rational(f) for f in forms]
        first, value = forms[0], values[0]
        match name:
            case "exp":
                return self.power(t.E, args[0])
            case "sinh" | "cosh" | "tanh" | "coth" | "sech" | "csch":
                return self.hyperbolic(name, args[0])
            case "ln":
                return self.logarithm(first)
            case "log":
                return self.multiply(self.logarithm(first), self.inverse(self.logarithm(forms[1])))
            case "sin" | "cos":
                return self.sine(name, first)
            case "tan":
                return self.multiply(self.sine("sin", first), self.inverse(self.sine("cos", first)))
            case "cot":
                return self.multiply(self.sine("cos", first), self.inverse(self.sine("sin", first)))
            case "sec":
                return self.inverse(self.sine("cos", first))
            case "csc":
                return self.inverse(self.sine("sin", first))
            case "abs":
                return self.absolute(first)
            case "floor" | "ceil" if value is not None:
                return number(Fraction(math.floor(value) if name == "floor" else math.ceil(value)))
            case "factorial":
                return self.factorial(first)
            case "factorial2" if value is not None:
                return self.double_factorial(value)
            case "binom":
                return self.binomial(forms[0], forms[1])
            case "max" | "min" if all(v is not None for v in values):
                return number((max if name == "max" else min)(v for v in values if v is not None))
            case "gcd" | "lcm" if all(v is not None and v.denominator == 1 for v in values):
                integers = [int(v) for v in values if v is not None]
                return number(Fraction(math.gcd(*integers) if name == "gcd" else math.lcm(*integers)))
            case "sgn" if value is not None:
                return number(Fraction((value > 0) - (value < 0)))
        return self.opaque("function", name, *(freeze(f) for f in forms))

    def logarithm(self, b: Form) -> Form:
        if not b[0]:
            raise Undefined("the logarithm of 0")
        if len(b[0]) == 1 and len(b[1]) == 1:
            ((mono, c),) = b[0].items()
            positive = [self.positive_factor(atom, k) for atom, k in mono]
            if c > 0 and all(factor is not None for factor in positive):
                total: Poly = {}
                parts = [(self.prime(p), Fraction(k)) for p, k in factor_rational(c)]
                for atom, k in [*parts, *(factor for factor in positive if factor is not None)]:
                    total = _plus(total, {m: v * k for m, v in self.log_atom(atom).items()})
                return total, {(): ONE}
        return self.opaque("function", "ln", freeze(b))

    def positive_factor(self, atom: int, exponent: Fraction) -> tuple[int, Fraction] | None:
        """The same factor with a base above 0, x^2 as |x|^2; None where there is none."""
        kind = self.keys[atom][0]
        if kind == "variable" and exponent % 2 == 0:
            return self.atom(("absolute", freeze(self.single(atom)))), exponent
        return (atom, exponent) if kind in ("prime", "constant", "power", "absolute") else None

    def log_atom(self, atom: int) -> Poly:
        key = self.keys[atom]
        if key == ("constant", "e"):
            return {(): ONE}
        if key[0] == "power" and self.keys[key[1]][0] in ("prime", "constant"):  # ln p^n = n ln p
            return self.times({key[2]: ONE}, self.log_atom(key[1]))
        return {((self.atom(("function", "ln", key)), ONE),): ONE}

    def hyperbolic(self, name: str, arg: Node) -> Form:
        up, down = self.power(t.E, arg), self.power(t.E, t.negate(arg))
        half = number(Fraction(1, 2))
        cosh = self.multiply(half, self.add(up, down))
        sinh = self.multiply(half, self.add(up, self.multiply(number(Fraction(-1)), down)))
        above, below = {
            "sinh": (sinh, number(ONE)), "cosh": (cosh, number(ONE)), "tanh": (sinh, cosh), "coth": (cosh, sinh),
            "sech": (number(ONE), cosh), "csch": (number(ONE), sinh),
        }[name]  # fmt: skip
        return self.multiply(above, self.inverse(below))

    def sine(self, name: str, b: Form) -> Form:
        pi: Mono = ((self.atom(("constant", "pi")), ONE),)
        if not b[0]:
            return number(ZERO if name == "sin" else ONE)
        if len(b[1]) == 1 and set(b[0]) == {pi}:
            r = b[0][pi] + (Fraction(1, 2) if name == "cos" else ZERO)
            r %= 2
            sign = 1
            if r >= 1:
                r, sign = r - 1, -1
            r = min(r, 1 - r)
            if r in _SINES:
                c, radicand = _SINES[r]
                return self.multiply(number(sign * c), self.rational_power(number(Fraction(radicand)), Fraction(1, 2)))
        negated = {m: -c for m, c in b[0].items()}
        flip = b[0][min(b[0])] < 0
        found = self.opaque("function", name, freeze((negated, b[1]) if flip else b))
        return self.multiply(number(Fraction(-1)), found) if flip and name == "sin" else found

    def absolute(self, b: Form) -> Form:
        value = rational(b)
        if value is not None:
            return number(abs(value))
        if len(b[1]) != 1:
            return self.opaque("absolute", freeze(b))
        imaginary = {m for m in b[0] if any(a == self.minus_one for a, _ in m)}
        if imaginary:
            if self.is_exact(b[0]) and all(self.keys[a][0] != "variable" for m in b[0] for a, _ in m):
                re = {m: c for m, c in b[0].items() if m not in imaginary}
                im = self.times({m: c for m, c in b[0].items() if m in imaginary}, {self.i: Fraction(-1)})
                square = _plus(self.times(re, re), self.times(im, im))
                return self.rational_power((square, {(): ONE}), Fraction(1, 2))
            return self.opaque("absolute", freeze(b))
        if len(b[0]) == 1:
            ((mono, c),) = b[0].items()
            exponents: dict[int, Fraction] = {}
            for atom, exponent in mono:
                if self.keys[atom][0] in ("prime", "constant", "absolute") or exponent % 2 == 0:
                    exponents[atom] = exponents.get(atom, ZERO) + exponent
                else:
                    bars = self.atom(("absolute", freeze(self.single(atom))))
                    exponents[bars] = exponents.get(bars, ZERO) + exponent
            power, factor = self.reduced(exponents)
            return {power: factor * abs(c)}, {(): ONE}
        scale = math.gcd(*(c.numerator for c in b[0].values()))
        content = Fraction(scale, math.lcm(*(c.denominator for c in b[0].values())))
        if b[0][min(b[0])] < 0:
            content = -content
        inner = freeze(({m: c / content for m, c in b[0].items()}, {(): ONE}))
        return self.multiply(number(abs(content)), self.opaque("absolute", inner))

    def factorial(self, b: Form) -> Form:
        value = rational(b)
        if value is not None:
            if value.denominator == 1 and value < 0:
                raise Undefined("the factorial of a negative number")
            if value.denominator != 1:
                return self.opaque("function", "factorial", freeze(b))
            if value > MAX_FACTORIAL:
                raise TooLarge(f"the factorial of more than {MAX_FACTORIAL}")
            self.spend(int(value) // 30)
            return number(Fraction(math.factorial(int(value))))
        shift = b[0].get((), ZERO) if len(b[1]) == 1 else ZERO
        if shift.denominator != 1 or abs(shift) > MAX_SHIFT or not shift:
            return self.opaque("function", "factorial", freeze(b))
        base = {m: c for m, c in b[0].items() if m}
        result = self.opaque("function", "factorial", freeze((base, b[1])))
        for k in range(1, int(shift) + 1):
            result = self.multiply(result, (_plus(base, {(): Fraction(k)}), b[1]))
        for k in range(int(shift) + 1, 1):
            factor = _plus(base, {(): Fraction(k)}) if k else base
            result = self.multiply(result, self.inverse((factor, b[1])))
        return result

    def double_factorial(self, value: Fraction) -> Form:
        if value.denominator != 1 or value < -1:
            raise Undefined("a double factorial")
        if value > MAX_FACTORIAL:
            raise TooLarge(f"the factorial of more than {MAX_FACTORIAL}")
        return number(Fraction(math.prod(range(int(value), 0, -2))))

    def binomial(self, n: Form, k: Form) -> Form:
        a, b = rational(n), rational(k)
        if a is not None and b is not None and a.denominator == b.denominator == 1 and a >= 0:
            if a > 10**6 or (0 <= b <= a and min(int(b), int(a - b)) * math.log2(max(int(a), 2)) > MAX_BITS):
                raise TooLarge("a binomial coefficient too large")
            return number(Fraction(math.comb(int(a), int(b)) if b >= 0 else 0))
        if b is not None and b.denominator == 1 and 0 <= b <= MAX_SHIFT:
            result = number(Fraction(1, math.factorial(int(b))))
            for i in range(int(b)):
                result = self.multiply(result, (_plus(n[0], self.times({(): Fraction(i)}, n[1]), -1), n[1]))
            return result
        rest = self.add(n, self.multiply(number(Fraction(-1)), k))
        return self.multiply(self.factorial(n), self.inverse(self.multiply(self.factorial(k), self.factorial(rest))))

    def series(self, name: str, args: tuple[Node, ...]) -> Form:
        body, index, low, high = args
        first, last = rational(self.form(low)), rational(self.form(high))
        if first is None or last is None or first.denominator != 1 or last.denominator != 1:
            return self.opaque("function", name, body, index, low, high)
        if last - first >= MAX_TERMS:
            raise TooLarge(f"a sum of more than {MAX_TERMS} terms")
        result = number(ZERO if name == "sum" else ONE)
        for k in range(int(first), int(last) + 1):
            term = self.form(substitute(body, index, t.Num(Fraction(k))))
            result = self.add(result, term) if name == "sum" else self.multiply(result, term)
        return result

    def determinant(self, node: Node) -> Form:
        if not isinstance(node, t.Matrix) or len(node.rows) != len(node.rows[0]) or len(node.rows) > 5:
            raise NoForm("a determinant")
        cells = [[self.form(x) for x in row] for row in node.rows]

        def expand(rows: list[list[Form]]) -> Form:
            if len(rows) == 1:
                return rows[0][0]
            total = number(ZERO)
            for j, cell in enumerate(rows[0]):
                minor = expand([row[:j] + row[j + 1 :] for row in rows[1:]])
                total = self.add(total, self.multiply(self.multiply(number(Fraction((-1) ** j)), cell), minor))
            return total

        return expand(cells)


def _bits(poly: Poly) -> int:
    """Of its longest coefficient."""
    return max((c.numerator.bit_length() + c.denominator.bit_length() for c in poly.values()), default=0)


def number(value: Fraction) -> Form:
    return ({(): value} if value else {}), {(): ONE}


def rational(form: Form) -> Fraction | None:
    """The value of a form without atoms."""
    numerator, denominator = form
    if len(denominator) != 1 or () not in denominator:
        return None
    if not numerator:
        return ZERO
    return numerator[()] / denominator[()] if len(numerator) == 1 and () in numerator else None


def freeze(form: Form) -> Hashable:
    return frozenset(form[0].items()), frozenset(form[1].items())


def substitute(node: Node, name: Node, value: Node) -> Node:
    """The tree with a variable replaced."""
    return t.replace(node, lambda n: value if n == name else None)


@lru_cache(maxsize=4096)
def _factor(n: int) -> tuple[tuple[int, int], ...]:
    """(prime, exponent) by trial division; what is left past `_TRIAL` stays one factor, of which `is_exact` knows."""
    found = []
    for p in (2, 3, 5):
        k = 0
        while n % p == 0:
            n, k = n // p, k + 1
        if k:
            found.append((p, k))
    p = 7
    step = (4, 2, 4, 2, 4, 6, 2, 6)
    i = 0
    while p * p <= n and p < _TRIAL:
        k = 0
        while n % p == 0:
            n, k = n // p, k + 1
        if k:
            found.append((p, k))
        p += step[i]
        i = (i + 1) % 8
    if n > 1:
        root = math.isqrt(n)
        found.append((root, 2) if root * root == n else (n, 1))
    return tuple(found)


def factor_rational(value: Fraction) -> list[tuple[int, int]]:
    """(prime, exponent) of a positive rational number."""
    if max(value.numerator, value.denominator).bit_length() > 2000:
        raise NoForm("a number too long to factor")
    return [*_factor(value.numerator), *((p, -k) for p, k in _factor(value.denominator))]


def _power(base: Fraction, n: int) -> Fraction:
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if base not in (1, -1, 0) and bits * abs(n) > MAX_BITS:
        raise TooLarge(f"a power of more than {MAX_BITS} bits")
    return base**n


def _plus(a: Poly, b: Poly, sign: int = 1) -> Poly:
    out = dict(a)
    for mono, c in b.items():
        total = out.get(mono, ZERO) + sign * c
        if total:
            out[mono] = total
        else:
            out.pop(mono, None)
    return out
