r"""The parser of answers: LaTeX and plain text, by recursive descent, to the trees of `nodes`.

Precedence, low to high: list (, ; and or) · relation (= < \in ..) · \cup \cap \setminus · ratio (:) · + - \pm ·
product, also without a sign (1/2x is (1/2)x) · power · postfix (! %) · atom.  Nothing of the text is ever executed.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from pymathrl.verify import nodes as t
from pymathrl.verify.lexer import Token, TooLarge, Unreadable, tokens
from pymathrl.verify.nodes import Node
from pymathrl.verify.normalize import normalize
from pymathrl.verify.words import (
    BARE_UNITS,
    CHANGING,
    EQUALS,
    INVERSE,
    LEADING,
    NUMBERS,
    PHRASES,
    SCALES,
    SHORT_WORDS,
    unit,
)

MAX_LENGTH = 2000
MAX_DEPTH = 64
MAX_EXPONENT = 9999  # of 1e5 and of x**5

_PLAIN = re.compile(r"[-+]?\d{1,300}")
_DECIMAL = re.compile(r"[-+]?(\d{0,300})\.(\d{1,300})")
_FRACTION = re.compile(
    r"([-+]?)\s*(?:\\[dtc]?frac\s*\{\s*(-?\d{1,99})\s*\}\s*\{\s*(-?\d{1,99})\s*\}|(\d{1,99})/(\d{1,99}))"
)
_TEXT_COMMAND = re.compile(r"\\(?:text|mbox|textrm|textbf|textit|mathrm|textnormal|operatorname|mathbf|mathit)\s*\{")
_PUNCTUATION = re.compile(r"[^\w%$<>=+*/^|-]+")
_CLOCK = re.compile(
    r"(\d{1,2})\s*(?::|\\!\s*:\s*\\!|\\colon)\s*(?:\\!)?(\d{2})(?:\s*(?:\\!)?:(?:\\!)?\s*(\d{2}))?"
    r"(?:[\s~]|\\[,; ])*(?:\\(?:text|mbox|mathrm)\{)?\s*([ap])\.?\s*m\.?\s*\}?",
    re.IGNORECASE,
)
_BASED = re.compile(r"(?=.*\d.*_|[0-9A-F]{2})([0-9A-F]+)_([0-9]{1,2}|[a-z]{3,9})")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_FOR_ALL = re.compile(  # "f(x) = x for all real x", "f(n) = n \text{ for every } n \in \mathbb{N}"
    r"(?:\\(?:text|mbox|textrm)\{\s*)?\bfor\s+(?:all|any|each|every)\b[\s}]*"
    r"(?:(?:real|rational|natural|positive|integers?|numbers?|values|of|the)\b[\s}]*)*"
    r"(?:[a-z](?:\s*,\s*[a-z])*)?\s*(?:\\in\s*\\mathbb\s*\{?[RZNQ]\}?(?:\s*\^\s*\{?\+\}?)?)?\s*$"
)
_MATRICES = ("matrix", "pmatrix", "bmatrix", "Bmatrix", "smallmatrix", "array", "psmallmatrix", "bsmallmatrix")
_CONDITIONS = ("if", "for", "when", "where")
_RELATIONS = frozenset(("=", "<", ">", "<=", ">=", "!=", "~", "in"))
_END = Token("end", "")


def parse(text: str) -> Node | None:
    """The tree of an answer; a `Word` where it is no mathematics, None where it is empty.

    Raises TooLarge where it passes a bound: 2000 characters, 500 tokens, 64 levels.
    """
    return parse_normalized(normalize(text[: MAX_LENGTH + 1]))


@lru_cache(maxsize=2048)
def parse_normalized(text: str) -> Node | None:
    """`parse` of a normalized text. Remembered: a gold answer meets every response of its group."""
    if len(text) > MAX_LENGTH:
        raise TooLarge(f"longer than {MAX_LENGTH} characters")
    if not text:
        return None
    if _PLAIN.fullmatch(text):
        return t.Num(Fraction(int(text)))
    if decimal := _DECIMAL.fullmatch(text):
        return _decimal(text, decimal[1], decimal[2])
    if (fraction := _FRACTION.fullmatch(text)) and (found := _fraction(fraction)):
        return found
    phrase = " ".join(_PUNCTUATION.sub(" ", unwrap_text(text)).lower().split())
    if phrase in PHRASES:
        return t.Named(PHRASES[phrase])
    plain = "".join(unwrap_text(text).split())
    if _DATE.fullmatch(plain):
        return t.Word(plain)
    if clock := _CLOCK.fullmatch(text):
        time = ":".join(str(int(part)) for part in clock.group(1, 2, 3) if part)
        return t.Quantity(t.Word(time), clock[4].lower() + "m")
    if "=" in text and "for" in text:
        text = _FOR_ALL.sub("", text).rstrip(" ,")
    try:
        if based := _BASED.fullmatch(plain):
            return t.Based(based[1], _base(based[2]))
        return _Parser(tokens(text)).answer()
    except Unreadable:
        return t.Word(text)


def unwrap_text(text: str) -> str:
    r"""The text without \text{..} and its like around words, braces and backslashed spaces."""
    return _TEXT_COMMAND.sub(" ", text).replace("{", " ").replace("}", " ").replace("\\ ", " ").replace("~", " ")


def _decimal(text: str, whole: str, fraction: str) -> t.Num:
    return t.Num(Fraction(text), len(fraction), len((whole + fraction).lstrip("0")))


def _fraction(found: re.Match[str]) -> Node | None:
    numerator, denominator = int(found[2] or found[4]), int(found[3] or found[5])
    if denominator == 0:
        return None
    value = Fraction(numerator, denominator)
    return t.Num(-value if found[1] == "-" else value)


class _Parser:
    def __init__(self, found: list[Token]) -> None:
        self.tokens = [*found, _END]
        self.at = 0
        self.depth = 0
        self.bars = 0  # open |: another one closes it

    # --- tokens ---

    @property
    def token(self) -> Token:
        return self.tokens[self.at]

    def ahead(self, n: int = 1) -> Token:
        return self.tokens[min(self.at + n, len(self.tokens) - 1)]

    def has(self, *signs: str) -> bool:
        token = self.tokens[self.at]
        return token.kind == "o" and token.text in signs

    def accept(self, *signs: str) -> str | None:
        if self.has(*signs):
            self.at += 1
            return self.tokens[self.at - 1].text
        return None

    def expect(self, *signs: str) -> str:
        found = self.accept(*signs)
        if found is None:
            raise Unreadable(f"expected {' or '.join(signs)}, got {self.token.text!r}")
        return found

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooLarge(f"more than {MAX_DEPTH} levels")

    # --- lists and relations ---

    def answer(self) -> Node:
        self.accept("=")
        self.skip_leading()
        found = self.infix(self.items())
        if self.token is not _END:
            raise Unreadable(f"not expected here: {self.token.text!r}")
        return found

    def skip_leading(self) -> None:
        """Words before the value: "the answer is 58", "Area = 12"."""
        end, words = 0, ""
        while self.tokens[end].kind in "tw" or (
            self.tokens[end].kind == "l" and self.tokens[end].text in ("a", "A") and self.tokens[end + 1].kind in "tw"
        ):
            words += " " + self.tokens[end].text
            end += 1
        listed = [w.strip(".,:;'\"*") for w in words.lower().split()]
        if not listed or self.tokens[end] is _END:
            return
        if self.tokens[0].text.lower() in SCALES:
            return
        last = listed[-1] in EQUALS or (self.tokens[end].kind == "o" and self.tokens[end].text in ("=", ":", "~"))
        colon = words.rstrip().endswith(":")
        if set(listed) & CHANGING or any(c.isdigit() for c in words):
            raise Unreadable(f"words before the value: {words.strip()}")
        if not (last or colon or set(listed) <= LEADING):
            raise Unreadable(f"words before the value: {words.strip()}")
        if self.tokens[end].kind == "o" and self.tokens[end].text in ("=", ":", "~"):
            end += 1
        self.at = end

    def infix(self, left: Node) -> Node:
        r"""{a \over b} and {n \choose k}."""
        if self.accept("over"):
            return t.Mul((_plain(left), t.Pow(_plain(self.items()), t.MINUS_ONE)))
        if self.accept("choose"):
            return t.Call("binom", (_plain(left), _plain(self.items())))
        return left

    def items(self) -> Node:
        """relation ((, | ; | and | or) relation)*"""
        found, how = [self.relation()], ","
        while sign := self.accept(",", ";", "and", "or"):
            if sign in (",", ";"):
                sign = self.accept("and", "or") or ","
            if self.token is _END or self.has(")", "]", "\\}", "}", ")>"):
                if sign != ",":
                    raise Unreadable("a list that ends in a word")
                break
            how = sign if sign != "," else how
            found.append(self.relation())
        return found[0] if len(found) == 1 else t.Items(tuple(found), how)

    def relation(self) -> Node:
        sides, ops = [], []
        if self.accept("~"):
            sides.append(self.sets())
            return sides[0]
        name = self.function_name()
        sides.append(t.Sym(name) if name else self.sets())
        while True:
            token = self.token
            if token.kind == "o" and token.text in _RELATIONS:
                ops.append(token.text)
                self.at += 1
            elif token.kind == "w" and token.text.lower() in EQUALS:
                ops.append("=")
                self.at += 1
            else:
                break
            self.accept("~")
            sides.append(self.sets())
        return t.Chain(tuple(sides), tuple(ops)) if ops else sides[0]

    def function_name(self) -> str | None:
        """f(x), f(2), f(x, y), f'(x) or f^{-1}(x) before "=": the name of a value, not a product."""
        at = self.at
        if self.token.kind != "l":
            return None
        start = at + 1
        while self.tokens[start].text == "'":
            start += 1
        if [x.text for x in self.tokens[start : start + 5]] == ["^", "{", "-", "1", "}"]:
            start += 5
        if self.tokens[start].text != "(":
            return None
        end = start = start + 1
        while self.tokens[end].kind in "nl" or self.tokens[end].text == ",":
            end += 1
        if end == start or self.tokens[end].text != ")" or self.tokens[min(end + 1, len(self.tokens) - 1)].text != "=":
            return None
        self.at = end + 1
        return "".join(x.text for x in self.tokens[at : end + 1])

    def sets(self) -> Node:
        found = self.ratio()
        while sign := self.accept("cup", "cap", "minus"):
            op = {"cup": "union", "cap": "intersection", "minus": "minus"}[sign]
            found = t.SetOp(op, found, self.ratio())
        return found

    def ratio(self) -> Node:
        start = self.at
        terms = [self.quantity()]
        while self.has(":") and not self.in_builder():
            self.at += 1
            terms.append(self.quantity())
        if len(terms) == 1:
            return terms[0]
        written = self.tokens[start : self.at]
        clock = len(terms) <= 3 and all(x.kind == "n" and len(x.text) == 2 for x in written[2::2]) and (
            written[0].kind == "n" and len(written[0].text) <= 2
        )  # fmt: skip
        return t.Ratio(tuple(terms), clock)

    def in_builder(self) -> bool:
        return self.builders > 0

    builders = 0  # open braces whose first item may be followed by ":"

    def quantity(self) -> Node:
        """sum [unit]; money before it."""
        if self.has("$") or (self.has("+", "-") and self.ahead().text == "$"):
            sign = self.accept("-", "+")
            self.expect("$")
            value = self.sum()
            value = t.negate(value) if sign == "-" else value
            if isinstance(value, t.Quantity):
                raise Unreadable("money with a unit")
            name = self.unit_words()
            if name not in (None, "$"):
                raise Unreadable("money with a unit")
            return t.Quantity(value, "$")
        found = self.sum()
        if isinstance(found, t.Quantity):
            if found.unit == "deg" and (name := self.unit_words()):
                return t.Quantity(found.value, name if name not in ("C", "F") else "deg" + name)
            return found
        name = self.unit_words()
        return found if name is None else t.Quantity(found, name)

    def unit_words(self) -> str | None:
        """The unit that follows: text, known words, an exponent of them, %, $."""
        if self.accept("%"):
            return "%"
        if self.has("$") and self.ahead().kind in ("end", "o"):
            self.at += 1
            return "$"
        start = self.at
        words = ""
        while True:
            token = self.token
            lower = token.text.lower()
            noun = token.kind == "w" and lower not in SCALES and lower not in EQUALS and lower not in _CONDITIONS
            if noun or token.kind == "t" or (token.kind == "f" and lower in ("min", "sec")):
                words += " " + token.text
                self.at += 1
            elif words and token.kind == "o" and token.text == "^":
                self.at += 1
                words += "^" + self.unit_exponent()
            elif words and self.has("/") and (self.ahead().kind in "tw" or self.ahead().text in ("h", "s", "m", "l")):
                self.at += 1
                words += "/" + (self.token.text if self.token.kind not in "tw" else "")
                if self.token.kind not in "tw":
                    self.at += 1
            elif words and token.kind == "l" and token.text == "a" and self.ahead().kind in "tw":
                words += " a"
                self.at += 1
            else:
                break
        if self.at == start:
            return None
        name = unit(words)
        if name is None:
            raise Unreadable(f"no unit: {words.strip()}")
        return name

    def unit_exponent(self) -> str:
        brace = self.accept("{")
        if self.token.kind != "n" or self.token.text not in "123":
            raise Unreadable("an exponent of a unit")
        power = self.token.text
        self.at += 1
        if brace:
            self.expect("}")
        return power

    # --- expressions ---

    def sum(self) -> Node:
        terms = [self.term(self.accept("+", "-", "pm", "mp") or "+")]
        while sign := self.accept("+", "-", "pm", "mp"):
            terms.append(self.term(sign))
        return terms[0] if len(terms) == 1 else _lift_units(t.Add, terms)

    def term(self, sign: str) -> Node:
        while self.has("+", "-"):  # "--3", "+-3"
            inner = self.accept("+", "-")
            if inner == "-" and sign in "+-":
                sign = "-" if sign == "+" else "+"
        found = self.product()
        if sign == "-":
            if isinstance(found, t.Quantity):
                return t.Quantity(t.negate(found.value), found.unit)
            return t.negate(found)
        if sign in ("pm", "mp"):
            return _lift_units(t.Mul, [t.PlusMinus(1 if sign == "pm" else -1), found])
        return found

    def product(self) -> Node:
        factors = [self.power()]
        while True:
            if self.accept("*"):
                negative = self.accept("-", "+") == "-"
                factor = self.power()
                factors.append(t.negate(factor) if negative else factor)
            elif self.accept("/"):
                negative = self.accept("-", "+") == "-"
                factor = self.power()
                factor = t.negate(factor) if negative else factor
                if isinstance(factor, t.Quantity):  # 270/7^\circ
                    factors.append(t.Quantity(t.Pow(factor.value, t.MINUS_ONE), factor.unit))
                else:
                    factors.append(t.Pow(factor, t.MINUS_ONE))
            elif self.token.kind == "w" and self.token.text.lower() in SCALES:
                factors.append(t.Num(Fraction(SCALES[self.token.text.lower()])))
                self.at += 1
            elif self.starts_factor():
                factors += self.next_factor(factors)
            else:
                break
        if len(factors) == 1:
            return factors[0]
        if len(factors) == 2 and isinstance(factors[0], t.Num) and isinstance(factors[1], t.Pow) and (
            factors[1].exponent == t.MINUS_ONE and isinstance(factors[1].base, t.Num) and factors[1].base.value
            and factors[0].places is None and factors[1].base.places is None
        ):  # fmt: skip
            return t.Num(factors[0].value / factors[1].base.value)
        return _lift_units(t.Mul, factors)

    def next_factor(self, factors: list[Node]) -> list[Node]:
        """A factor without a sign before it. A whole number before a proper fraction becomes a mixed number."""
        before = self.tokens[self.at - 1]
        if self.token.kind == "n" and before.kind == "n":
            mixed = len(factors) == 1 and self.token.spaced and self.ahead().text == "/" and self.ahead(2).kind == "n"
            if not (mixed and before.text.isdigit()):
                raise Unreadable("two numbers side by side")
            numerator, denominator = self.token.text, self.ahead(2).text
            if not (numerator.isdigit() and denominator.isdigit() and int(numerator) < int(denominator)):
                raise Unreadable("a mixed number")
            self.at += 3
            factors[0] = t.Num(_whole(before.text) + Fraction(int(numerator), int(denominator)))
            return []
        if self.token.kind == "c" and self.token.text == "frac" and len(factors) == 1 and before.kind == "n":
            part = self.power()
            if isinstance(part, t.Quantity) and isinstance(part.value, t.Num) and 0 < part.value.value < 1 and (
                before.text.isdigit()
            ):  # 22\frac12^\circ
                factors[0] = t.Quantity(t.Num(_whole(before.text) + part.value.value), part.unit)
                return []
            if isinstance(part, t.Num) and 0 < part.value < 1 and before.text.isdigit():
                factors[0] = t.Num(_whole(before.text) + part.value)
                return []
            return [part]
        return [self.power()]

    def starts_factor(self) -> bool:
        token = self.token
        if token.kind in "nlfcb":
            return not (token.kind == "f" and token.text in ("min", "sec") and self.is_time_unit())
        if token.kind != "o":
            return False
        if token.text in ("(", "[", "{", "lfloor", "lceil", "||"):
            return not (token.text == "||" and self.bars)
        return token.text == "|" and not self.bars and not self.builders

    def is_time_unit(self) -> bool:
        return self.tokens[self.at - 1].kind == "n" and self.ahead().kind in ("end", "o") and self.ahead().text != "("

    def power(self) -> Node:
        base = self.postfix(self.atom())
        while self.has("^", "**"):
            if self.accept("**"):
                exponent = self.python_exponent()
            else:
                self.at += 1
                braced = self.has("{") and self.ahead(2).text == "}"
                mark = self.ahead() if braced else self.token
                if mark.kind == "o" and mark.text in ("circ", "'"):
                    self.at += 3 if braced else 1
                    base = t.Quantity(base, "deg") if mark.text == "circ" else self.primed(base)
                    continue
                exponent = self.exponent()
            base = self.postfix(t.Pow(_plain(base), exponent))
        return base

    def primed(self, base: Node) -> Node:
        if not isinstance(base, t.Sym):
            raise Unreadable("a prime")
        return t.Sym(base.name + "'")

    def python_exponent(self) -> Node:
        sign = -1 if self.accept("-") else 1
        paren = self.accept("(")
        if paren and self.accept("-"):
            sign = -sign
        if self.token.kind != "n" or not self.token.text.isdigit() or int(self.token.text[:6]) > MAX_EXPONENT:
            raise Unreadable("** takes a whole number")
        value = Fraction(sign * int(self.token.text))
        self.at += 1
        if paren and self.accept("/"):
            if self.token.kind != "n" or not self.token.text.isdigit() or int(self.token.text) == 0:
                raise Unreadable("** takes a number")
            value /= int(self.token.text)
            self.at += 1
        if paren:
            self.expect(")")
        return t.Num(value)

    def exponent(self) -> Node:
        if self.accept("+"):
            return self.exponent()
        if self.accept("-"):
            return t.negate(self.exponent())
        return _plain(self.atom())

    def postfix(self, base: Node) -> Node:
        while True:
            if self.accept("!"):
                base = t.Call("factorial2" if self.accept("!") else "factorial", (_plain(base),))
            elif self.has("'") and isinstance(base, t.Sym):
                self.at += 1
                base = self.primed(base)
            elif self.has("_"):
                self.at += 1
                base = self.subscripted(base)
            elif self.has("circ") and self.ahead().kind not in "nlfc":
                self.at += 1
                base = t.Quantity(base, "deg")
            elif self.has("%") and self.ahead().kind == "o" and self.ahead().text in ("*", ")", "]"):
                self.at += 1
                base = t.Quantity(base, "%")
            else:
                return base

    def subscripted(self, base: Node) -> Node:
        begin = self.at
        if self.accept("{"):
            depth = 1
            while depth:
                if self.token is _END:
                    raise Unreadable("an open brace")
                depth += self.has("{") - self.has("}")
                self.at += 1
            text = "".join(x.text for x in self.tokens[begin + 1 : self.at - 1])
        else:
            text = self.token.text
            if self.token.kind not in "nlt":
                raise Unreadable("a subscript")
            if self.token.kind == "n" and isinstance(base, t.Sym) and len(text) > 1 and not self.token.spaced:
                self.split_number()
                text = self.token.text
            self.at += 1
        text = text.strip(" ()")
        if isinstance(base, t.Num):
            written = self.tokens[begin - 2]  # with its leading zeros
            return t.Based(written.text if written.kind == "n" else str(base.value), _base(text))
        if isinstance(base, t.Word):
            return t.Based(base.text, _base(text))
        if isinstance(base, t.Sym):
            return t.Sym(f"{base.name}_{text}")
        if isinstance(base, t.Pow) and isinstance(base.base, t.Sym):  # x^2_1
            return t.Pow(t.Sym(f"{base.base.name}_{text}"), base.exponent)
        if isinstance(base, t.Mul) and all(isinstance(x, t.Sym) and len(x.name) == 1 for x in base.factors):
            return t.Based("".join(x.name for x in base.factors if isinstance(x, t.Sym)), text)
        raise Unreadable("a subscript")

    def split_number(self) -> None:
        r"""TeX takes one digit where no braces stand: \frac12 is 1/2."""
        token = self.token
        if token.kind == "n" and len(token.text) > 1 and token.text.isdigit():
            self.tokens[self.at : self.at + 1] = [token._replace(text=token.text[0]), Token("n", token.text[1:])]

    # --- atoms ---

    def atom(self) -> Node:
        token = self.token
        if token.kind == "n":
            self.at += 1
            return _number(token.text)
        if token.kind == "l":
            self.at += 1
            return self.symbol(token.text)
        if token.kind == "f":
            self.at += 1
            return self.function(token.text)
        if token.kind == "c":
            self.at += 1
            return self.command(token.text)
        if token.kind == "b":
            self.at += 1
            return self.environment(token.text)
        if token.kind == "t":
            if self.ahead().text == "_" and re.fullmatch(r"[0-9A-Fa-f]+", token.text.strip()):
                self.at += 1
                return t.Word(token.text.strip())
            raise Unreadable(f"text: {token.text.strip()}")
        if token.kind == "w":
            return self.plain_word(token)
        if token.kind != "o":
            raise Unreadable("the answer ends early")
        self.at += 1
        match token.text:
            case "(" | "[" | "<(":
                return self.bracketed(token.text)
            case "{":
                return self.braced()
            case "\\{":
                return self.set()
            case "|":
                return self.absolute("|")
            case "||":
                return t.Call("norm", (self.absolute("||").args[0],))
            case "lfloor" | "lceil":
                return self.rounded(token.text[1:])
            case "dots":
                return t.Literal("dots")
        raise Unreadable(f"not expected here: {token.text!r}")

    def plain_word(self, token: Token) -> Node:
        word = token.text
        if self.ahead().text == "_" and re.fullmatch(r"[0-9A-F]+", word):
            self.at += 1
            return t.Word(word)
        short = len(word) <= 3 and word.isalpha() and word.lower() not in SHORT_WORDS
        if short and (word.lower() in BARE_UNITS) and not (self.at and self.tokens[self.at - 1].kind == "n"):
            self.at += 1  # "km" with no number before it
            return t.Mul(tuple(t.Sym(c) for c in word))
        raise Unreadable(f"the word {word!r}")

    def symbol(self, name: str) -> Node:
        if name.startswith("set:"):
            return t.Named(name[4:])
        if name == "emptyset":
            return t.Named("0")
        return t.Sym(name)

    def bracketed(self, left: str) -> Node:
        """( .. ), [ .. ] or <..>: an expression, a tuple, an interval; also half open."""
        self.deeper()
        bars, self.bars = self.bars, 0
        builders, self.builders = self.builders, 0
        right = {"(": (")", "]"), "[": ("]", ")"), "<(": (")>", ">")}[left]
        if self.accept(*right):
            raise Unreadable("empty brackets")
        inner = self.items()
        close = self.expect(*right)
        self.bars, self.builders = bars, builders
        self.depth -= 1
        if left == "<(":
            left, close = "(", ")"
        if isinstance(inner, t.Items):
            if inner.how != ",":
                raise Unreadable("words in brackets")
            return t.Group(inner.items, left, close)
        if (left, close) not in (("(", ")"), ("[", "]")):
            raise Unreadable("brackets that do not match")
        return inner

    def braced(self) -> Node:
        self.deeper()
        bars, self.bars = self.bars, 0
        inner = self.infix(self.items())
        self.expect("}")
        self.bars = bars
        self.depth -= 1
        return inner

    def set(self) -> Node:
        r"""\{ .. \}: items, or x such that."""
        self.deeper()
        bars, self.bars = self.bars, 0
        self.builders += 1
        if self.accept("\\}"):
            self.builders -= 1
            self.bars, self.depth = bars, self.depth - 1
            return t.Named("0")
        first = self.items()
        if self.accept("|", "mid", ":"):
            condition = self.items()
            self.expect("\\}")
            found = _such_that(first, condition)
        else:
            self.expect("\\}")
            found = t.Braces(first.items if isinstance(first, t.Items) else (first,))
        self.builders -= 1
        self.bars, self.depth = bars, self.depth - 1
        return found

    def absolute(self, bar: str) -> t.Call:
        self.deeper()
        self.bars += 1
        inner = self.sum()
        self.bars -= 1
        if bar == "|" and self.has("||"):  # |a||b|
            self.tokens[self.at : self.at + 1] = [Token("o", "|"), Token("o", "|")]
        self.expect(bar)
        self.depth -= 1
        return t.Call("abs", (_plain(inner),))

    def rounded(self, which: str) -> Node:
        self.deeper()
        inner = self.sum()
        self.expect("r" + which)
        self.depth -= 1
        return t.Call(which, (_plain(inner),))

    def argument(self) -> Node:
        r"""What braces hold, or the next token; of a number without braces its first digit (TeX)."""
        if self.accept("{"):
            return _plain(self.braced())
        negative = self.accept("-") is not None
        self.split_number()
        found = _plain(self.atom())
        return t.negate(found) if negative else found

    def command(self, name: str) -> Node:
        if name == "frac":
            self.deeper()
            numerator = self.argument()
            denominator = self.argument()
            self.depth -= 1
            if _is_differential(denominator):
                raise Unreadable("a derivative")
            if isinstance(numerator, t.Num) and isinstance(denominator, t.Num) and denominator.value and (
                numerator.places is None and denominator.places is None
            ):  # fmt: skip
                return t.Num(numerator.value / denominator.value)
            return t.Mul((numerator, t.Pow(denominator, t.MINUS_ONE)))
        if name == "sqrt":
            self.deeper()
            degree = 2
            if self.has("[") and (self.ahead().kind != "n" or self.ahead(2).text != "]"):
                self.at += 1
                index = self.sum()
                self.expect("]")
                self.depth -= 1
                return t.Pow(self.argument(), t.Pow(_plain(index), t.MINUS_ONE))
            if self.has("[") and self.tokens[self.at + 1].kind == "n" and self.ahead(2).text == "]":
                degree = int(self.ahead().text) if self.ahead().text.isdigit() else 0
                self.at += 3
                if not 2 <= degree <= 1000:
                    raise Unreadable("the degree of a root")
            found = _plain(self.braced()) if self.accept("{") else _plain(self.postfix(self.atom()))
            self.depth -= 1
            return t.Root(found, degree)
        if name == "binom":
            return t.Call("binom", (self.argument(), self.argument()))
        if name == "mathbb":
            brace = self.accept("{")
            letter = self.token.text
            self.at += 1
            if brace:
                self.expect("}")
            if letter not in "RZNQC":
                raise Unreadable(r"\mathbb")
            if self.has("^") and self.ahead().text in ("+", "*", "-"):
                self.at += 1
                letter += self.token.text
                self.at += 1
            return t.Named(letter)
        return self.series(name)

    def series(self, name: str) -> Node:
        r"""\sum_{k=a}^{b} body and \prod."""
        self.deeper()
        self.expect("_")
        self.expect("{")
        start = self.relation()
        self.expect("}")
        self.expect("^")
        end = _plain(self.argument() if self.has("{") else self.atom())
        body = _plain(self.product())
        self.depth -= 1
        if not (isinstance(start, t.Chain) and start.ops == ("=",) and isinstance(start.sides[0], t.Sym)):
            raise Unreadable("the range of a sum")
        return t.Call(name, (body, start.sides[0], _plain(start.sides[1]), end))

    def function(self, name: str) -> Node:
        self.deeper()
        power: Node | None = None
        base: Node | None = None
        while self.has("^", "_"):
            if self.accept("_"):
                if name != "log":
                    raise Unreadable(f"a subscript of {name}")
                base = self.argument() if self.has("{") or self.token.kind != "n" else _plain(self.atom())
            else:
                self.at += 1
                power = _plain(self.atom() if not self.has("-", "+") else self.sum())
        if isinstance(power, t.Num) and power.value == -1:
            if name not in INVERSE:
                raise Unreadable(f"the inverse of {name}")
            name, power = INVERSE[name], None
        args = self.function_arguments(name)
        if name == "cbrt":
            self.depth -= 1
            return t.Root(args[0], 3) if power is None else t.Pow(t.Root(args[0], 3), power)
        if name == "log" and base is not None:
            args = (args[0], base)
        elif name == "log10":
            name, args = "log", (args[0], t.Num(Fraction(10)))
        elif name in ("ln", "log") and len(args) == 1:
            name = "ln"
        self.depth -= 1
        found: Node = t.Call(name, args)
        return found if power is None else t.Pow(found, power)

    def function_arguments(self, name: str) -> tuple[Node, ...]:
        if self.has("(") or (self.has("[") and name in ("ln", "sin", "cos", "tan")):
            self.at += 1
            inner = self.bracketed(self.tokens[self.at - 1].text)
            if isinstance(inner, t.Group):
                if name not in ("max", "min", "gcd", "lcm", "binom", "log"):
                    raise Unreadable(f"arguments of {name}")
                return tuple(_plain(x) for x in inner.items)
            return (_angle(inner, name),)
        if self.accept("{"):
            inner = self.braced()
            if self.has("^") and name in INVERSE:
                return (_angle(self.raised(inner), name),)
            return (_angle(inner, name),)
        negative = self.accept("-") is not None
        factors = [self.power()]
        while True:
            if self.token.kind in "nlc" or (self.has("{") and factors):
                factors.append(self.power())
            elif self.has("/") and self.ahead().kind in "n" and self.ahead(2).text not in ("(",) and (
                all(isinstance(f, (t.Num, t.Sym)) for f in factors)
            ):  # \sin \pi/6
                self.at += 1
                factors.append(t.Pow(self.power(), t.MINUS_ONE))
            else:
                break
        inner = factors[0] if len(factors) == 1 else _lift_units(t.Mul, factors)
        if negative:
            inner = _lift_units(t.Mul, [t.MINUS_ONE, inner])
        return (_angle(inner, name),)

    def raised(self, base: Node) -> Node:
        self.expect("^")
        return t.Pow(_plain(base), self.exponent())

    def environment(self, name: str) -> Node:
        self.deeper()
        bars, self.bars = self.bars, 0
        rows: list[list[Node]] = [[]]
        while True:
            if self.token.kind == "e":
                self.at += 1
                break
            if self.accept("row"):
                rows.append([])
            elif self.accept("&"):
                if not rows[-1]:
                    raise Unreadable("an empty cell")
            elif self.token is _END:
                raise Unreadable(f"\\begin{{{name}}} without its end")
            else:
                rows[-1].append(self.items())
        self.bars = bars
        self.depth -= 1
        rows = [row for row in rows if row]
        if not rows or len({len(row) for row in rows}) != 1:
            raise Unreadable("rows of different length")
        if name in ("cases", "aligned", "align", "gathered", "split", "rcases"):
            if len(rows[0]) != 1:
                raise Unreadable("cases")
            found = tuple(row[0] for row in rows)
            return t.Items(found) if len(found) > 1 else found[0]
        matrix = t.Matrix(tuple(tuple(row) for row in rows))
        if name == "vmatrix":
            return t.Call("det", (matrix,))
        if name not in _MATRICES:
            raise Unreadable(f"\\begin{{{name}}}")
        return matrix


