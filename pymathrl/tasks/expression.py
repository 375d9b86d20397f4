"""Arithmetic over nonnegative integer literals: a bounded parser, exact evaluation, and a canonical form.

Model output is never executed: this is the whole language, and everything else is invalid.

    sum     -> product (("+" | "-") product)*
    product -> factor (("*" | "/") factor)*
    factor  -> ("+" | "-") factor | "(" sum ")" | digits

ASCII digits only; spaces, tabs and line breaks between tokens; "×", "÷", "−" (U+2212) and "–" (U+2013) are read as
"*", "/", "-", "-".  A leading zero is allowed ("05" is 5).  The limits below keep time and memory bounded for any text:
256 characters and 12 literals also bound every value, so evaluation with `fractions.Fraction` is exact and cannot hang.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_LENGTH = 256  # characters, after stripping
MAX_DEPTH = 64  # nested brackets and signs
MAX_LITERALS = 12

_NORMALIZE = str.maketrans({"×": "*", "÷": "/", "−": "-", "–": "-"})  # noqa: RUF001 - the characters to replace
_TOKEN = re.compile(r"[ \t\r\n]*([0-9]+|[-+*/()])[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Literal:
    value: int


@dataclass(frozen=True, slots=True)
class Negated:
    operand: "Node"


@dataclass(frozen=True, slots=True)
class Binary:
    op: str  # one of + - * /
    left: "Node"
    right: "Node"


Node = Literal | Negated | Binary  # unary plus and brackets leave no trace


@dataclass(frozen=True, slots=True)
class Invalid:
    """The text is not an expression of the language above; `reason` is a short phrase for a person."""

    reason: str


class _Rejected(Exception):
    """Raised and caught inside this file only."""


def parse(text: str) -> Node | Invalid:
    """The tree of `text`, or why there is none.  Never raises, whatever the text."""
    try:
        tokens = _tokenize(text)
        node, end = _sum(tokens, 0, 0)
        if tokens[end]:
            raise _Rejected(f"unexpected {tokens[end]!r}")
        return node
    except _Rejected as rejected:
        return Invalid(str(rejected))


def evaluate(node: Node) -> Fraction | None:
    """The exact value; None where a divisor is zero."""
    if isinstance(node, Literal):
        return Fraction(node.value)
    if isinstance(node, Negated):
        value = evaluate(node.operand)
        return None if value is None else -value
    left, right = evaluate(node.left), evaluate(node.right)
    if left is None or right is None:
        return None
    if node.op == "+":
        return left + right
    if node.op == "-":
        return left - right
    if node.op == "*":
        return left * right
    return left / right if right else None


def literals(node: Node) -> list[int]:
    """The literals from left to right."""
    if isinstance(node, Literal):
        return [node.value]
    if isinstance(node, Negated):
        return literals(node.operand)
    return literals(node.left) + literals(node.right)


def render(node: Node) -> str:
    """Text of a tree without signs: brackets around every operation but the outermost, no spaces: "(79-60)+17"."""
    text = _render(node)
    return text[1:-1] if isinstance(node, Binary) else text


def canonical(expression: str | Node) -> str | None:
    """One text for all ways to write the same solution; None if a text does not parse.

    Sums are flattened to a sorted multiset of signed terms and products to a sorted multiset of factors and divisors,
    through nested brackets, minus signs and divisions:
    "(79-60)+17", "17+79-60", "79-(60-17)" -> "+[-60,17,79]";   "8/(4/2)", "8*2/4" -> "*[/4,2,8]".
    Signs of factors move to the front of their product, and a sum that is a factor is written with a plus on its
    first term, so "(5-2)*3", "-(2-5)*3" -> "-*[+[-5,2],3]".  Nothing is multiplied out, and multiplying and dividing by
    1 stay distinct.
    """
    node = parse(expression) if isinstance(expression, str) else expression
    if isinstance(node, Invalid):
        return None
    terms = _terms(node, 1)
    return _signed(*terms[0]) if len(terms) == 1 else _sum_form(terms)


# A signed form is (form, sign); sign is +1 or -1, or 0 for a sum that equals its own negation, such as 5-5: it is zero,
# so a minus in front of it changes nothing.
_Signed = tuple[str, int]


def _terms(node: Node, sign: int) -> list[_Signed]:
    if isinstance(node, Negated):
        return _terms(node.operand, -sign)
    if isinstance(node, Binary) and node.op in "+-":
        return _terms(node.left, sign) + _terms(node.right, sign if node.op == "+" else -sign)
    factors, product_sign = _factors(node, "")
    form = factors[0] if len(factors) == 1 else f"*[{','.join(sorted(factors))}]"
    return [(form, sign * product_sign)]


def _factors(node: Node, prefix: str) -> tuple[list[str], int]:
    """Factors (divisors carry "/") and the sign of their product.  `prefix`: "" or "/", where this subtree stands."""
    if isinstance(node, Negated):
        factors, sign = _factors(node.operand, prefix)
        return factors, -sign
    if isinstance(node, Literal):
        return [f"{prefix}{node.value}"], 1
    if node.op in "*/":
        left, left_sign = _factors(node.left, prefix)
        right, right_sign = _factors(node.right, prefix if node.op == "*" else {"": "/", "/": ""}[prefix])
        return left + right, left_sign * right_sign
    terms = sorted(_terms(node, 1))
    negated = sorted((form, -sign) for form, sign in terms)
    if terms == negated:
        return [prefix + _sum_form(terms)], 0
    # Of the two ways to sign this sum keep the greater, in which the first differing term is positive.
    return ([prefix + _sum_form(terms)], 1) if terms > negated else ([prefix + _sum_form(negated)], -1)


def _signed(form: str, sign: int) -> str:
    return f"-{form}" if sign < 0 else form


def _sum_form(terms: list[_Signed]) -> str:
    return f"+[{','.join(sorted(_signed(*term) for term in terms))}]"


def _render(node: Node) -> str:
    if isinstance(node, Literal):
        return str(node.value)
    if isinstance(node, Negated):
        raise ValueError("render: the tree must not contain signs, got a Negated node")
    return f"({_render(node.left)}{node.op}{_render(node.right)})"


def _tokenize(text: str) -> list[str]:
    """Tokens and a closing "" that stands for the end."""
    text = text.strip(" \t\r\n").translate(_NORMALIZE)
    if len(text) > MAX_LENGTH:
        raise _Rejected(f"longer than {MAX_LENGTH} characters")
    tokens, position, count = [], 0, 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise _Rejected(f"unexpected character {text[position]!a}")
        tokens.append(match[1])
        count += match[1].isdigit()
        position = match.end()
    if count > MAX_LITERALS:
        raise _Rejected(f"more than {MAX_LITERALS} numbers")
    return [*tokens, ""]


_LEVELS = (("+", "-"), ("*", "/"))  # loosest first


def _sum(tokens: list[str], at: int, depth: int, level: int = 0) -> tuple[Node, int]:
    """A run of operations of one level, joined from the left; its operands are of the next level, then factors."""
    if level == len(_LEVELS):
        return _factor(tokens, at, depth)
    node, at = _sum(tokens, at, depth, level + 1)
    while tokens[at] in _LEVELS[level]:
        op = tokens[at]
        right, at = _sum(tokens, at + 1, depth, level + 1)
        node = Binary(op, node, right)
    return node, at


def _factor(tokens: list[str], at: int, depth: int) -> tuple[Node, int]:
    token = tokens[at]
    if token.isdigit():
        return Literal(int(token)), at + 1
    if token not in ("(", "+", "-"):
        raise _Rejected(f"expected a number, got {token!r}" if token else "ends where a number is expected")
    if depth == MAX_DEPTH:
        raise _Rejected(f"nested deeper than {MAX_DEPTH}")
    if token != "(":
        node, at = _factor(tokens, at + 1, depth + 1)
        return (Negated(node) if token == "-" else node), at
    node, at = _sum(tokens, at + 1, depth + 1)
    if tokens[at] != ")":
        raise _Rejected(f"expected ')', got {tokens[at]!r}" if tokens[at] else "a bracket is not closed")
    return node, at + 1
