"""The tokens of an answer in normalized LaTeX or plain text. One pass, linear."""

from __future__ import annotations

import re
from typing import NamedTuple

from pymathrl.verify.normalize import closing_brace
from pymathrl.verify.words import (
    AND,
    BARE_UNITS,
    EQUALS,
    FUNCTIONS,
    GREEK,
    NUMBERS,
    OR,
    SCALES,
    SHORT_WORDS,
)

MAX_TOKENS = 500


class Unreadable(Exception):
    """The text is no mathematics that we know: it is compared as text."""


class TooLarge(Exception):
    """The answer passes a bound of the verifier; it equals nothing."""


class Token(NamedTuple):
    """kind: n number, l letter or symbol, f function, o operator or bracket, t text, w plain word, b and e begin and
    end of an environment, c another command that the parser knows. spaced: white space stands before it."""

    kind: str
    text: str
    spaced: bool = False


_SPACE = re.compile(r"(?:\s|~|\\[,;:!> ]|\\(?:quad|qquad|enspace|thinspace|medspace|,)(?![A-Za-z]))+")
_GROUPED = re.compile(r"\d{1,3}(?:(?:,\\!|\{,\}|\{,\\!\}|\\,|\\ |\\;|\\:|~|,| )\d{3})+(?!\d)(?!\s*/)(?:\.\d+)?")
_PROTECTED = re.compile(r"\d{1,3}(?:(?:,\\!|\{,\}|\{,\\!\})\d{3})+(?!\d)(?:\.\d+)?")
_SEPARATOR = re.compile(r",\\!|\{,\}|\{,\\!\}|\\[,;: ]|~|,| ")
_REPEATING = re.compile(
    r"(\d*)\.(\d*)\s*\\(?:overline|bar|dot|overbar)\s*(?:\{(\d+)\}|(\d))"
    r"|(\d+)\.()\((\d+)\)"  # 0.(3)
)
_AFTER_POINT = re.compile(r"\d|\\(?:overline|bar|dot|overbar)\s*(?:\{\d+\}|\d)")
_NUMBER = re.compile(r"(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?|\d+")
_ORDINAL = re.compile(r"(?:\^\s*\{?\s*(?:\\(?:text|mathrm|textrm)\s*\{)?\s*)?(?:st|nd|rd|th)\b\s*\}{0,2}")
_COMMAND = re.compile(r"\\([A-Za-z]+)\*?|\\(.)", re.DOTALL)
_WORD = re.compile(r"[A-Za-z]+(?:-[A-Za-z]{2,}|'[a-z]\b)*")
_NUMBERS_IN_TEXT = re.compile(  # "12 hours", "3 or 4", "A, B"
    r"[-+]?\d[\d.,]*\s+[A-Za-z][A-Za-z ]*"
    r"|[-+]?[\d./]+(?:\s*(?:,|,?\s+and|,?\s+or)\s+[-+]?[\d./]+)+|[A-Z](?:\s*,\s*[A-Z])+"
)
_ALSO_PRODUCTS = frozenset(("hr", "mi", "in", "lb", "ha", "yr", "ml", "mg", "amp", "rad", "deg", "oz"))  # \pi hr^2
_ROW_DISTANCE = re.compile(r"\s*\[-?[\d.]+\s*[a-z]{2}\]")
_SHORT_NOUN = re.compile("[^aeiou][aeiou][^aeiou]")
_LETTERS = re.compile(r"[A-Za-z]+")
_TEXT = frozenset(("text", "mbox", "textrm", "textnormal", "textsf", "texttt", "hbox", "textup", "textbf", "textit"))
_FONT = frozenset(
    ("mathrm", "mathbf", "mathit", "mathsf", "mathcal", "boldsymbol", "bm", "operatorname", "mathfrak", "rm", "bf",
     "it")
)  # fmt: skip
_CONCLUSIONS = ("therefore", "implies", "Rightarrow", "Longrightarrow")
_IGNORED = frozenset(
    ("boxed", "fbox", "vec", "hat", "tilde", "widehat", "widetilde", "underline", "mathop", "ensuremath",
     "overrightarrow", "overleftrightarrow", "textcolor", "cancel", "overset", "underset", "nonumber", "strut",
     "smash", "mathstrut", "overline", "bar", "dot", "ddot", "hline", "overbar", "displaylimits")
)  # fmt: skip
_OPERATORS = {
    "cdotp": "*",
    "cdot": "*", "times": "*", "ast": "*", "star": "*", "div": "/", "pm": "pm", "mp": "mp", "le": "<=", "leq": "<=",
    "leqslant": "<=", "ge": ">=", "geq": ">=", "geqslant": ">=", "lt": "<", "gt": ">", "ne": "!=", "neq": "!=",
    "approx": "~", "simeq": "~", "doteq": "~", "equiv": "equiv", "in": "in", "cup": "cup", "bigcup": "cup",
    "cap": "cap", "bigcap": "cap", "setminus": "minus", "backslash": "minus", "smallsetminus": "minus", "lbrace": "{",
    "rbrace": "}", "lbrack": "[", "rbrack": "]", "langle": "<(", "rangle": ")>", "lvert": "|", "rvert": "|",
    "vert": "|", "mid": "mid", "colon": ":", "lfloor": "lfloor", "rfloor": "rfloor", "lceil": "lceil",
    "rceil": "rceil", "land": "and", "wedge": "and", "lor": "or", "vee": "or", "circ": "circ", "degree": "circ",
    "lVert": "||", "rVert": "||", "Vert": "||", "parallel": "||", "surd": "surd", "prime": "'",
    "to": "to", "mod": "mod", "over": "over",
    "pmod": "mod", "bmod": "mod", "slash": "/", "choose": "choose",
}  # fmt: skip
_COMMANDS = frozenset(
    ("frac", "dfrac", "tfrac", "cfrac", "sqrt", "binom", "dbinom", "tbinom", "sum", "prod", "mathbb")
)  # fmt: skip
_DOTS = frozenset(("ldots", "dots", "cdots", "dotsc", "dotsb", "vdots", "ddots"))
_EMPTY = frozenset(("emptyset", "varnothing"))


