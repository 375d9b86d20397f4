# ruff: noqa: RUF001 - look-alike characters are test inputs here
import re
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pymathrl.tasks.expression import (
    MAX_DEPTH,
    MAX_LENGTH,
    MAX_LITERALS,
    Binary,
    Invalid,
    Literal,
    Negated,
    canonical,
    evaluate,
    literals,
    parse,
    render,
)

ANY_CHARACTER = st.characters(exclude_categories=())  # surrogates too
TRAP_CHARACTER = st.sampled_from("0123456789+-*/()= .,\n\t_eE!%^x×÷−–²½٣〇")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("05*2", 10),
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("8-3-2", 3),
        ("8/4/2", 1),
        ("8/(4/2)", 4),
        ("2--3", 5),
        ("-2*-3", 6),
        ("-(2-5)", 3),
        ("+2+3", 5),
        ("8/(3-8/3)", 24),
        ("1/3*3*7", 7),
        ("1/3", Fraction(1, 3)),
        (" 7\t*\r\n2 ", 14),
        ("7−4", 3),
        ("7–4", 3),
        ("9÷3×2", 6),
        ("99*99*99*99", 96_059_601),
        ("1/(3-3)", None),
        ("(1/0)*0", None),
    ],
)
def test_value(text, value):
    assert evaluate(parse(text)) == value


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "()", "(", ")", "+", "2+", "*2", "(2+3", "2+3)", "3 7", "(2)(3)", "2(3)", "2**3", "2* *3", "7//2",
        "5!", "5%3", "2^3", "3.7*10", "1.0", ".5", "1e2", "2_0+1", "0x10", "2*3=6", "=6", "2+3 # ok", "2,3", "x", "²",
        "٣+1", "２", "½", "2\u00a0+3", "2\u2028+3", "2\x00", "\ud800", "True", "[2]", "2;3", "a:=2", "lambda:0",
        '__import__("os")', "\\frac{1}{2}", "2×", "inf", "nan",
    ],
)  # fmt: skip
def test_invalid(text):
    result = parse(text)
    assert isinstance(result, Invalid) and result.reason
    assert canonical(text) is None


def test_limits_are_where_they_are_stated():
    assert parse("(" * MAX_DEPTH + "2" + ")" * MAX_DEPTH) == Literal(2)
    assert isinstance(parse("(" * (MAX_DEPTH + 1) + "2" + ")" * (MAX_DEPTH + 1)), Invalid)
    assert evaluate(parse("-" * MAX_DEPTH + "2")) == 2
    assert isinstance(parse("-" * (MAX_DEPTH + 1) + "2"), Invalid)
    assert evaluate(parse("+".join("1" * MAX_LITERALS))) == MAX_LITERALS
    assert isinstance(parse("+".join("1" * (MAX_LITERALS + 1))), Invalid)
    assert parse(" " * MAX_LENGTH + "9" * MAX_LENGTH) == Literal(int("9" * MAX_LENGTH))
    assert isinstance(parse("9" * (MAX_LENGTH + 1)), Invalid)
    for huge in ("(" * 10**6, "-" * 10**6, "9" * 10**6, "1+" * 10**6):
        assert isinstance(parse(huge), Invalid)


@given(st.text(ANY_CHARACTER) | st.text(TRAP_CHARACTER, max_size=40))
def test_any_text_gets_an_answer(text):
    node = parse(text)
    if not isinstance(node, Invalid):
        value = evaluate(node)
        assert value is None or isinstance(value, Fraction)
        assert canonical(text) == canonical(node) is not None
        assert len(literals(node)) == len(re.findall("[0-9]+", text))


# Random expressions as text, with and without brackets, so that precedence and associativity are tested too.
EXPRESSIONS = st.recursive(
    st.integers(0, 12).map(str),
    lambda inner: (
        st.tuples(inner, st.sampled_from("+-*/"), inner).map("".join)
        | st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda parts: f"({' '.join(parts)})")
        | st.tuples(st.sampled_from("+-"), inner).map("".join)
    ),
    max_leaves=10,
)


def python_value(text):
    """Python's own parser as the oracle, on text made here."""
    try:
        return eval(re.sub("[0-9]+", r"Fraction(\g<0>)", text), {"Fraction": Fraction})
    except ZeroDivisionError:
        return None


@given(EXPRESSIONS)
def test_value_agrees_with_python_over_fractions(text):
    node = parse(text)
    assume(not isinstance(node, Invalid) or node.reason.startswith("longer"))
    assert not isinstance(node, Invalid)
    assert evaluate(node) == python_value(text)