def _is_differential(node: Node) -> bool:
    """dx, below a fraction bar."""
    return isinstance(node, t.Mul) and len(node.factors) == 2 and node.factors[0] == t.Sym("d")


def _base(text: str) -> str:
    base = str(NUMBERS.get(text.lower(), text))
    if not (base.isdigit() and not base.startswith("0") and 2 <= int(base) <= 62):
        raise Unreadable("a base")
    return base


def _such_that(first: Node, condition: Node) -> Node:
    if isinstance(first, t.Sym) and first.name in t.symbols(condition):
        return condition
    if isinstance(first, t.Chain) and first.ops == ("in",) and first.sides[1] == t.Named("R"):
        return condition
    raise Unreadable("a set by a condition")


def _whole(text: str) -> Fraction:
    return Fraction(int(text))


def _number(text: str) -> Node:
    if "(" in text:  # repeating: 0.1(6)
        head, _, block = text[:-1].partition("(")
        whole, _, fixed = head.partition(".")
        n = len(fixed)
        value = Fraction(int(whole + fixed), 10**n) + Fraction(int(block), 10**n * (10 ** len(block) - 1))
        return t.Num(value)
    mantissa, _, exponent = text.lower().partition("e")
    if len(mantissa) > 1000 or len(exponent) > 5 or (exponent and abs(int(exponent)) > MAX_EXPONENT):
        raise TooLarge("a number too long")
    whole, _, fraction = mantissa.partition(".")
    value = Fraction(mantissa)
    if exponent:
        return t.Num(value * Fraction(10) ** int(exponent))
    if not fraction:
        return t.Num(value)
    return t.Num(value, len(fraction), len((whole + fraction).lstrip("0")))


