# ruff: noqa: RUF001, SIM905  (the signs are what it is about; lists of words read best as text)
"""An answer's text without its clothes: Unicode signs as LaTeX, delimiters, boxes, markdown, fonts and spacing removed.

Nothing here changes what an answer says; what it means is the parser's business. Every pass is linear in the text.
"""

from __future__ import annotations

import re
import unicodedata

_SIGNS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "﹣": "-",
    "×": r"\times ", "✕": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "•": r"\cdot ", "∗": "*",
    "÷": r"\div ", "∕": "/", "⁄": "/", "√": r"\sqrt ", "∛": r"\sqrt[3] ", "∞": r"\infty ", "±": r"\pm ", "∓": r"\mp ",
    "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "≡": r"\equiv ",
    "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ", "∖": r"\setminus ", "∅": r"\emptyset ", "Ø": r"\emptyset ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}",
    "°": r"^{\circ}", "∘": r"^{\circ}", "º": r"^{\circ}", "′": "'", "″": "''", "…": r"\ldots ", "⋯": r"\ldots ",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "⟨": r"\langle ", "⟩": r"\rangle ",
    "→": r"\to ", "∶": ":", "：": ":", "，": ",", "、": ",", "；": ";", "。": ".", "（": "(", "）": ")", 
    "｛": r"\{", "｝": r"\}",
    "“": '"', "”": '"', "‘": "'", "’": "'", "％": r"\%", "＄": r"\$",
    "\u00a0": " ", "\u2009": r"\,", "\u202f": r"\,", "\u2002": " ", "\u2003": " ", "\u200b": "",
    "\ufeff": "", "\u2061": "",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "⅕": r"\frac{1}{5}", "⅖": r"\frac{2}{5}", "⅗": r"\frac{3}{5}", "⅘": r"\frac{4}{5}", "⅙": r"\frac{1}{6}",
    "⅚": r"\frac{5}{6}", "⅛": r"\frac{1}{8}", "⅜": r"\frac{3}{8}", "⅝": r"\frac{5}{8}", "⅞": r"\frac{7}{8}",
    "ϕ": r"\phi ", "ϵ": r"\epsilon ", "µ": r"\mu ", "∆": r"\Delta ", "∑": r"\sum ", "∏": r"\prod ", "∫": r"\int ",
}  # fmt: skip
_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon phi chi "
    "psi omega"
).split()
_SIGNS |= {unicodedata.lookup(f"GREEK SMALL LETTER {n.upper().replace('LAMBDA', 'LAMDA')}"): rf"\{n} " for n in _GREEK}
_SIGNS |= {
    unicodedata.lookup(f"GREEK CAPITAL LETTER {n.upper().replace('LAMBDA', 'LAMDA')}"): rf"\{n.capitalize()} "
    for n in ("gamma", "delta", "theta", "lambda", "xi", "pi", "sigma", "phi", "psi", "omega")
}
_TABLE = str.maketrans(_SIGNS)
_SUPER = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni")
_SUB = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙ", "0123456789+-()n")
_SUPERS, _SUBS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ]+"), re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙ]+")

_ENVIRONMENT = re.compile(r"\\begin\s*\{")
_DOUBLED = re.compile(r"\\\\(?=[A-Za-z{}$%()\[\]])")
_SPACING = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|left|right|middle|bigl|bigr|Bigl|Bigr|biggl|biggr|big|Big"
    r"|bigg|Bigg|hfill|noindent|phantom|hphantom|vphantom)(?![A-Za-z])"
)
_DELIMITED = re.compile(r"\\(?:left|right|middle|[bB]igg?[lr]?)\s*\.")
_MARKDOWN = ("**", "__", "```", "`", "*")
_BLANKS = re.compile(r"\s{2,}")  # one says as much, and keeps every \s* that follows linear
_BOLD_LABEL = re.compile(r"(?<!\S)\*\*([A-Za-z][A-Za-z ]*:)\*\*(?=\s|\$|$)")  # "**Answer:** 58"
_PERIOD = re.compile(r"(?:(?:\s|\\[,;! ]|\\quad|\\qquad|~)*\.)+$")
_BOX = re.compile(r"\\(?:boxed|fbox|mathbf|mathrm|mathit|mathsf|boldsymbol|bm|textbf|textit|emph|underline|tag)\s*\{")
_QUOTES = (('"', '"'), ("``", "''"), ("'", "'"))
_BRACED_SIGN = re.compile(r"\{([:=<>+*/-])\}")
_MATH = re.compile(r"(?<!\\)\\[()\[\]]")
_TEX_DASH = re.compile(r"\\(?:text|mbox|mathrm)\{\s*([-:./,])\s*\}")
_TRAILING_SPACE = re.compile(r"(?:\s|\\[,;!: ]|\\quad|\\qquad|~|\\\\|\\newline)+$")
_WINDOW = 80
_LEADING_SPACE = re.compile(r"^(?:\s|\\[,;!: ]|\\quad|\\qquad|~|\\newline)+")


