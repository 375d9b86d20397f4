"""The answer that a response states, as text: `extract(response, mode)`.

    boxed        the last \\boxed or \\fbox; boxes with nothing but separators between them are one list
    tag          what stands between the last <answer> and </answer>, or in a box there
    gsm8k        what follows the last "####" in front of a number
    answer       what follows the last "the answer is" or "Answer:", or its like in the languages of `PHRASES`
    choice       the letter A to J of a box, tag or phrase, or of a last line that is nothing else
    last_number  the last number: for evaluation, never for a reward, which any stray number would earn
    auto         the first of tag, boxed, gsm8k and answer whose mark is there

Where the response has thoughts, <think> ... </think>, only what follows them is read, and thoughts that do not end
leave nothing. A box or a formula that is cut off gives no answer, and an earlier one is not taken for it; a tag that
is opened and not closed is none. Linear in the response's length. The response is the policy's text alone: a prompt
before it, with an example in a box, would be graded too.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from pymathrl.errors import nearest

OPEN, CLOSE = "<answer>", "</answer>"
THOUGHT, END_OF_THOUGHT = "<think>", "</think>"

_GAP = r"[\s*_]*"  # blanks and markdown between the word and its colon
_COLON = "[:：=]"  # noqa: RUF001 - the wide colon of Chinese and Japanese
# Word and copula in the languages of MGSM (arXiv 2210.03057); Telugu has none. The last five write no blanks around
# them, or end in signs that no word boundary follows.
_WORDS = {
    "en": (r"\banswers?(?:\s+to\s[^\n.:$]{1,60}?)?", r"(?:is|are|would be|equals)\b(?!['’])"),  # noqa: RUF001
    "de": (r"\bantwort", r"(?:ist|lautet)\b"),
    "es": (r"\brespuesta(?:\s+(?:final|correcta))?", r"es\b"),
    "fr": (r"\bréponse(?:\s+(?:finale|correcte))?", r"est\b"),
    "ru": (r"\bответ(?:ом)?\b", r"(?:[—–-]|(?:является|равен)\b)"),  # noqa: RUF001
    "sw": (r"\bjibu", r"ni\b"),
    "bn": (r"উত্তর", r"(?:হলো|হল|হ'ল|হচ্ছে)"),
    "te": (r"(?:సమాధానం|జవాబు)", ""),
    "th": (r"คำตอบ", r"(?:คือ|เป็น)"),
    "ja": (r"答え", r"は"),
    "zh": (r"答案", r"(?:是|为|為)"),
}
PHRASES = {
    language: rf"{word}{_GAP}(?:{copula}(?:{_GAP}{_COLON})?|{_COLON})" for language, (word, copula) in _WORDS.items()
}
_HEADING = r"^[ \t#*_>]*(?:the\s+)?(?:final\s+)?answer[ \t#*_]*$"  # a line of its own
_PHRASE = re.compile("|".join([*PHRASES.values(), _HEADING]), re.IGNORECASE | re.MULTILINE)
_NEGATION = re.compile(r"(?:not|nicht|не)\b", re.IGNORECASE)
_FILLER = re.compile(r"(?:(?:therefore|thus|hence|indeed|simply|exactly|equal to|given by)\b[\s:,]*)+", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.?](?=\s|$)|[。।]|,?\s(?:because|since|which|so|but)\b", re.IGNORECASE)
_POLITE = re.compile(r"(?:です|になります|でした)\Z")

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BARE_NUMBER = re.compile(r"[-+−]?[0-9]+(?:[.,/][0-9]+)*%?")  # noqa: RUF001
_BARE_LETTER = re.compile(r"[A-Za-z](?=\s*(?:[.,;:$)]|\\[)\]]|\Z))")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_SEPARATORS = re.compile(r"(?:[\s,;$]|\\[()\[\]]|\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)*", re.IGNORECASE)

_GSM8K = re.compile(r"(?<!#)####(?!#)[ \t]*((?:[-+−$€£¥(.]*[0-9]|[-+]?\\)[^\n]*)")  # noqa: RUF001
_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
_LAST_NUMBER = re.compile(rf"(?<![0-9])(?:{_NUMBER}(?:/{_NUMBER})?|\.[0-9]+)")
_MINUS = "-−–"  # noqa: RUF001 - the characters that are read as a sign
# a small letter must be all there is, or be punctuated: "a dog" names no option
_CHOICE = re.compile(
    r"\W*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{\s*)?(?:(?:[Oo]ption|[Cc]hoice)\s+)?\(?"
    r"(?:([A-J])(?![\w'’])|([a-j])(?=[\s).:\]}*$]*\Z|[).:]))"  # noqa: RUF001
)
# a list of options is no choice: "A, B", but not "A, since B is wrong"
_CHOICE_END = r"[\s()\[\]{}.*$]*"
_ANOTHER = re.compile(
    rf"{_CHOICE_END}(?:[,;/&]|\\&|\b(?:and|or)\b){_CHOICE_END}[A-J](?={_CHOICE_END}(?:\Z|[,;/&]|\\&|\b(?:and|or)\b))"
)
_LONE_CHOICE = re.compile(r"[\s*_(\[]*([A-J])(?:[).:\]*_]+(?:\s.*)?)?\s*", re.IGNORECASE)


def extract(response: str, mode: str = "boxed") -> str | None:
    """The answer of a response, stripped and never empty; None where it states none. ValueError for an unknown mode."""
    if mode not in MODES:
        raise ValueError(f"extract: unknown mode {mode!r}; {nearest(mode, MODES)}")
    text = after_thoughts(response)
    return None if text is None else MODES[mode](text) or None


def after_thoughts(response: str) -> str | None:
    """What follows the last </think>, all of it where there is none; None where thoughts begin and do not end."""
    end = response.rfind(END_OF_THOUGHT)
    text = response if end < 0 else response[end + len(END_OF_THOUGHT) :]
    return None if THOUGHT in text else text


def last_answer(response: str, after_thought: bool = True) -> str | None:
    """Stripped content of the last closed answer tag after the last ``</think>``; anywhere, if there is no such mark or
    `after_thought` is False.

    The content may span lines.  An unclosed tag is no answer.  Of nested opening tags the innermost counts.
    Linear in the length of the response; tags are matched exactly, in lower case.
    """
    start = max(response.rfind(END_OF_THOUGHT), 0) if after_thought else 0
    close = response.rfind(CLOSE, start)
    if close < 0:
        return None
    begin = response.rfind(OPEN, start, close)
    return None if begin < 0 else response[begin + len(OPEN) : close].strip()


# Each reader gives None where the mark is not there, and "" where it is there without an answer.


def _boxed(text: str) -> str | None:
    boxes = list(_BOX.finditer(text))
    while boxes:
        mark = boxes.pop()
        content = _content(text, mark.end(), len(text))
        if content is not None:
            break
    else:
        return None
    parts, begin = [content[0].strip()], mark.start()
    if not parts[0]:
        return ""
    while boxes:
        mark = boxes.pop()
        content = _content(text, mark.end(), begin)
        if content is None or content[1] > begin or not _SEPARATORS.fullmatch(text, content[1], begin):
            break
        begin = mark.start()
        if content[0].strip():
            parts.append(content[0].strip())
    return ",".join(dict.fromkeys(reversed(parts)))


def _content(text: str, at: int, end: int) -> tuple[str, int] | None:
    """What the box whose command ends at `at` holds, and where that ends, at most `end`; None: a bare command. A brace
    that does not close before `end` holds nothing and ends behind it."""
    while at < end and text[at].isspace():
        at += 1
    if at >= end:
        return None
    if text[at] == "{":
        close = _closing(text, at, end)
        return ("", end + 1) if close is None else (text[at + 1 : close], close + 1)
    for pattern in (_BARE_NUMBER, _BARE_LETTER):
        token = pattern.match(text, at, end)
        if token:
            return token[0], token.end()
    command = _COMMAND.match(text, at, end)
    if command is None or _BOX.match(text, at, end):
        return None
    behind = command.end()
    while behind < end and text[behind] == "{":
        close = _closing(text, behind, end)
        if close is None:
            return "", end + 1
        behind = close + 1
    return text[at:behind], behind


def _closing(text: str, at: int, end: int) -> int | None:
    """Where the brace at `at` closes, before `end`. Escaped braces do not count."""
    depth = 0
    for token in _BRACE.finditer(text, at, end):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if not depth:
            return token.start()
    return None


def _tag(text: str) -> str | None:
    content = last_answer(text, after_thought=False)
    if content is None:
        return "" if OPEN in text else None
    boxed = _boxed(content)
    return content if boxed is None else boxed


def _gsm8k(text: str) -> str | None:
    found = None
    for found in _GSM8K.finditer(text):  # noqa: B007 - the last one counts
        pass
    return None if found is None else _trim(found[1])


def _answer(text: str) -> str | None:
    found = None
    for found in _PHRASE.finditer(text):  # noqa: B007 - the last one counts
        pass
    if found is None:
        return None
    rest = text[found.end() :].lstrip(" \t\r\n*_`")
    if _NEGATION.match(rest):
        return ""
    if filler := _FILLER.match(rest):
        rest = rest[filler.end() :]
    for begin, close in (("\\[", "\\]"), ("$$", "$$")):
        if rest.startswith(begin):
            end = rest.find(close, len(begin))
            block = rest[len(begin) : end] if end >= 0 else ""
            boxed = _boxed(block)
            return _trim(block) if boxed is None else boxed
    line = rest.find("\n")
    line = len(rest) if line < 0 else line
    box = _BOX.search(rest, 0, line)
    if box:
        content = _content(rest, box.end(), len(rest))
        if content is not None:
            return content[0].strip()
    formula = 0
    for begin, close in (("$", "$"), ("\\(", "\\)")):
        if rest.startswith(begin):
            formula = max(0, rest.find(close, len(begin), line))
    stop = _SENTENCE_END.search(rest, formula, line)
    said = rest[: line if stop is None else stop.start()]
    for begin, close in (("$", "$"), ("\\(", "\\)")):
        if formula and said.startswith(begin) and said.rstrip().endswith(close) and formula == said.rfind(close):
            said = said.rstrip()[len(begin) : -len(close)]
    return _POLITE.sub("", _trim(said))


def _trim(text: str) -> str:
    """Without blanks, markdown and a sentence's period around it."""
    return text.strip(" \t\r\n*`").removesuffix(".").rstrip(" \t*`")


