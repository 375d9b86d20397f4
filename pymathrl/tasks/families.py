"""The families of `synth`: functions that draw one problem, and the knobs that make it harder."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

from pymathrl.tasks.arithmetic import problem_key
from pymathrl.tasks.expression import Binary, Invalid, Literal, Node, evaluate, parse, render

MAX_PRODUCT = 10**9  # of a part of mixed_arith; a product above it becomes a sum
FIGURES = "0123456789ABCDEF"
THINGS = ("bicycle", "coat", "drill", "guitar", "lamp", "radio", "tent", "watch")


@dataclass(frozen=True)
class Drawn:
    """key: equal for problems that are one, whatever their words and their order; "": the question. base: the answer is
    written in it, and is compared figure by figure; 0: it is compared by its value."""

    question: str
    gold: str
    key: str = ""
    base: int = 0


def _top(digits: int) -> int:
    return 10**digits - 1


def _nonzero(rng: random.Random, top: int) -> int:
    return rng.choice((-1, 1)) * rng.randint(1, top)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def _expression(text: str) -> Drawn:
    node = parse(text)
    assert not isinstance(node, Invalid), text
    return Drawn(text, str(evaluate(node)), problem_key(text))


def chain_sum(rng: random.Random, terms: int, digits: int) -> Drawn:
    """ "37+485-12"."""
    count = rng.randint(2, terms)
    numbers = [str(rng.randint(1, _top(digits))) for _ in range(count)]
    return _expression(numbers[0] + "".join(rng.choice("+-") + number for number in numbers[1:]))


def mixed_arith(rng: random.Random, depth: int, digits: int) -> Drawn:
    """ "((8*12)/3)-(4+9)": every part is a whole number."""
    return _expression(render(_part(rng, depth, _top(digits))[0]))


def _part(rng: random.Random, depth: int, top: int) -> tuple[Node, int]:
    """(an expression of operations `depth` deep, its value). It has at most 2 depth numbers."""
    if depth == 0:
        value = rng.randint(1, top)
        return Literal(value), value
    (left, a), (right, b) = _part(rng, depth - 1, top), _part(rng, rng.randint(0, min(1, depth - 1)), top)
    op = rng.choice("+-*/")
    divisors = [d for d in range(2, min(abs(a), top) + 1) if a % d == 0] if op == "/" else []
    if divisors:
        b = rng.choice(divisors)
        return Binary("/", left, Literal(b)), a // b
    if op == "/" or (op == "*" and abs(a * b) > MAX_PRODUCT):
        op = "+"
    if rng.random() < 0.5:
        (left, a), (right, b) = (right, b), (left, a)
    return Binary(op, left, right), {"+": a + b, "-": a - b, "*": a * b}[op]


def fraction_ops(rng: random.Random, terms: int, digits: int) -> Drawn:
    """ "(3/4)-(5/6)*(1/2)"."""
    text = ""
    for _ in range(rng.randint(2, terms)):
        bottom = rng.randint(2, _top(digits))
        top = rng.choice([n for n in range(1, _top(digits) + 1) if math.gcd(n, bottom) == 1])
        text += f"{rng.choice('+-*/') if text else ''}({top}/{bottom})"
    return _expression(text)


def gcd_lcm(rng: random.Random, terms: int, digits: int) -> Drawn:
    numbers: set[int] = set()
    while len(numbers) < 2:
        shared = rng.randint(2, max(2, math.isqrt(_top(digits))))
        numbers = {shared * rng.randint(1, _top(digits) // shared) for _ in range(rng.randint(2, terms))}
    name, value = rng.choice((("greatest common divisor", math.gcd), ("least common multiple", math.lcm)))
    *most, last = sorted(numbers)
    return Drawn(f"What is the {name} of {', '.join(map(str, most))} and {last}?", str(value(*numbers)))


def mod_pow(rng: random.Random, digits: int) -> Drawn:
    base, exponent, modulus = (rng.randint(2, _top(digits)) for _ in range(3))
    question = f"What is the remainder when ${base}^{{{exponent}}}$ is divided by {modulus}?"
    return Drawn(question, str(pow(base, exponent, modulus)))


def base_convert(rng: random.Random, digits: int) -> Drawn:
    while True:
        old, new = rng.sample(range(2, len(FIGURES) + 1), 2)
        value = rng.randint(2, _top(digits))
        given, gold = _in_base(value, old), _in_base(value, new)
        if given != gold:
            letters = " Write the figures above nine as letters from A on." if max(old, new) > 10 else ""
            return Drawn(f"Write {given}, a number in base {old}, in base {new}.{letters}", gold, base=new)


def _in_base(value: int, base: int) -> str:
    text = ""
    while value:
        value, figure = divmod(value, base)
        text = FIGURES[figure] + text
    return text


def count_divisors(rng: random.Random, digits: int) -> Drawn:
    number = rng.randint(2, _top(digits))
    count, rest, prime = 1, number, 2
    while rest > 1:
        if prime * prime > rest:
            prime = rest
        power = 1
        while rest % prime == 0:
            rest, power = rest // prime, power + 1
        count, prime = count * power, prime + 1
    return Drawn(f"How many positive divisors does {number} have?", str(count))


# ---- algebra ---------------------------------------------------------------------------------------------------------


def polynomial(coefficients: list[int]) -> str:
    """Text of a polynomial in x, the constant first: [-2, 1, 3] -> "3x^2 + x - 2"."""
    text = ""
    for power, c in reversed(list(enumerate(coefficients))):
        if c:
            letter = "" if power == 0 else "x" if power == 1 else f"x^{power}"
            sign = ("-" if c < 0 else "") if not text else " - " if c < 0 else " + "
            text += f"{sign}{'' if abs(c) == 1 and letter else abs(c)}{letter}"
    return text or "0"


def _times(p: list[int], q: list[int]) -> list[int]:
    product = [0] * (len(p) + len(q) - 1)
    for i, a in enumerate(p):
        for j, b in enumerate(q):
            product[i + j] += a * b
    return product


def linear_eq(rng: random.Random, depth: int, digits: int) -> Drawn:
    """ "3(2x - 5) + 4 = x - 7": brackets `depth` deep."""
    top = _top(digits)
    left = [_nonzero(rng, top), _nonzero(rng, top)]
    text = polynomial(left)
    for _ in range(depth):
        factor, more = rng.randint(2, top), _nonzero(rng, top)
        left = [factor * left[0] + more, factor * left[1]]
        text = f"{factor}({text}) {'-' if more < 0 else '+'} {abs(more)}"
    right = [rng.randint(-top, top), rng.choice([c for c in range(-top, top + 1) if c != left[1]])]
    gold = Fraction(right[0] - left[0], left[1] - right[1])
    return Drawn(f"Solve ${text} = {polynomial(right)}$ for $x$.", str(gold))


def quadratic_roots(rng: random.Random, digits: int) -> Drawn:
    top = _top(digits)
    roots = [Fraction(0)] * 2
    while roots[0] == roots[1]:
        roots = sorted(Fraction(rng.randint(-top, top), rng.randint(1, 3)) for _ in range(2))
    factors = [[-root.numerator, root.denominator] for root in roots]
    gold = f"{roots[0]}, {roots[1]}"
    return Drawn(f"Find all solutions of ${polynomial(_times(*factors))} = 0$.", gold, gold)


def poly_expand(rng: random.Random, terms: int, digits: int) -> Drawn:
    product = [1]
    brackets = []
    for _ in range(rng.randint(2, terms)):
        factor = [_nonzero(rng, _top(digits)), rng.randint(1, _top(digits))]
        product = _times(product, factor)
        brackets.append(f"({polynomial(factor)})")
    return Drawn(f"Expand ${''.join(sorted(brackets))}$ and collect like terms.", polynomial(product))


# ---- words, sequences, counts ----------------------------------------------------------------------------------------


def percent_word(rng: random.Random, terms: int, digits: int) -> Drawn:
    price = 20 * rng.randint(1, _top(digits))
    changes = [5 * _nonzero(rng, 19) for _ in range(rng.randint(1, terms))]
    value = math.prod((Fraction(100 + change, 100) for change in changes), start=Fraction(price))
    said = ", then ".join(f"{'raised' if c > 0 else 'lowered'} by {abs(c)} percent" for c in changes)
    question = (
        f"A {rng.choice(THINGS)} costs {price} dollars. Its price is {said}. What does it cost in the end, in dollars? "
        "Give the exact value."
    )
    return Drawn(question, str(value), f"{price} {changes}")


def sequence_next(rng: random.Random, depth: int, terms: int, digits: int) -> Drawn:
    """By a rule that is up to `depth` hard: 1 differences or quotients are equal; 2 second differences are, or a term
    is the sum of the two before; 3 third differences are equal, or two sequences of the first kind take turns."""
    hard, other, top = rng.randint(1, depth), rng.random() < 0.5, _top(digits)
    if other and hard == 1:
        start, ratio = _nonzero(rng, top), rng.choice((-3, -2, 2, 3, 4, 5))
        values = [start * ratio**i for i in range(terms + 1)]
    elif other and hard == 2:
        values = [rng.randint(1, top), rng.randint(1, top)]
        while len(values) <= terms:
            values.append(values[-1] + values[-2])
    elif other:
        starts, steps = ([_nonzero(rng, top), _nonzero(rng, top)] for _ in range(2))
        values = [starts[i % 2] + steps[i % 2] * (i // 2) for i in range(terms + 1)]
    else:
        first = [_nonzero(rng, top) for _ in range(hard + 1)]  # of the sequence and of its differences
        values = [sum(d * math.comb(i, k) for k, d in enumerate(first)) for i in range(terms + 1)]
    return Drawn(", ".join(map(str, values[:-1])) + ", ?", str(values[-1]))


def binomial_count(rng: random.Random, digits: int) -> Drawn:
    n = rng.randint(2, _top(digits))
    k = rng.randint(1, n - 1)
    question = rng.choice((
        f"In how many ways can {k} of {n} people be chosen for a team?",
        f"How many words of {n} letters have the letter A {k} times and the letter B in all other places?",
        f"In a grid of streets, how many shortest ways lead to a corner {k} blocks east and {n - k} blocks north?",
    ))  # fmt: skip
    return Drawn(question, str(math.comb(n, k)), f"{n} {min(k, n - k)}")


# ---- the record of all -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """draw: called with the knobs by name. knobs: name -> (default, least, most). A question that is a formula has
    words before it (lead); in the style "compact" it stands alone, with `tail` after it."""

    draw: Callable[..., Drawn]
    knobs: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    lead: str = ""
    tail: str = ""


_WORK_OUT = "Work out the exact value of: "
FAMILIES = {
    "chain_sum": Family(chain_sum, {"terms": (5, 2, 12), "digits": (3, 1, 9)}, _WORK_OUT, " = ?"),
    "mixed_arith": Family(mixed_arith, {"depth": (3, 1, 6), "digits": (2, 1, 4)}, _WORK_OUT, " = ?"),
    "fraction_ops": Family(fraction_ops, {"terms": (3, 2, 6), "digits": (1, 1, 3)}, _WORK_OUT, " = ?"),
    "gcd_lcm": Family(gcd_lcm, {"terms": (3, 2, 6), "digits": (3, 1, 9)}),
    "mod_pow": Family(mod_pow, {"digits": (2, 1, 9)}),
    "base_convert": Family(base_convert, {"digits": (3, 1, 9)}),
    "linear_eq": Family(linear_eq, {"depth": (1, 0, 4), "digits": (1, 1, 3)}),
    "quadratic_roots": Family(quadratic_roots, {"digits": (1, 1, 3)}),
    "poly_expand": Family(poly_expand, {"terms": (2, 2, 6), "digits": (1, 1, 3)}),
    "count_divisors": Family(count_divisors, {"digits": (4, 1, 9)}),
    "percent_word": Family(percent_word, {"terms": (2, 1, 4), "digits": (2, 1, 4)}),
    "sequence_next": Family(
        sequence_next, {"depth": (2, 1, 3), "terms": (7, 6, 12), "digits": (1, 1, 3)}, "Find the next number: "
    ),
    "binomial_count": Family(binomial_count, {"digits": (2, 1, 3)}),
}
