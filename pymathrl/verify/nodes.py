"""The tree of an answer. Scalars below, then what holds several of them. Trees are immutable and bounded: the parser
refuses deeper nesting and longer texts (see `parser`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction


class Node:
    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Num(Node):
    """A number as written. places: digits after the point of a decimal, digits: its significant ones; None and 0 for
    whole numbers and repeating decimals, which are exact."""

    value: Fraction
    places: int | None = None
    digits: int = 0


@dataclass(frozen=True, slots=True)
class Sym(Node):
    """A variable, with its subscript; or one of pi, e, i, infinity (`PI`, `E`, `IMAGINARY`, `INFINITY`)."""

    name: str


@dataclass(frozen=True, slots=True)
class Add(Node):
    terms: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Mul(Node):
    factors: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Pow(Node):
    base: Node
    exponent: Node


@dataclass(frozen=True, slots=True)
class Root(Node):
    """The real root where there is one: of degree 3, that of -8 is -2, unlike (-8)^(1/3)."""

    arg: Node
    degree: int


@dataclass(frozen=True, slots=True)
class Call(Node):
    name: str
    args: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class PlusMinus(Node):
    """The factor of a term with \\pm (1) or \\mp (-1); all of an answer take the same side."""

    sign: int


@dataclass(frozen=True, slots=True)
class Literal(Node):
    """What is compared as it is written and never evaluated: sums, integrals, limits, ellipses."""

    text: str


@dataclass(frozen=True, slots=True)
class Quantity(Node):
    """A value with a unit, in the normal form of `words.unit`."""

    value: Node
    unit: str


@dataclass(frozen=True, slots=True)
class Based(Node):
    """Digits with the base that they are written in."""

    digits: str
    base: str


@dataclass(frozen=True, slots=True)
class Word(Node):
    """Text: names, yes and no, choice letters."""

    text: str


@dataclass(frozen=True, slots=True)
class Group(Node):
    """Two or more items in brackets, `(` `[` `<` before and `)` `]` `>` after: a tuple or an interval."""

    items: tuple[Node, ...]
    left: str
    right: str


@dataclass(frozen=True, slots=True)
class Braces(Node):
    """A set, item by item."""

    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Items(Node):
    """A list without brackets. how: "," or "and" or "or"."""

    items: tuple[Node, ...]
    how: str = ","


@dataclass(frozen=True, slots=True)
class Named(Node):
    """A set with a name: R, Z, N, Q, C, or the empty set "0"."""

    name: str


@dataclass(frozen=True, slots=True)
class SetOp(Node):
    """op: union, intersection, minus."""

    op: str
    left: Node
    right: Node


@dataclass(frozen=True, slots=True)
class Chain(Node):
    """side op side op side, with ops = < > <= >= != ~ in."""

    sides: tuple[Node, ...]
    ops: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ratio(Node):
    """a : b : c. clock: written like a time of day."""

    terms: tuple[Node, ...]
    clock: bool = False


@dataclass(frozen=True, slots=True)
class Matrix(Node):
    rows: tuple[tuple[Node, ...], ...]


PI, E, IMAGINARY, INFINITY = Sym("pi"), Sym("e"), Sym("i"), Sym("oo")  # other variables are one letter or a name
CONSTANTS = frozenset({"pi", "e", "i", "oo"})
MINUS_ONE = Num(Fraction(-1))
STRUCTURES = (Group, Braces, Items, Named, SetOp, Chain, Ratio, Matrix, Word, Based, Quantity)


def children(node: Node) -> tuple[Node, ...]:
    """What a node holds, in order."""
    match node:
        case Add(x) | Mul(x) | Group(x, _, _) | Braces(x) | Items(x, _) | Chain(x, _) | Ratio(x, _) | Call(_, x):
            return x
        case Pow(a, b) | SetOp(_, a, b):
            return (a, b)
        case Root(a, _) | Quantity(a, _):
            return (a,)
        case Matrix(rows):
            return tuple(x for row in rows for x in row)
    return ()


def walk(node: Node) -> list[Node]:
    """The node and all below it."""
    found = [node]
    for n in found:
        found.extend(children(n))
    return found


def symbols(node: Node) -> frozenset[str]:
    """Names of the variables, without the constants pi, e, i and infinity."""
    return frozenset(n.name for n in walk(node) if isinstance(n, Sym)) - CONSTANTS


def replace(node: Node, change: Callable[[Node], Node | None]) -> Node:
    """The tree with every expression in it for which `change` has another one replaced by that."""
    changed = change(node)
    if changed is not None:
        return changed
    match node:
        case Add(x):
            return Add(tuple(replace(a, change) for a in x))
        case Mul(x):
            return Mul(tuple(replace(a, change) for a in x))
        case Pow(a, b):
            return Pow(replace(a, change), replace(b, change))
        case Root(a, n):
            return Root(replace(a, change), n)
        case Call(f, x):
            return Call(f, tuple(replace(a, change) for a in x))
        case Group(x, left, right):
            return Group(tuple(replace(a, change) for a in x), left, right)
    return node


def negate(node: Node) -> Node:
    if isinstance(node, Num):
        return Num(-node.value, node.places, node.digits)
    return Mul((MINUS_ONE, node))


def is_scalar(node: Node) -> bool:
    """Whether the tree is one expression: no list, set, relation, text or unit in it."""
    return not any(isinstance(n, STRUCTURES) for n in walk(node))
