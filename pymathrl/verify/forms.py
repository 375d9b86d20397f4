"""Whether an answer is written in a required form: reduced, factored, expanded."""

from __future__ import annotations

import math
import re

from pymathrl.verify import nodes as t
from pymathrl.verify.nodes import Node

_QUOTIENT = re.compile(
    r"\\[dtc]?frac\s*\{\s*-?(\d+)\s*\}\s*\{\s*-?(\d+)\s*\}|\\[dtc]?frac\s*(\d)\s*(\d)|(\d+)\s*/\s*(\d+)"
)


def has_form(text: str, node: Node | None, form: str) -> bool:
    """text: the normalized answer, node: its tree. "reduced": every quotient of whole numbers in it is in lowest terms;
    "factored": no sum on top; "expanded": no sum as a factor or below a power."""
    if form == "reduced":
        quotients = [tuple(int(g) for g in m.groups() if g) for m in _QUOTIENT.finditer(text)]
        return all(math.gcd(a, b) == 1 and b != 1 for a, b in quotients)
    return node is not None and _has_form(node, form)


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