def _choice(text: str) -> str | None:
    marked = _first_marked(text, (_tag, _boxed, _answer))
    if marked is not None:
        letter = _CHOICE.match(marked)
        if letter is None or _ANOTHER.match(marked, letter.end()):
            return ""
        return (letter[1] or letter[2]).upper()
    letter = _LONE_CHOICE.fullmatch(text.rstrip().rpartition("\n")[2])
    return None if letter is None else letter[1].upper()


def _last_number(text: str) -> str | None:
    found = None
    for found in _LAST_NUMBER.finditer(text):  # noqa: B007 - the last one counts
        pass
    if found is None:
        return None
    before = text[max(0, found.start() - 2) : found.start()]
    negative = before[-1:] in tuple(_MINUS) and not (before[:-1].isalnum() or before[:-1] == ")")
    return "-" * negative + found[0]


def _first_marked(text: str, readers: tuple[Callable[[str], str | None], ...]) -> str | None:
    for reader in readers:
        found = reader(text)
        if found is not None:
            return found
    return None


def _auto(text: str) -> str | None:
    return _first_marked(text, (_tag, _boxed, _gsm8k, _answer))


MODES: dict[str, Callable[[str], str | None]] = {
    "boxed": _boxed, "tag": _tag, "gsm8k": _gsm8k, "answer": _answer, "choice": _choice, "last_number": _last_number,
    "auto": _auto,
}  # fmt: skip