@pytest.mark.parametrize(
    ("form", "texts"),
    [
        ("+[-60,17,79]", ["(79-60)+17", "17+79-60", "79-(60-17)", "-(60-17-79)", "79+-60+17", "--79-(--60)+17"]),
        ("*[/4,2,8]", ["8/(4/2)", "8*2/4", "2/4*8", "2/(4/8)", "-8*2/-4", "(8*2)/(4)"]),
        ("-*[+[-5,2],3]", ["(5-2)*3", "3*(5-2)", "-(2-5)*3", "-((2-5)*3)", "(2-5)*-3", "3*-(2-5)"]),
        ("*[+[-5,2],+[-7,3]]", ["(2-5)*(3-7)", "(5-2)*(7-3)"]),
        ("*[+[-5,5],3]", ["(5-5)*3", "-(5-5)*3", "-3*(5-5)"]),
        ("+[-*[2,3],10]", ["10-2*3", "10+2*-3", "-(2*3-10)"]),
        ("*[/+[-8,3],8]", ["8/(3-8)", "-8/(8-3)"]),
        ("5", ["5", "+5", "--5", "05", "((5))"]),
        ("-5", ["-5", "-(5)", "---5"]),
    ],
)
def test_canonical_joins(form, texts):
    assert {canonical(text) for text in texts} == {form}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("2*(3+4)", "2*3+2*4"),  # nothing is multiplied out
        ("7*1", "7/1"),
        ("7+1-1", "7*1*1"),
        ("12/3", "3/12"),
        ("5-2", "2-5"),
        ("2+2", "2*2"),
        ("1+23", "12+3"),
        ("6/2*3", "6/(2*3)"),
        ("(1+2)*3", "1+2*3"),
    ],
)
def test_canonical_keeps_apart(one, other):
    assert canonical(one) != canonical(other)


def form_value(form):
    """Value of a canonical form, read with code of its own; None on a division by zero."""
    sign = -1 if form.startswith("-") else 1
    body = form.removeprefix("-")
    if body.isdigit():
        return Fraction(sign * int(body))
    parts, depth, start = [], 0, 2
    for at, character in enumerate(body):
        depth += (character == "[") - (character == "]")
        if (character == "," and depth == 1) or at == len(body) - 1:
            parts.append(body[start:at])
            start = at + 1
    total = Fraction(body[0] == "*")
    for part in parts:
        value = form_value(part.removeprefix("/"))
        if value is None or (part.startswith("/") and value == 0):
            return None
        if body[0] == "+":
            total += value
        else:
            total = total / value if part.startswith("/") else total * value
    return sign * total


@given(EXPRESSIONS)
def test_canonical_keeps_the_value(text):
    node = parse(text)
    assume(not isinstance(node, Invalid))
    value = evaluate(node)
    assume(value is not None)  # (1/0)*0 and the like: undefined whatever the form
    assert form_value(canonical(node)) == value


def rewritten(node, random):
    """The same solution written in another way: swaps, regrouping and signs moved, at random places."""
    if isinstance(node, Literal):
        return Negated(Negated(node)) if random.random() < 0.1 else node
    if isinstance(node, Negated):
        inner = rewritten(node.operand, random)
        if isinstance(inner, Binary) and random.random() < 0.5:
            if inner.op in "*/":
                return Binary(inner.op, Negated(inner.left), inner.right)
            return Binary("-" if inner.op == "+" else "+", Negated(inner.left), inner.right)
        return Negated(inner)
    a, b, op = rewritten(node.left, random), rewritten(node.right, random), node.op
    choice = random.randrange(4)
    if choice == 0 and op in "+*":
        return Binary(op, b, a)
    if choice == 1 and op in "+-" and isinstance(b, Binary) and b.op in "+-":  # a-(b-c) = (a-b)+c
        return Binary("+" if op == b.op else "-", Binary(op, a, b.left), b.right)
    if choice == 1 and op in "*/" and isinstance(b, Binary) and b.op in "*/":  # a/(b/c) = (a/b)*c
        return Binary("*" if op == b.op else "/", Binary(op, a, b.left), b.right)
    if choice == 2 and op == "-":
        return Negated(Binary("-", b, a))
    if choice == 2 and op in "*/":
        return Binary(op, Negated(a), Negated(b))
    return Binary(op, a, b)


@given(EXPRESSIONS, st.randoms(use_true_random=False))
def test_canonical_ignores_order_grouping_and_place_of_signs(text, random):
    node = parse(text)
    assume(not isinstance(node, Invalid))
    other = node
    for _ in range(4):
        other = rewritten(other, random)
    value = evaluate(node)
    assert value is None or evaluate(other) == value  # the rewriting itself is right
    assert canonical(other) == canonical(node)


def test_render_brackets_all_but_the_outermost():
    assert render(parse("79-60+17")) == "(79-60)+17"
    assert render(parse("79-(60-17)*2")) == "79-((60-17)*2)"
    assert render(parse("7")) == "7"
    with pytest.raises(ValueError, match="signs"):
        render(parse("-7+2"))