def _plain(node: Node) -> Node:
    """A node inside an expression: without a unit or a list there."""
    if isinstance(node, t.Quantity) and node.unit == "deg":
        raise Unreadable("degrees in an expression")
    if isinstance(node, t.STRUCTURES):
        raise Unreadable("a list or a unit in an expression")
    return node


def _angle(node: Node, name: str) -> Node:
    """The argument of a function: degrees of an angle are converted there."""
    if isinstance(node, t.Quantity) and node.unit == "deg" and name in INVERSE:
        return t.Mul((node.value, t.PI, t.Num(Fraction(1, 180))))
    return _plain(node)


def _lift_units(build: type[t.Add] | type[t.Mul], parts: list[Node]) -> Node:
    """A sum or product of parts, of which some may have a unit: a sum of one unit, a product with one unit."""
    units = [x.unit for x in parts if isinstance(x, t.Quantity)]
    if units:
        if len(set(units)) > 1 or (build is t.Mul and len(units) > 1):
            raise Unreadable("units in an expression")
        values = [x.value if isinstance(x, t.Quantity) else x for x in parts]
        return t.Quantity(_lift_units(build, values), units[0])
    matrices = [x for x in parts if isinstance(x, t.Matrix)]
    if build is t.Mul and len(matrices) == 1:
        scale = [_plain(x) for x in parts if not isinstance(x, t.Matrix)]
        return t.Matrix(tuple(tuple(t.Mul((*scale, _plain(x))) for x in row) for row in matrices[0].rows))
    for x in parts:
        _plain(x)
    return build(tuple(parts))


__all__ = ["MAX_DEPTH", "MAX_LENGTH", "TooLarge", "Unreadable", "parse", "parse_normalized", "unwrap_text"]
