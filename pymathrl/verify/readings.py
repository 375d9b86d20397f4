"""What an answer claims: a value with or without a name, an equation, an inequality, a set of real numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from pymathrl.verify import nodes as t
from pymathrl.verify import real_sets as rs
from pymathrl.verify.nodes import Node

_FLIP = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!="}


@dataclass(frozen=True)
class Value:
    """A value, or a list of them. names: what stands before "=", one for a lone variable or f(x), several for a tuple.
    also: other sides of an equality chain, which must agree with the last (x = 5 = 6 says nothing)."""

    node: Node
    names: tuple[str, ...] = ()
    also: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Equation:
    """left = right, not solved for a variable."""

    left: Node
    right: Node


@dataclass(frozen=True)
class Inequality:
    """left < right or left <= right, not solved; also left != right."""

    left: Node
    op: str
    right: Node


@dataclass(frozen=True)
class Assignments:
    """Values of several variables, in the order in which they are given."""

    names: tuple[str, ...]
    values: tuple[Node, ...]


@dataclass(frozen=True)
class System:
    """Several claims of which none is a plain value. how: "," or "and" or "or"."""

    parts: tuple[Reading, ...]
    how: str


Reading = Value | Equation | Inequality | Assignments | System | rs.RealSet


def read(node: Node) -> Reading:
    """What a tree claims; \\pm is written out as both values."""
    if isinstance(node, t.Chain):
        return _chain(node)
    if isinstance(node, t.Items):
        return _items(node)
    if isinstance(node, t.Group) and (node.left, node.right) == ("(", ")"):
        found = _items(t.Items(node.items)) if any(isinstance(x, t.Chain) for x in node.items) else None
        if isinstance(found, Assignments):  # (x = 1, y = 2)
            return found
    if isinstance(node, t.Quantity):
        inner = read(node.value)
        if isinstance(inner, Value) and inner.names:  # "x = 5 cm" is read with the unit outside
            return replace(inner, node=t.Quantity(inner.node, node.unit))
    return Value(both_signs(node))


def names_of(node: Node) -> tuple[str, ...]:
    match node:
        case t.Sym(name) if name not in ("pi", "oo"):
            return (name,)
        case t.Mul(items):
            letters = [x.name if isinstance(x, t.Sym) else "" for x in items]
            if "angle" in letters[:2]:  # m\angle ABC = 60^\circ
                letters = letters[letters.index("angle") :]
            if all(x == "angle" or (len(x) == 1 and x.isupper()) for x in letters):
                return ("".join(letters),)  # a segment: AB = 5
        case t.Group(items, "(", ")") if all(isinstance(x, t.Sym) for x in items):
            return tuple(x.name for x in items if isinstance(x, t.Sym))
    return ()


def _chain(chain: t.Chain) -> Reading:
    sides, ops = list(chain.sides), list(chain.ops)
    if set(ops) <= {"=", "~"}:
        return _equalities(sides, ops)
    if "in" in ops:
        if ops == ["in"] and names_of(sides[0]):
            found = read(sides[1])
            if isinstance(found, Value):
                node = found.node
                if isinstance(node, t.Braces):
                    node = t.Items(node.items) if len(node.items) > 1 else node
                return Value(node, names_of(sides[0]))
        return Value(chain)
    if "=" in ops or "~" in ops:
        return Value(chain)
    if len(ops) == 1:
        return _one_inequality(sides[0], ops[0], sides[1])
    if len(ops) == 2 and names_of(sides[1]) and len(names_of(sides[1])) == 1:
        upward, downward = {"<", "<="}, {">", ">="}
        name = names_of(sides[1])[0]
        for direction, (low, low_op), (high, high_op) in (
            (upward, (sides[0], ops[0]), (sides[2], ops[1])),
            (downward, (sides[2], ops[1]), (sides[0], ops[0])),
        ):
            if set(ops) <= direction and name not in t.symbols(low) | t.symbols(high):
                piece = rs.interval(low, "=" in low_op, high, "=" in high_op)
                return rs.RealSet((piece,), name)
    return Value(chain)


def _equalities(sides: list[Node], ops: list[str]) -> Reading:
    if "~" in ops:
        cut = ops.index("~")
        if cut > 0 or not names_of(sides[0]):  # the exact value stands before the approximation
            sides, ops = sides[: cut + 1], ops[:cut]
        else:
            sides, ops = sides[: cut + 2], ops[: cut + 1]
        if not ops:
            return read(sides[0])
    names, last = names_of(sides[0]), sides[-1]
    if not names and names_of(last) and not t.symbols(sides[0]):
        names, sides = names_of(last), sides[::-1]
        last = sides[-1]
    if names:
        used = {n for side in sides[1:] for n in t.symbols(side)}
        if set(names) & used:
            return Equation(sides[0], last) if len(sides) == 2 else Value(t.Chain(tuple(sides), tuple(ops)))
        return Value(both_signs(last), names, tuple(sides[1:-1]))
    if len(sides) == 2 and (t.symbols(sides[0]) or t.symbols(sides[1])):
        return Equation(sides[0], sides[1])
    return Value(both_signs(last), (), tuple(sides[:-1]))


def _one_inequality(left: Node, op: str, right: Node) -> Reading:
    if not names_of(left) and names_of(right):
        left, op, right = right, _FLIP[op], left
    names = names_of(left)
    if len(names) == 1 and t.is_scalar(right) and names[0] not in t.symbols(right):
        if op == "!=":
            try:
                pieces = rs.complement((rs.Piece(right, True, right, True),))
            except rs.NotReal:  # complex
                pieces = ()
            return Inequality(left, op, right) if t.symbols(right) or not pieces else rs.RealSet(pieces, names[0])
        below = op in ("<", "<=")
        piece = rs.interval(rs.LOW, False, right, "=" in op) if below else rs.interval(right, "=" in op, rs.HIGH, False)
        return rs.RealSet((piece,), names[0])
    return _ascending(left, op, right)


def _ascending(left: Node, op: str, right: Node) -> Inequality:
    return Inequality(right, _FLIP[op], left) if op in (">", ">=") else Inequality(left, op, right)


def as_inequality(found: rs.RealSet) -> Inequality | None:
    """x < a with another variable on the right, which could as well be read as a > x."""
    if found.variable is None or len(found.pieces) != 1:
        return None
    piece, name = found.pieces[0], t.Sym(found.variable)
    if rs.is_infinite(piece.low) and t.symbols(piece.high):
        return _ascending(name, "<=" if piece.high_closed else "<", piece.high)
    if rs.is_infinite(piece.high) and t.symbols(piece.low):
        return _ascending(name, ">=" if piece.low_closed else ">", piece.low)
    return None


def _items(items: t.Items) -> Reading:
    parts = [read(x) for x in items.items]
    if all(isinstance(p, Value) and not p.also for p in parts):
        values = [p for p in parts if isinstance(p, Value)]
        names = [p.names for p in values]
        flat = t.Items(tuple(y for p in values for y in _spread(p.node)), items.how)
        if not any(names):
            return Value(flat)
        if len(set(names)) == 1:  # x = 1, x = 2: alternatives, no pair
            return Value(replace(flat, how="or"), names[0])
        if not any(names[1:]):
            return Value(flat, names[0])
        if all(len(n) == 1 for n in names) and len(set(names)) == len(names) and items.how != "or":
            return Assignments(tuple(n[0] for n in names), tuple(p.node for p in values))
        return System(tuple(parts), items.how)
    sets = [p for p in parts if isinstance(p, rs.RealSet)]
    if len(sets) == len(parts) and len({s.variable for s in sets}) == 1:
        try:
            pieces = [p for s in sets for p in s.pieces]
            common = sets[0].pieces
            for s in sets[1:]:
                common = rs.intersection(common, s.pieces)
            both = items.how == "and" or (items.how == "," and common and all(len(s.pieces) == 1 for s in sets))
            return rs.RealSet(common if both else rs.normalized(pieces), sets[0].variable)
        except rs.NotReal:
            pass
    if sets and sets[0] is parts[0] and len(parts) > 1 and all(
        isinstance(p, Value) and not p.names and t.is_scalar(p.node) for p in parts[1:]
    ) and _is_exclusion(items.items[0]):  # fmt: skip
        points = [p.node for p in parts if isinstance(p, Value)]  # "x != 1, 2"
        try:
            rest = rs.complement(rs.normalized([rs.Piece(x, True, x, True) for x in points]))
            return rs.RealSet(rs.intersection(sets[0].pieces, rest), sets[0].variable)
        except rs.NotReal:
            pass
    return System(tuple(parts), items.how)


def _is_exclusion(node: Node) -> bool:
    return isinstance(node, t.Chain) and node.ops == ("!=",)


def _spread(node: Node) -> tuple[Node, ...]:
    """The values of a list inside a list: those of \\pm, of braces after \\in."""
    return node.items if isinstance(node, t.Items) else (node,)


def both_signs(node: Node) -> Node:
    """A tree with \\pm as the list of its two values; all \\pm in it take the upper sign together."""
    if not any(isinstance(n, t.PlusMinus) for n in t.walk(node)):
        return node
    if isinstance(node, t.Quantity):
        inner = both_signs(node.value)
        return t.Items(tuple(t.Quantity(x, node.unit) for x in _spread(inner)))
    if isinstance(node, t.Items):
        return t.Items(tuple(y for x in node.items for y in _spread(both_signs(x))), node.how)
    if isinstance(node, t.Braces):
        return t.Braces(tuple(y for x in node.items for y in _spread(both_signs(x))))
    return t.Items((_signed(node, 1), _signed(node, -1)))


def _signed(node: Node, sign: int) -> Node:
    return t.replace(node, lambda n: t.Num(Fraction(n.sign * sign)) if isinstance(n, t.PlusMinus) else None)
