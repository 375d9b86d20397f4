"""Sets of real numbers: unions of intervals and points, from brackets, braces, set operations and inequalities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from pymathrl.verify import nodes as t
from pymathrl.verify import numeric
from pymathrl.verify.canonical import Undefined
from pymathrl.verify.nodes import Node

_ORDER_DIGITS = 50
LOW, HIGH = t.negate(t.INFINITY), t.INFINITY


class NotReal(Exception):
    """The tree is no set of real numbers that can be put in order."""


@dataclass(frozen=True)
class Piece:
    """An interval; a point where both ends are the same closed value."""

    low: Node
    low_closed: bool
    high: Node
    high_closed: bool


@dataclass(frozen=True)
class RealSet:
    """pieces: disjoint and in order, where their ends are numbers. variable: that of the inequality it came from."""

    pieces: tuple[Piece, ...]
    variable: str | None = None


EVERYTHING = (Piece(LOW, False, HIGH, False),)


def is_infinite(node: Node) -> int:
    """1 for infinity, -1 for minus infinity, 0 for anything else."""
    sign = 1
    while isinstance(node, t.Mul) and len(node.factors) == 2 and isinstance(node.factors[0], t.Num):
        if node.factors[0].value < 0:
            sign = -sign
        node = node.factors[1]
    return sign if node == t.INFINITY else 0


def interval(low: Node, low_closed: bool, high: Node, high_closed: bool) -> Piece:
    """A bracket at infinity is open, however it is written."""
    return Piece(low, low_closed and not is_infinite(low), high, high_closed and not is_infinite(high))


def from_tree(node: Node) -> RealSet:
    """Raises NotReal."""
    match node:
        case t.Group((low, high), left, right) if left in "([" and right in ")]":
            if not (t.is_scalar(low) and t.is_scalar(high)):
                raise NotReal
            piece = interval(low, left == "[", high, right == "]")
            return RealSet((piece,))
        case t.Named("R"):
            return RealSet(EVERYTHING)
        case t.Named("0"):
            return RealSet(())
        case t.Braces(items):
            if not all(t.is_scalar(x) for x in items):
                raise NotReal
            return RealSet(normalized([Piece(x, True, x, True) for x in items]))
        case t.SetOp(op, left, right):
            a, b = from_tree(left).pieces, from_tree(right).pieces
            if op == "union":
                return RealSet(normalized([*a, *b]))
            if op == "intersection":
                return RealSet(intersection(a, b))
            return RealSet(intersection(a, complement(b)))
    raise NotReal


@lru_cache(maxsize=256)
def order(node: Node) -> tuple[int, Fraction]:
    """A key that sorts ends: (infinity's sign, the value to 50 digits)."""
    infinite = is_infinite(node)
    if infinite:
        return infinite, Fraction(0)
    if isinstance(node, t.Num):
        return 0, node.value
    if t.symbols(node):
        raise NotReal
    try:
        value = numeric.value(node)
    except (numeric.Outside, Undefined):
        raise NotReal from None
    if value.imag != 0:
        raise NotReal
    return 0, Fraction(int(value.real * 10**_ORDER_DIGITS), 10**_ORDER_DIGITS)


def normalized(pieces: list[Piece]) -> tuple[Piece, ...]:
    """Sorted, without empty ones, with those that touch joined."""
    if len(pieces) <= 1:
        return tuple(p for p in pieces if not _empty(p))
    keyed = sorted((p for p in pieces if not _empty(p)), key=lambda p: (order(p.low), not p.low_closed))
    merged: list[Piece] = []
    for p in keyed:
        last = merged[-1] if merged else None
        if last is not None and (
            order(p.low) < order(last.high) or (order(p.low) == order(last.high) and (p.low_closed or last.high_closed))
        ):
            a, b = (order(last.high), last.high_closed), (order(p.high), p.high_closed)
            high = last if a >= b else p
            merged[-1] = Piece(last.low, last.low_closed, high.high, high.high_closed)
        else:
            merged.append(p)
    return tuple(merged)


def _empty(p: Piece) -> bool:
    if t.symbols(p.low) or t.symbols(p.high):
        return False
    low, high = order(p.low), order(p.high)
    return low > high or (low == high and not (p.low_closed and p.high_closed))


def complement(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    gaps, low, closed = [], LOW, False
    for p in pieces:
        gaps.append(Piece(low, closed, p.low, not p.low_closed and not is_infinite(p.low)))
        low, closed = p.high, not p.high_closed and not is_infinite(p.high)
    gaps.append(Piece(low, closed, HIGH, False))
    return tuple(g for g in gaps if not _empty(g))


def intersection(a: tuple[Piece, ...], b: tuple[Piece, ...]) -> tuple[Piece, ...]:
    found = []
    for p in a:
        for q in b:
            low = max(p, q, key=lambda x: (order(x.low), not x.low_closed))
            high = min(p, q, key=lambda x: (order(x.high), x.high_closed))
            piece = Piece(low.low, low.low_closed, high.high, high.high_closed)
            if not _empty(piece):
                found.append(piece)
    return normalized(found)


def same(a: RealSet, b: RealSet, equal: Callable[[Node, Node], bool | None]) -> bool | None:
    """Whether two sets have the same pieces, with `equal` for their ends (None: it could not tell)."""
    if len(a.pieces) != len(b.pieces):
        return False
    verdict: bool | None = True
    for p, q in zip(a.pieces, b.pieces, strict=True):
        if (p.low_closed, p.high_closed) != (q.low_closed, q.high_closed):
            return False
        for x, y in ((p.low, q.low), (p.high, q.high)):
            found = equal(x, y)
            if found is False:
                return False
            verdict = None if found is None else verdict
    return verdict