def tokens(text: str) -> list[Token]:
    """Splits a normalized text. Raises Unreadable, or TooLarge past `MAX_TOKENS`."""
    return _Lexer(text).run()


class _Lexer:
    def __init__(self, text: str) -> None:
        self.text = text
        self.found: list[Token] = []
        self.depth = 0  # of brackets: inside them a comma separates
        self.grouped = [False]  # of each bracket: tight commas are thousands marks
        self.spaced = False
        self.listed = bool(re.search(r"\d,(?=\d)(?!\d{3}(?!\d))", text))  # "27,54,108": "," separates
        # "(1,000, 2,000)": where ", " separates, "," does not
        self.thousands = bool(
            re.search(r"\d,\d{3}(?!\d)", text) and re.search(r", ", text) and not re.search(r",(?! |\d{3}(?!\d))", text)
        )

    def run(self) -> list[Token]:
        text, i, n = self.text, 0, len(self.text)
        while i < n:
            space = _SPACE.match(text, i)
            if space:
                i, self.spaced = space.end(), True
                continue
            c = text[i]
            if c.isdigit() or (c == "." and _AFTER_POINT.match(text, i + 1)):
                i = self.number(i)
            elif c == "\\":
                i = self.command(i)
            elif c.isalpha():
                i = self.word(i)
            else:
                i = self.sign(i)
            if len(self.found) > MAX_TOKENS:
                raise TooLarge(f"more than {MAX_TOKENS} tokens")
        return self.found

    def add(self, kind: str, text: str) -> None:
        self.found.append(Token(kind, text, self.spaced))
        self.spaced = False

    def number(self, i: int) -> int:
        text = self.text
        if not text[i].isascii():
            raise Unreadable(f"digit {text[i]!r}")
        repeating = _REPEATING.match(text, i)
        if repeating:
            whole, fixed, block = (x for x in repeating.groups() if x is not None)
            self.add("n", f"{whole or 0}.{fixed}({block})")
            return repeating.end()
        grouped = (_PROTECTED if self.listed or (self.depth and not self.grouped[-1]) else _GROUPED).match(text, i)
        if grouped and self.fits(grouped):
            self.add("n", _SEPARATOR.sub("", grouped[0]))
            return self.ordinal(grouped.end())
        number = _NUMBER.match(text, i)
        assert number is not None  # i is at a digit, or a point before one
        end = number.end()
        if number[0][-1].isdigit() and "e" in number[0].lower() and text[end : end + 1].isalpha():
            number = re.compile(r"\d+(?:\.\d+)?|\.\d+").match(text, i)
            assert number is not None
            end = number.end()
        if re.match(r"\.(?:\.|\\[lc]?dots)|\s*\\[lc]?dots", text[end:]) and "." in number[0]:
            raise Unreadable("a decimal that goes on")
        if text.startswith(".", end) and not text.startswith("..", end) and not text[end + 1 : end + 2].isdigit():
            end += 1  # "17."
        self.add("n", number[0])
        return self.ordinal(end)

    def fits(self, grouped: re.Match[str]) -> bool:
        """One kind of mark throughout: "1,234 567" is no number. "2 100 300" is, "1, 234" is not matched."""
        marks = {m[0] for m in _SEPARATOR.finditer(grouped[0])}
        return len(marks) == 1

    def ordinal(self, i: int) -> int:
        found = _ORDINAL.match(self.text, i)
        if found and (found[0][0] != "^" or "text" in found[0] or "{" in found[0] or "mathrm" in found[0]):
            return found.end()
        return i

    def word(self, i: int) -> int:
        match = _WORD.match(self.text, i)
        if match is None:
            self.add("l", self.text[i])  # a letter of another script
            return i + 1
        run = match[0]
        lower = run.lower()
        if lower in NUMBERS and len(run) > 2:
            self.add("n", str(NUMBERS[lower]))
            return match.end()
        if "-" in run or "'" in run:
            match = _LETTERS.match(self.text, i)
            assert match is not None
            run, lower = match[0], match[0].lower()
        end = match.end()
        if lower in AND:
            self.add("o", "and")
        elif lower in OR:
            self.add("o", "or")
        elif lower in ("negative", "minus"):
            self.add("o", "-")
        elif lower in ("union", "intersect"):
            self.add("o", "cup" if lower == "union" else "cap")
        elif run in ("pi", "Pi", "PI"):
            self.add("l", "pi")
        elif lower in ("infinity", "infty", "inf", "oo"):
            self.add("l", "oo")
        elif len(run) > 1 and self.spaced and self.found and self.found[-1].kind in "wt" and lower not in NUMBERS:
            self.add("w", run)  # "years old"
        elif run == "sqrt":
            self.add("c", "sqrt")
        elif run in FUNCTIONS and not (run in ("min", "sec") and self.follows_number()):
            self.add("f", FUNCTIONS[run])
        elif run in GREEK or len(run) == 1:
            self.add("l", run)
        elif lower in SCALES or lower in EQUALS or lower in SHORT_WORDS or (
            lower in BARE_UNITS and (self.follows_number() or lower not in _ALSO_PRODUCTS)
        ):  # fmt: skip
            self.add("w", run)
        elif split := re.fullmatch(r"(sin|cos|tan|ln|log|sqrt|exp)([a-z]{1,2})", run):
            self.add("c" if split[1] == "sqrt" else "f", split[1])
            for letter in split[2]:
                self.add("l", letter)
        elif tail := re.fullmatch(r"([a-zA-Z]{1,2})(pi|sqrt)", run):
            for letter in tail[1]:
                self.add("l", letter)
            self.add("l" if tail[2] == "pi" else "c", tail[2])
        elif self.follows_number() and self.spaced and _SHORT_NOUN.fullmatch(lower):
            self.add("w", run)  # "3 men"
        elif len(run) <= 3 or (len(run) == 4 and list(run) == sorted(set(run)) and not set(lower) & set("eiou")):
            for letter in run:  # a product: ab, xyz, abcd
                self.add("l", letter)
        else:
            self.add("w", run)
        return end

    def follows_number(self) -> bool:
        return bool(self.found) and self.found[-1].kind == "n"

    def command(self, i: int) -> int:
        text = self.text
        match = _COMMAND.match(text, i)
        if match is None:
            raise Unreadable("a backslash at the end")
        name, end = match[1], match.end()
        if name is None:
            sign = match[2]
            if sign in "{}":
                self.bracket("{" if sign == "{" else "}", escaped=True)
            elif sign == "%":
                self.add("o", "%")
            elif sign == "$":
                self.add("o", "$")
            elif sign == "|":
                self.add("o", "||")
            elif sign == "\\":
                self.add("o", "row")
                distance = _ROW_DISTANCE.match(text, end)
                end = distance.end() if distance else end
            elif sign in "&#_":
                self.add("w", sign)
            else:
                raise Unreadable(f"\\{sign}")
            return end
        if name in ("begin", "end"):
            brace = re.compile(r"\s*\{([a-zA-Z]+)\*?\}").match(text, end)
            if brace is None:
                raise Unreadable(f"\\{name}")
            end = brace.end()
            if name == "begin" and brace[1] == "array":
                columns = re.compile(r"\s*(?:\[[^\]]*\])?\s*\{[^{}]*\}").match(text, end)
                end = columns.end() if columns else end
            self.add("b" if name == "begin" else "e", brace[1])
            return end
        if name in _TEXT or name in _FONT:
            return self.inner_text(name, end)
        if name in _OPERATORS:
            operator = _OPERATORS[name]
            if operator == "surd":
                self.add("c", "sqrt")
                return end
            if operator in "[]{}":
                self.bracket(operator, escaped=True)
            elif operator in ("<(", ")>"):
                self.depth += 1 if operator == "<(" else -1
                self.grouped.append(False) if operator == "<(" else None
                self.add("o", operator)
            else:
                self.add("o", operator)
        elif name == "not":
            return self.negated(end)
        elif name in _COMMANDS:
            self.add("c", {"dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom",
                           "tbinom": "binom"}.get(name, name))  # fmt: skip
        elif name in FUNCTIONS:
            self.add("f", FUNCTIONS[name])
        elif name == "pi":
            self.add("l", "pi")
        elif name == "infty":
            self.add("l", "oo")
        elif name in GREEK:
            self.add("l", {"varepsilon": "epsilon", "varphi": "phi", "vartheta": "theta"}.get(name, name))
        elif name in _DOTS:
            self.add("o", "dots")
        elif name in _EMPTY:
            self.add("l", "emptyset")
        elif name in ("R", "Z", "N", "Q", "C") or name in ("reals", "Reals"):
            self.add("l", "set:" + name[0].upper())
        elif name in ("pounds", "euro", "textdollar"):
            self.add("o", "$")
        elif name == "angle":
            self.add("l", "angle")
        elif name in _IGNORED or (name in _CONCLUSIONS and not self.found):
            pass
        else:
            raise Unreadable(f"\\{name}")
        return end

    def negated(self, i: int) -> int:
        following = re.compile(r"\s*(=|\\in(?![A-Za-z]))").match(self.text, i)
        if following is None or following[1] != "=":
            raise Unreadable(r"\not")
        self.add("o", "!=")
        return following.end()

    def inner_text(self, name: str, i: int) -> int:
        r"""The braces after \text, \mathrm and their like: mathematics in another font, or words."""
        text = self.text
        brace = re.compile(r"\s*\{").match(text, i)
        if brace is None:
            if name in ("rm", "bf", "it", "mathbf", "mathrm"):
                return i
            raise Unreadable(f"\\{name} without braces")
        close = closing_brace(text, brace.end() - 1)
        if close < 0:
            raise Unreadable("an open brace")
        inner = text[brace.end() : close]
        plain = inner.strip()
        if not plain:
            self.spaced = True
        elif (
            any(c in plain for c in "\\${")
            or not any(c.isalpha() for c in plain)
            or plain.lower() in NUMBERS
            or plain.lower() in SCALES
            or _NUMBERS_IN_TEXT.fullmatch(plain)
        ):
            self.nested(plain)
        elif plain.lower().strip(" ,") in AND:
            self.add("o", "and")
        elif plain.lower().strip(" ,") in OR:
            self.add("o", "or")
        elif plain in FUNCTIONS and (name in _FONT or plain not in ("min", "sec")):
            self.add("f", FUNCTIONS[plain])
        elif name in _FONT and (len(plain) == 1 or name not in ("mathrm", "operatorname")):
            self.nested(plain)
        else:
            self.add("t", inner)
        return close + 1

    def nested(self, text: str) -> None:
        spaced = self.spaced
        found = _Lexer(text.replace("$", " ")).run()
        self.found += [found[0]._replace(spaced=spaced), *found[1:]] if found else []
        self.spaced = False

    def bracket(self, sign: str, escaped: bool = False) -> None:
        if sign in "([{":
            self.depth += 1
            self.grouped.append(self.thousands)
        else:
            self.depth = max(self.depth - 1, 0)
            if len(self.grouped) > 1:
                self.grouped.pop()
        self.add("o", {"{": "\\{", "}": "\\}"}[sign] if escaped and sign in "{}" else sign)

    def sign(self, i: int) -> int:
        text = self.text
        for long in (":=", "**", "<=", ">=", "!=", "==", "||", "...", "->", "=>"):
            if text.startswith(long, i):
                if long in ("->", "=>"):
                    raise Unreadable(long)
                self.add("o", {":=": "=", "==": "=", "...": "dots"}.get(long, long))
                return i + len(long)
        c = text[i]
        if c in "()[]":
            self.bracket(c)
        elif c in "{}+-*/^_!=<>,;:|&'%":
            self.add("o", c)
        elif c in "€£¥":
            self.add("o", "$")
        elif c == "¢":
            self.add("w", "cents")
        else:
            raise Unreadable(f"the sign {c!r}")
        return i + 1
