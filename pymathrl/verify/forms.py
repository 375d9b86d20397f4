"""Whether an answer is written in a required form: reduced, evaluated, factored, expanded."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from pymathrl.verify import nodes as t
from pymathrl.verify.nodes import Node

_QUOTIENT = re.compile(
    r"\\[dtc]?frac\s*\{\s*-?(\d+)\s*\}\s*\{\s*-?(\d+)\s*\}|\\[dtc]?frac\s*(\d)\s*(\d)|"
    r"(\d+)\s*[)}]?\s*(?:/|\\div|÷)\s*[({]?\s*-?\s*(\d+)"
)
_DIVISION = re.compile(r"/|÷|\\div|frac|\\over(?![a-z])")


def has_form(text: str, node: Node | None, form: str) -> bool:
    """text: the normalized answer, node: its tree. "reduced": every quotient of whole numbers in it is in lowest terms;
    "evaluated": nothing is left to work out, see `_is_evaluated`; "factored": no sum on top; "expanded": no sum as a
    factor or below a power."""
    if form in ("reduced", "evaluated"):
        quotients = [tuple(int(g) for g in m.groups() if g) for m in _QUOTIENT.finditer(text)]
        reduced = all(math.gcd(a, b) == 1 and b != 1 for a, b in quotients)
        if form == "reduced" or not reduced:
            return reduced
        # the tree has 12/3 as the number 4; only the text shows a division that is no fraction in lowest terms
        return node is not None and not _DIVISION.search(_QUOTIENT.sub("", text)) and _is_evaluated(node)
    return node is not None and _has_form(node, form)


def _is_evaluated(node: Node) -> bool:
    """A rational number written as one, a sum of different monomials with one number each ("3x^2-x+5", "3+4i"), or
    several such things; of a chain of equations the last side is the answer."""
    match node:
        case t.Chain(sides, _):
            return _is_evaluated(sides[-1])
        case t.Items() | t.Group() | t.Braces() | t.Quantity():
            return all(_is_evaluated(x) for x in t.children(node))
    monomials = [_monomial(x) for x in (node.terms if isinstance(node, t.Add) else (node,))]
    return None not in monomials and len(set(monomials)) == len(monomials)


def _monomial(node: Node) -> tuple[tuple[str, Fraction], ...] | None:
    """Variables with their powers, in order; None where numbers or equal variables are still to be multiplied."""
    powers: dict[str, Fraction] = {}
    factors, numbers = [node], 0
    for factor in factors:
        match factor:
            case t.Mul(more):
                factors.extend(x for x in more if x != t.MINUS_ONE)
            case t.Num():
                numbers += 1
            case t.Sym(name) if name not in powers:
                powers[name] = Fraction(1)
            case t.Pow(t.Sym(name), t.Num(exponent)) if name not in powers:
                powers[name] = exponent
            case _:
                return None
    return tuple(sorted(powers.items())) if numbers <= 1 else None


def _has_form(node: Node, form: str) -> bool:
    if isinstance(node, t.Items | t.Group | t.Braces | t.Chain | t.Quantity):
        return all(_has_form(x, form) for x in t.children(node))
    if form == "factored":
        return not isinstance(node, t.Add)
    for n in t.walk(node):
        if isinstance(n, t.Mul) and any(isinstance(x, t.Add) for x in n.factors):
            return False
        if isinstance(n, t.Pow) and isinstance(n.base, t.Add) and n.exponent != t.MINUS_ONE:
            return False
    return True
