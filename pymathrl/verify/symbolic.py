"""The last resort: SymPy on objects built by constructors, never from text. Runs in a worker that can be killed."""

from __future__ import annotations

from typing import Any

from pymathrl.verify import nodes as t
from pymathrl.verify.nodes import Node

MAX_NODES = 200


def proves_equal(a: Node, b: Node) -> bool:
    """Whether SymPy finds a - b to be zero; False where it cannot tell. May take any time and memory."""
    if len(t.walk(a)) + len(t.walk(b)) > MAX_NODES:
        return False
    import sympy
    from sympy.functions.elementary.hyperbolic import HyperbolicFunction

    try:
        difference = _build(a) - _build(b)
    except _NoSymbolicForm:
        return False
    attempts = (
        sympy.expand,
        lambda d: sympy.expand(sympy.expand_trig(d)),
        lambda d: sympy.expand(d.rewrite(sympy.exp)) if d.has(HyperbolicFunction)
        else d,
        lambda d: sympy.factor(d, deep=True),  # \sqrt{x^2-6x+9} is |x-3|
        sympy.trigsimp,
        sympy.radsimp,
        sympy.simplify,
        lambda d: sympy.simplify(sympy.expand_log(d, force=True)),
    )  # fmt: skip
    for attempt in attempts:
        try:
            if attempt(difference) == 0:
                return True
        except (ValueError, TypeError, NotImplementedError, AttributeError, RecursionError):
            continue  # SymPy's simplifiers raise these on forms that they were not written for; another may do
    return False


class _NoSymbolicForm(Exception):
    """No SymPy object stands for this node."""


def _build(node: Node) -> Any:
    import sympy as s

    match node:
        case t.Num(v):
            return s.Rational(v.numerator, v.denominator)
        case t.Sym("pi"):
            return s.pi
        case t.Sym("e"):
            return s.E
        case t.Sym("i"):
            return s.I
        case t.Sym("oo"):
            raise _NoSymbolicForm
        case t.Sym(name):
            return s.Symbol(name, real=True)
        case t.Add(x):
            return s.Add(*(_build(a) for a in x))
        case t.Mul(x):
            return s.Mul(*(_build(a) for a in x))
        case t.Pow(base, exponent):
            return s.Pow(_build(base), _build(exponent))
        case t.Root(arg, n):
            return s.real_root(_build(arg), n) if n % 2 and not t.symbols(arg) else s.root(_build(arg), n)
        case t.Call(name, args):
            return _function(name, [_build(a) for a in args if not isinstance(a, t.Matrix)])
    raise _NoSymbolicForm


def _function(name: str, x: list[Any]) -> Any:
    import sympy as s

    known = {
        "sin": s.sin, "cos": s.cos, "tan": s.tan, "cot": s.cot, "sec": s.sec, "csc": s.csc, "sinh": s.sinh,
        "cosh": s.cosh, "tanh": s.tanh, "coth": s.coth, "sech": s.sech, "csch": s.csch, "arcsin": s.asin,
        "arccos": s.acos, "arctan": s.atan, "arccot": s.acot, "arcsec": s.asec, "arccsc": s.acsc, "arcsinh": s.asinh,
        "arccosh": s.acosh, "arctanh": s.atanh, "exp": s.exp, "ln": s.log, "log": s.log, "abs": s.Abs,
        "floor": s.floor, "ceil": s.ceiling, "factorial": s.factorial, "factorial2": s.factorial2,
        "binom": s.binomial, "max": s.Max, "min": s.Min, "gcd": s.gcd, "lcm": s.lcm, "sgn": s.sign, "re": s.re,
        "im": s.im, "arg": s.arg,
    }  # fmt: skip
    if name not in known or not x:
        raise _NoSymbolicForm
    return known[name](*x)