def normalize(text: str) -> str:
    """The answer in plain LaTeX, stripped of what carries no meaning: `$..$`, `\\(..\\)`, an enclosing box or font,
    markdown, `\\left`, `\\displaystyle`, the period of a sentence. `\\$` is money, also where it was typed bare."""
    if text.isascii() and text.isalnum():
        return text
    if not text.isascii():
        text = _SUPERS.sub(lambda m: "^{" + m[0].translate(_SUPER) + "}", text)
        text = _SUBS.sub(lambda m: "_{" + m[0].translate(_SUB) + "}", text)
        text = text.translate(_TABLE)
        if not text.isascii():
            text = unicodedata.normalize("NFKC", text)
    if "\\" in text:
        if not _ENVIRONMENT.search(text):
            text = _DOUBLED.sub(r"\\", text)
        text = _DELIMITED.sub(" ", text)
        text = _SPACING.sub(" ", text)
        text = _TEX_DASH.sub(r"\1", text)
        text = _MATH.sub(" ", text)
    if "{" in text:
        text = _BRACED_SIGN.sub(r"\1", text)
    text = _BLANKS.sub(" ", text)
    text = _BOLD_LABEL.sub(r"\1", text)
    if "$" in text:
        text = _dollars(text)
    while True:
        before = text
        text = _strip(text)
        if text == before:
            return text


def _strip(text: str) -> str:
    """One layer of clothes less."""
    if "\\" in text or "~" in text:
        text = _cut_end(_TRAILING_SPACE, _LEADING_SPACE.sub("", text))
        box = _BOX.match(text)
        if box and closing_brace(text, box.end() - 1) == len(text) - 1:
            text = text[box.end() : -1]
    text = text.strip()
    for mark in _MARKDOWN:
        n = len(mark)
        if len(text) > 2 * n and text.startswith(mark) and text.endswith(mark) and mark not in text[n:-n]:
            text = text[n:-n]
    for mark in ("**", "`"):
        if mark == "**" and text.endswith("**") and text.count("**") == 1:
            text = text[:-2]  # "73**": the opening half stood before the answer
    for left, right in _QUOTES:
        if len(text) > len(left + right) and text.startswith(left) and text.endswith(right):
            inner = text[len(left) : -len(right)]
            if right not in inner:
                text = inner
    if text.endswith((".", "。")) and not text.endswith(("..", "\\.")):
        text = _cut_end(_PERIOD, text)
    if text.endswith((",", ";")) and not text.endswith(("\\,", "\\;", ",,", ";;")):
        text = text[:-1]
    if text.startswith("{") and text.endswith("}") and closing_brace(text, 0) == len(text) - 1:
        text = text[1:-1]
    return text


def _cut_end(pattern: re.Pattern[str], text: str) -> str:
    """Without what the pattern finds at the end, at most `_WINDOW` characters: a search of all of it is quadratic."""
    return text[:-_WINDOW] + pattern.sub("", text[-_WINDOW:])


def closing_brace(text: str, at: int) -> int:
    """The place of the brace that closes the one at `at`, escaped braces aside; -1 where there is none."""
    depth, i, n = 0, at, len(text)
    while i < n:
        c = text[i]
        if c == "\\":
            i += 2
            continue
        if c == "{":
            depth += 1
        elif c == "}":
            depth -= 1
            if depth == 0:
                return i
        i += 1
    return -1


_BARE_DOLLAR = re.compile(r"(?<!\\)\$+")


def _dollars(text: str) -> str:
    """Pairs of `$` are delimiters and go, a lone one is money: so are two that both stand before a number."""
    marks = list(_BARE_DOLLAR.finditer(text))
    if not marks:
        return text
    amounts = [bool(re.match(r"\s*\.?\d", text[m.end() :])) for m in marks]
    if len(marks) % 2 == 1 or (all(amounts) and len(marks[0][0]) == 1):
        if any(amounts):
            return _BARE_DOLLAR.sub(
                lambda m: r"\$" if re.match(r"\s*\.?\d", text[m.end() : m.end() + 8]) else " ", text
            )
        if len(marks) == 1 and re.search(r"\d\s*$", text[: marks[0].start()]):
            return text.replace("$", r"\$")  # "18$"
    return _BARE_DOLLAR.sub(" ", text)
