r"""Whether an answer equals the gold answer.

Stages, cheapest first: limits, the same text, kinds (lists, sets, intervals, units, words ..) down to pairs of single
expressions, and for these the exact form (`canonical`), a numeric refutation or proof (`numeric`), SymPy (`symbolic`).
Everything but SymPy is bounded to milliseconds by construction.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import cache
from itertools import chain

from pymathrl.verify import nodes as t
from pymathrl.verify import numeric, symbolic
from pymathrl.verify import real_sets as rs
from pymathrl.verify.canonical import Form, Former, Mono, NoForm, Poly, Undefined, number, substitute
from pymathrl.verify.forms import has_form
from pymathrl.verify.lexer import TooLarge
from pymathrl.verify.nodes import Node
from pymathrl.verify.normalize import normalize
from pymathrl.verify.parser import MAX_LENGTH, parse_normalized, unwrap_text
from pymathrl.verify.policy import Policy, Verdict
from pymathrl.verify.readings import Assignments, Equation, Inequality, Reading, System, Value, as_inequality, read

DEFAULT = Policy()
AGREED = f"agree to {numeric.AGREE_DIGITS} digits at {numeric.POINTS} points"  # without a proof
STAGES = ("text", "kind", "exact", "numeric", "symbolic")  # the dearest one that was needed decides
MAX_ITEMS = 60  # of a list whose items are not all plain numbers

_UNDEFINED = frozenset(("undefined", "nan", "?", "unknown", "n/a", "null", "error", "indeterminate", "zoo", "..."))
_WHOLE = re.compile(r"[-+]?\d{1,40}")
_LETTER = re.compile(r"\(?\s*([A-Ja-j])\s*\)?\s*[.):]?")
_LETTER_AND_MORE = re.compile(r"(?:\(\s*([A-J])\s*\)\s*[.:]?|([A-J])\s*[.):])\s*([^\s^!_].*)", re.DOTALL)
_OTHER_CHOICE = re.compile(r"(?:^|[\s(])[A-J]\s*[.)]|\b(?:or|and)\b|\bnot\b")
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+")
_FRACTIONS = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_SPACES = re.compile(r"(?:\s|~|(?<!\\)\\[,;:! ]|\\q?quad(?![A-Za-z]))+")
_BETWEEN_DIGITS = re.compile(r"(?<=\d)\s+(?=\d)")
_ONE_TOKEN = re.compile(r"\{(\w)\}")
_MAYBE_UNDEFINED = re.compile(r"[/}{(]\s*-?0|/|\\frac|\\(?:ln|log|tan|cot|sec|csc)|\^")
_COMMAND = re.compile(r"\\[A-Za-z]")
_LETTER_RUN = re.compile(r"[^\W\d_]{2}|^\W*[^\W\d_]\W*$")
_BLANK = re.compile(r"(?<!\d) | (?!\d)")
_LIST_OF_WORDS = re.compile(r"\s*(?:,|;|\band\b)\s*")
_NOT_A_WORD = re.compile(r"[^\w%$<>=+*/^|-]+")
_ARTICLE = re.compile(
    r"^(?:(?:so |thus |hence |therefore )?(?:the )?(?:final )?(?:correct )?(?:answer|option|choice)(?: is)?:? )"
)


def decide(gold: str, answer: str, cfg: Policy = DEFAULT, *, symbolic: bool) -> Verdict | None:
    """The verdict on two answers, as they were extracted.

    symbolic False: SymPy is not used, the time is bounded; None where only a proof could tell. True: SymPy runs in this
    process, for as long as it takes. Never raises, whatever the texts.
    """
    if len(answer) > MAX_LENGTH or len(gold) > MAX_LENGTH:
        return Verdict(False, f"longer than {MAX_LENGTH} characters", "limits")
    a, b = normalize(gold), normalize(answer)
    if not a or not b:
        return Verdict(False, "empty", "limits")
    if _WHOLE.fullmatch(a) and _WHOLE.fullmatch(b):
        same = int(a) == int(b)
        if same or not (cfg.abs_tol or cfg.rel_tol):
            return Verdict(same, "equal" if same else "different values", "exact")
    comparison = _Comparison(cfg, symbolic)
    try:
        return comparison.decide(a, b)
    except TooLarge as error:
        return Verdict(False, f"too large: {error}", "limits")
    except (RecursionError, OverflowError, MemoryError) as error:
        return Verdict(False, f"too large: {type(error).__name__}", "limits")


def literal(text: str) -> str:
    """A normalized text without spacing and spelling variants of LaTeX: what must be equal to be the same text."""
    text = _BETWEEN_DIGITS.sub("|", _FRACTIONS.sub(r"\\frac", text))
    text = _SPACES.sub("", text)
    return _ONE_TOKEN.sub(r"\1", text.replace(r"\dots", r"\ldots").replace(r"\cdots", r"\ldots"))


def words(text: str) -> str:
    """Words without case, punctuation, spaces and font commands, a leading "the answer is" left out; "" for what is
    mathematics."""
    plain = unwrap_text(text)
    if _COMMAND.search(plain) or not _LETTER_RUN.search(plain):
        return ""
    plain = " ".join(_NOT_A_WORD.sub(" ", plain).split()).lower()
    return _BLANK.sub("", _ARTICLE.sub("", plain))


def listed_words(text: str) -> frozenset[str]:
    """The words of a list, each as `words` gives it."""
    return frozenset(words(part) for part in _LIST_OF_WORDS.split(unwrap_text(text)))


class _Comparison:
    """One comparison. Methods answer True, False or None (only a proof could tell)."""

    def __init__(self, cfg: Policy, symbolic: bool) -> None:
        self.cfg, self.symbolic = cfg, symbolic
        self.former, self.budget = Former(), numeric.Budget()
        self.stage = 0
        self.reason, self.agreed = "", False

    def used(self, stage: str) -> None:
        self.stage = max(self.stage, STAGES.index(stage))

    def because(self, reason: str) -> bool:
        """False, with the reason that is told if no other follows."""
        self.reason = self.reason or reason
        return False

    def decide(self, a: str, b: str) -> Verdict | None:
        chosen = self.choice(a, b)
        if chosen is not None:
            return Verdict(chosen, "same choice" if chosen else "another choice", "kind")
        same_text = literal(a) == literal(b)
        if same_text and not _MAYBE_UNDEFINED.search(a) and words(a) not in _UNDEFINED:
            return self.formed(b, Verdict(True, "same text", "text"))
        gold, answer = parse_normalized(a), parse_normalized(b)
        if gold is None or answer is None:
            return Verdict(False, "empty", "limits")
        if same_text:
            if words(a) in _UNDEFINED or self.is_undefined(gold):
                return Verdict(False, "undefined", "exact")
            return self.formed(b, Verdict(True, "same text", "text"))
        if (isinstance(gold, t.Word) or isinstance(answer, t.Word)) and (said := words(a)) and said == words(b):
            if said in _UNDEFINED:
                return Verdict(False, "undefined", "text")
            return Verdict(True, "same words", "text")
        found = self.trees(gold, answer)
        if found is False and isinstance(gold, t.Items) != isinstance(answer, t.Items):
            found = self.split_thousands(gold, answer, a, b)
        stage = STAGES[max(self.stage, 1)]
        if found is None:
            return None if not self.symbolic else Verdict(False, "no proof", "symbolic")
        if found:
            return self.formed(b, Verdict(True, AGREED if self.agreed else "equal", stage))
        return Verdict(False, self.reason or "different", stage)

    def split_thousands(self, gold: Node, answer: Node, a: str, b: str) -> bool | None:
        """ "30,150" against a list of two: as a list."""
        items, text = (gold, b) if isinstance(gold, t.Items) else (answer, a)
        parts = text.split(",")
        if not isinstance(items, t.Items) or len(parts) != len(items.items) or not _THOUSANDS.fullmatch(text):
            return False
        return self.lists(items, t.Items(tuple(t.Num(Fraction(p)) for p in parts)))

    def formed(self, answer: str, verdict: Verdict) -> Verdict:
        form = self.cfg.require_form
        if form and not has_form(answer, parse_normalized(answer), form):
            return Verdict(False, f"not {form}", "kind")
        return verdict

    # --- choices and words ---

    def choice(self, a: str, b: str) -> bool | None:
        """A letter A-J against a letter, or a letter with its text: "(B)", "B.", "B) 42". None: no choice question."""
        a, b = unwrap_text(a).strip().replace("\\", " "), unwrap_text(b).strip().replace("\\", " ")
        if len(a) > len(b):
            a, b = b, a
        short, other = _LETTER.fullmatch(a), _LETTER.fullmatch(b)
        if short and other:
            x, y = short[1], other[1]
            if self.cfg.choice or (x.isupper() and y.isupper()):
                return x.upper() == y.upper()
            constant = {x, y} & {"e", "i"}  # lower case, these are numbers
            return x.upper() == y.upper() if x.isupper() != y.isupper() and not constant else None
        more = _LETTER_AND_MORE.fullmatch(b)
        if short and (short[1].isupper() or self.cfg.choice) and more:
            return (more[1] or more[2]) == short[1].upper() and not _OTHER_CHOICE.search(more[3])
        return None

    # --- whole answers ---

    def trees(self, gold: Node, answer: Node) -> bool | None:
        if isinstance(gold, t.Quantity) or isinstance(answer, t.Quantity):
            return self.quantities(gold, answer)
        return self.readings(read(gold), read(answer))

    def quantities(self, a: Node, b: Node) -> bool | None:
        """A unit on one side is ignored, two must be the same; n % on one side alone may be n/100."""
        x, y = (n.unit if isinstance(n, t.Quantity) else None for n in (a, b))
        p, q = (n.value if isinstance(n, t.Quantity) else n for n in (a, b))
        if x is not None and y is not None:
            if x != y:
                return self.because(f"units {x} and {y}")
            return self.trees(p, q)
        claims = read(a), read(b)
        if claims != (Value(a), Value(b)) and isinstance(p, t.Items | t.Chain) != isinstance(q, t.Items | t.Chain):
            return self.readings(*claims)
        found = self.trees(p, q)
        if found is False and self.cfg.percent and "%" in (x, y):
            self.reason = ""
            if x == "%" and t.is_scalar(p):
                return self.trees(_hundredth(p), q)
            if y == "%" and t.is_scalar(q):
                return self.trees(p, _hundredth(q))
        return found

    def readings(self, a: Reading, b: Reading) -> bool | None:
        if isinstance(a, System) or isinstance(b, System):
            return self.systems(a, b)
        if isinstance(a, Assignments) or isinstance(b, Assignments):
            return self.assignments(a, b)
        if isinstance(a, Value) and isinstance(b, Value):
            return self.named_values(a, b)
        if isinstance(a, rs.RealSet) or isinstance(b, rs.RealSet):
            return self.sets(a, b)
        if isinstance(a, Inequality) and isinstance(b, Inequality):
            return self.inequalities(a, b)
        left, right = self.as_equation(a), self.as_equation(b)
        if left is None or right is None:
            return self.because("a relation that is not solved")
        return self.equations(left, right)

    def named_values(self, a: Value, b: Value) -> bool | None:
        for value in (a, b):
            for side in value.also:
                if not t.symbols(side) and self.values(side, value.node) is False:
                    self.reason = ""
                    return self.because("sides of an equality that differ")
        self.reason = ""
        if a.names and b.names and a.names != b.names:
            left, right = self.as_equation(a), self.as_equation(b)
            if left is not None and right is not None:
                return self.equations(left, right)
            return self.because(f"{','.join(a.names)} is not {','.join(b.names)}")
        return self.values(a.node, b.node)

    @staticmethod
    def as_equation(reading: Reading) -> Equation | None:
        """y = 2x + 3 as the equation of a line; x = 3/2 is none."""
        if isinstance(reading, Equation):
            return reading
        if not isinstance(reading, Value) or len(reading.names) != 1 or "(" in reading.names[0]:
            return None
        if not t.is_scalar(reading.node) or not t.symbols(reading.node):
            return None
        return Equation(t.Sym(reading.names[0]), reading.node)

    def equations(self, a: Equation, b: Equation) -> bool | None:
        """Whether left - right of one is a constant, not 0, times that of the other."""
        if not all(t.is_scalar(x) for x in (a.left, a.right, b.left, b.right)):
            return _all([self.values(a.left, b.left), self.values(a.right, b.right)])
        self.used("exact")
        try:
            p, q = (self.difference(e)[0] for e in (a, b))
        except (NoForm, Undefined):
            return _all([self.values(a.left, b.left), self.values(a.right, b.right)])
        return self.proportional(p, q) is not None or self.because("different equations")

    def difference(self, relation: Equation | Inequality) -> Form:
        """left - right"""
        form = self.former.form
        return self.former.add(form(relation.left), self.former.multiply(number(Fraction(-1)), form(relation.right)))

    def proportional(self, p: Poly, q: Poly) -> Fraction | None:
        """c with p = c q, c rational (1 for other constants); None where there is none."""
        if not p or not q:
            return None
        first = min(q)
        ratio = p.get(first, Fraction(0)) / q[first]
        if p == {mono: c * ratio for mono, c in q.items()}:
            return ratio
        return Fraction(1) if self.has_radical_ratio(p, q) else None

    def has_radical_ratio(self, p: Poly, q: Poly) -> bool:
        """The same for a ratio that holds radicals: the cross products of all coefficients with the first ones."""
        x, y = self.coefficients(p), self.coefficients(q)
        if set(x) != set(y):
            return False
        first = min(x)
        try:
            return all(self.former.times(x[m], y[first]) == self.former.times(y[m], x[first]) for m in x)
        except NoForm:
            return False

    def coefficients(self, poly: Poly) -> dict[Mono, Poly]:
        """By the monomial in variables; coefficients may hold constants."""
        found: dict[Mono, Poly] = {}
        for mono, c in poly.items():
            variable = [self.former.keys[atom][0] == "variable" for atom, _ in mono]
            kept = tuple(x for x, v in zip(mono, variable, strict=True) if v)
            found.setdefault(kept, {})[tuple(x for x, v in zip(mono, variable, strict=True) if not v)] = c
        return found

    def inequalities(self, a: Inequality, b: Inequality) -> bool | None:
        if a.op != b.op or not all(t.is_scalar(x) for x in (a.left, a.right, b.left, b.right)):
            return self.because("different inequalities")
        self.used("exact")
        try:
            p, q = (self.difference(e) for e in (a, b))
        except (NoForm, Undefined):
            return self.because("different inequalities")
        if p[1] != q[1]:
            return self.because("different inequalities")
        ratio = self.proportional(p[0], q[0])
        if ratio is None or (ratio < 0 and a.op != "!="):
            return self.because("different inequalities")
        return True

    def sets(self, a: Reading, b: Reading) -> bool | None:
        found = []
        for reading in (a, b):
            if isinstance(reading, rs.RealSet):
                found.append(reading)
            elif isinstance(reading, Value):
                try:
                    node = reading.node
                    items = isinstance(node, t.Items) and node.how != ","
                    found.append(self.joined(node) if items else rs.from_tree(node))
                except rs.NotReal:
                    return self.because("a set and no set")
            else:
                return self.because("an inequality that is not solved")
        x, y = (r.variable if isinstance(r, rs.RealSet) else (r.names[0] if isinstance(r, Value) and r.names else None)
                for r in (a, b))  # fmt: skip
        if x is not None and y is not None and x != y:
            flipped = [as_inequality(r) for r in found]
            if flipped[0] is not None and flipped[1] is not None:
                return self.inequalities(flipped[0], flipped[1])
            return self.because(f"{x} is not {y}")
        try:
            return rs.same(found[0], found[1], self.ends)
        except rs.NotReal:
            return self.because("sets that cannot be put in order")

    @staticmethod
    def joined(node: Node) -> rs.RealSet:
        """Intervals joined by words: (1,2) or (3,4)."""
        assert isinstance(node, t.Items)
        if not all(isinstance(x, t.Group | t.SetOp) for x in node.items):
            raise rs.NotReal
        return rs.RealSet(rs.normalized([p for x in node.items for p in rs.from_tree(x).pieces]))

    def ends(self, a: Node, b: Node) -> bool | None:
        if rs.is_infinite(a) or rs.is_infinite(b):
            return rs.is_infinite(a) == rs.is_infinite(b)
        return self.values(a, b)

    def assignments(self, a: Reading, b: Reading) -> bool | None:
        """x = 2, y = 3 by names; against a tuple in the order of the names as they were given."""
        if isinstance(a, Assignments) and isinstance(b, Assignments):
            if sorted(a.names) != sorted(b.names):
                return self.because("other variables")
            values = dict(zip(b.names, b.values, strict=True))
            return _all(self.values(v, values[n]) for n, v in zip(a.names, a.values, strict=True))
        given, other = (a, b) if isinstance(a, Assignments) else (b, a)
        assert isinstance(given, Assignments)
        if not isinstance(other, Value):
            return self.because("values and a relation")
        node = other.node
        if other.names and len(other.names) == len(given.names) and sorted(other.names) == sorted(given.names):
            if isinstance(node, t.Group) and len(node.items) == len(other.names):
                by_name = dict(zip(other.names, node.items, strict=True))
                return _all(self.values(v, by_name[n]) for n, v in zip(given.names, given.values, strict=True))
            return self.because("other values")
        if other.names:
            return self.because("other variables")
        items = node.items if isinstance(node, t.Group | t.Items) else ()
        if len(items) != len(given.values):
            return self.because("another number of values")
        pairs = list(zip(given.names, given.values, strict=True))
        if given is b:  # a gold tuple has its variables in alphabetical order
            pairs.sort(key=lambda pair: pair[0])
        return _all(self.values(v, x) for (_, v), x in zip(pairs, items, strict=True))

    def systems(self, a: Reading, b: Reading) -> bool | None:
        parts = [list(r.parts) if isinstance(r, System) else [r] for r in (a, b)]
        if len(parts[0]) == 1 and isinstance(parts[0][0], Value):
            parts[0] = self.split_values(parts[0][0])
        if len(parts[1]) == 1 and isinstance(parts[1][0], Value):
            parts[1] = self.split_values(parts[1][0])
        return self.matched(parts[0], parts[1], self.readings)

    @staticmethod
    def split_values(value: Value) -> list[Reading]:
        if isinstance(value.node, t.Items | t.Braces) and not value.names:
            return [read(x) for x in value.node.items]
        return [value]

    # --- values ---

    def values(self, a: Node, b: Node) -> bool | None:
        if isinstance(a, t.Quantity) or isinstance(b, t.Quantity):
            return self.quantities(a, b)
        if _is_claim(a) or _is_claim(b):
            if isinstance(a, t.Chain) and isinstance(b, t.Chain) and a.ops == b.ops and a == read_node(a):
                return _all(self.values(x, y) for x, y in zip(a.sides, b.sides, strict=True))
            if read(a) != Value(a) or read(b) != Value(b):
                return self.readings(read(a), read(b))
            return self.because("different relations")
        if isinstance(a, t.Word) or isinstance(b, t.Word):
            return self.text_values(a, b)
        if isinstance(a, t.Based) or isinstance(b, t.Based):
            return self.based(a, b)
        if isinstance(a, t.Ratio) or isinstance(b, t.Ratio):
            return self.ratios(a, b)
        if isinstance(a, t.Matrix) or isinstance(b, t.Matrix):
            return self.matrices(a, b)
        lists = (t.Items, t.Braces)
        if isinstance(a, t.SetOp) or isinstance(b, t.SetOp) or isinstance(a, t.Named) or isinstance(b, t.Named):
            return self.named_sets(a, b)
        if isinstance(a, t.Group) or isinstance(b, t.Group):
            return self.groups(a, b)
        if isinstance(a, lists) or isinstance(b, lists):
            return self.lists(a, b)
        return self.scalars(a, b)

    def text_values(self, a: Node, b: Node) -> bool:
        x, y = (_clock_text(n) for n in (a, b))
        if x is None or y is None:
            return self.because("words and a value")
        if words(x) == words(y) != "" or x == y:
            return True
        lists = listed_words(x), listed_words(y)
        return (lists[0] == lists[1] and len(lists[0]) > 1 and "" not in lists[0]) or self.because("different words")

    def based(self, a: Node, b: Node) -> bool:
        """Equal digits; a base that is left out is that of the other."""
        x, y = (_digits(n) for n in (a, b))
        if x is None or y is None or x[0] != y[0]:
            return self.because("other digits")
        return x[1] is None or y[1] is None or x[1] == y[1] or self.because("another base")

    def ratios(self, a: Node, b: Node) -> bool | None:
        """Proportions where no term is 0; two times of day are compared as written."""
        if isinstance(a, t.Ratio) and isinstance(b, t.Ratio):
            if len(a.terms) != len(b.terms):
                return self.because("ratios of different length")
            if (a.clock and b.clock) or any(self.is_zero(x) for x in (*a.terms, *b.terms)):
                return _all(self.values(x, y) for x, y in zip(a.terms, b.terms, strict=True))
            pairs = [
                (t.Mul((x, b.terms[0])), t.Mul((y, a.terms[0]))) for x, y in zip(a.terms[1:], b.terms[1:], strict=True)
            ]
            return _all(self.values(x, y) for x, y in pairs)
        ratio, other = (a, b) if isinstance(a, t.Ratio) else (b, a)
        assert isinstance(ratio, t.Ratio)
        if len(ratio.terms) != 2 or not t.is_scalar(other) or any(self.is_zero(x) for x in ratio.terms):
            return self.because("a ratio and something else")
        return self.values(t.Mul((ratio.terms[0], t.Pow(ratio.terms[1], t.MINUS_ONE))), other)

    def is_zero(self, node: Node) -> bool:
        return t.is_scalar(node) and self.scalars(node, t.Num(Fraction(0))) is True

    def matrices(self, a: Node, b: Node) -> bool | None:
        """Entry by entry; a column may be written as a tuple."""
        if isinstance(a, t.Matrix) and isinstance(b, t.Matrix):
            if (len(a.rows), len(a.rows[0])) != (len(b.rows), len(b.rows[0])):
                return self.because("other dimensions")
            pairs = zip(t.children(a), t.children(b), strict=True)
            return _all(self.values(x, y) for x, y in pairs)
        matrix, other = (a, b) if isinstance(a, t.Matrix) else (b, a)
        assert isinstance(matrix, t.Matrix)
        if len(matrix.rows) == len(matrix.rows[0]) == 1:
            return self.values(matrix.rows[0][0], other)
        if isinstance(other, t.Group) and len(matrix.rows[0]) == 1 and len(other.items) == len(matrix.rows):
            return _all(self.values(x[0], y) for x, y in zip(matrix.rows, other.items, strict=True))
        return self.because("a matrix and something else")

    def named_sets(self, a: Node, b: Node) -> bool | None:
        try:
            return rs.same(rs.from_tree(a), rs.from_tree(b), self.ends)
        except rs.NotReal:
            pass
        if isinstance(a, t.Items) != isinstance(b, t.Items):
            items = a if isinstance(a, t.Items) else b
            if isinstance(items, t.Items) and items.how != ",":
                return self.sets(Value(a), Value(b))
        if isinstance(a, t.SetOp) and isinstance(b, t.SetOp) and a.op == b.op:
            straight = _all([self.values(a.left, b.left), self.values(a.right, b.right)])
            if straight is not False or a.op == "minus":
                return straight
            return _all([self.values(a.left, b.right), self.values(a.right, b.left)])
        return a == b or self.because("different sets")

    def groups(self, a: Node, b: Node) -> bool | None:
        if isinstance(a, t.Group) and isinstance(b, t.Group):
            if len(a.items) != len(b.items):
                return self.because("another number of components")
            found = _all(self.components(x, y) for x, y in zip(a.items, b.items, strict=True))
            if found is not False and len(a.items) == 2:
                for x, y, end in ((a.left, b.left, a.items[0]), (a.right, b.right, a.items[1])):
                    if x != y and not rs.is_infinite(end):
                        return self.because("open and closed ends")
            return found
        group, other = (a, b) if isinstance(a, t.Group) else (b, a)
        assert isinstance(group, t.Group)
        if isinstance(other, t.Braces) and len(other.items) == 1:
            return self.values(group, other.items[0])
        if isinstance(other, t.Items):
            pair = len(group.items) == 2 and (group.left, group.right) != ("(", ")")
            if not pair and len(group.items) == len(other.items) and other.how != "or":
                return _all(self.components(x, y) for x, y in zip(group.items, other.items, strict=True))
            return self.because("a tuple and a list")
        return self.because("a tuple and something else")

    def components(self, a: Node, b: Node) -> bool | None:
        if isinstance(a, t.Chain) and isinstance(b, t.Chain):
            return self.readings(read(a), read(b))
        if isinstance(a, t.Braces) != isinstance(b, t.Braces):  # {1}, {2} are no numbers
            return self.because("a set among the items of a list")
        return self.ends(a, b)

    def lists(self, a: Node, b: Node) -> bool | None:
        """Unordered, duplicates collapse; where items are left out by dots, as written."""
        x, y = (n.items if isinstance(n, t.Items | t.Braces) else (n,) for n in (a, b))
        if isinstance(a, t.Items | t.Braces) != isinstance(b, t.Items | t.Braces) and len(x) + len(y) > 2:
            return self.because("a list and one value")
        if any(isinstance(n, t.Literal) for n in (*x, *y)):
            if len(x) != len(y):
                return self.because("different lists with dots")
            return _all(self.values(p, q) for p, q in zip(x, y, strict=True))
        return self.matched(x, y, self.components)

    def matched(self, x: Sequence, y: Sequence, equal: Callable) -> bool | None:
        """Whether each item has an equal one on the other side."""
        left, right = ([self.fast_key(n) for n in items] for items in (x, y))
        if None not in left and None not in right and not (self.cfg.abs_tol or self.cfg.rel_tol):
            self.used("exact")
            return set(left) == set(right) or self.because("different items")
        if max(len(x), len(y)) > MAX_ITEMS:
            raise TooLarge(f"more than {MAX_ITEMS} items")
        found = cache(lambda i, j: equal(x[i], y[j]))
        rows = (_any(found(i, j) for j in range(len(y))) for i in range(len(x)))
        columns = (_any(found(i, j) for i in range(len(x))) for j in range(len(y)))
        verdict = _all(chain(rows, columns))
        self.reason = ""
        return verdict if verdict is not False else self.because("an item without an equal one")

    @staticmethod
    def fast_key(node: object) -> Fraction | None:
        if isinstance(node, Value) and not node.names:
            node = node.node
        return node.value if isinstance(node, t.Num) and not node.places else None

    # --- single expressions ---

    def scalars(self, a: Node, b: Node) -> bool | None:
        self.used("exact")
        if isinstance(a, t.Literal) or isinstance(b, t.Literal):
            return a == b or self.because("dots and a value")
        if t.symbols(a) or t.symbols(b):  # i is the imaginary unit where only numbers stand beside it
            a, b = (substitute(x, t.IMAGINARY, t.Sym("i*")) for x in (a, b))
        if rs.is_infinite(a) or rs.is_infinite(b):
            return rs.is_infinite(a) == rs.is_infinite(b) or self.because("infinity and a value")
        if isinstance(a, t.Num) and isinstance(b, t.Num) and a.value == b.value:
            return True
        try:
            p, q = self.former.form(a), self.former.form(b)
            found = self.former.equal(p, q)
        except Undefined as error:
            return self.because(f"undefined: {error}")
        except TooLarge:
            return self.large(a, b)
        except NoForm:
            found = None
        if found:
            return True
        try:
            if self.is_close(a, b):
                return True
            if found is None:
                self.used("numeric")
                found = self.numbers(a, b)
        except TooLarge:
            return self.large(a, b)
        except (Undefined, numeric.Outside):
            return self.because("undefined")
        return found if found is not False else self.because("different values")

    def large(self, a: Node, b: Node) -> bool:
        """Powers too large to write out: by their residues."""
        self.used("numeric")
        if numeric.same_residues(a, b):
            return True
        return self.because("different values")

    def numbers(self, a: Node, b: Node) -> bool | None:
        seen = numeric.compare(a, b, self.budget)
        if seen == numeric.DIFFER:
            return False
        if seen == numeric.AGREE and not t.symbols(a) and not t.symbols(b):
            proved = numeric.same_algebraic(a, b, self.budget)
            if proved is not None:
                return proved
        if not self.symbolic:
            return None
        self.used("symbolic")
        if symbolic.proves_equal(a, b):
            return True
        doubtful = any(numeric.has_integer_parameter(x) or numeric.has_pieces(x) for x in (a, b))
        if seen == numeric.AGREE and not doubtful:
            self.agreed = True
            return True
        return self.because("no proof")

    def is_close(self, gold: Node, answer: Node) -> bool:
        """A decimal for an exact value that does not terminate; the tolerances of the policy."""
        if t.symbols(gold) or t.symbols(answer):
            return False
        cfg = self.cfg
        for decimal, exact in ((gold, answer), (answer, gold)):
            if not isinstance(decimal, t.Num) or not decimal.places or decimal.digits < cfg.decimal_digits:
                continue
            if not (isinstance(exact, t.Num) and _terminates(exact.value)) and self.rounds_to(exact, decimal, True):
                return True
        if cfg.decimal_round and isinstance(gold, t.Num) and gold.places and gold.digits >= 3:
            longer = not isinstance(answer, t.Num) or answer.places is None or answer.places > gold.places
            if longer and self.rounds_to(answer, gold, False):
                return True
        if cfg.abs_tol or cfg.rel_tol:
            x, y = (numeric.value(n, numeric.DIGITS, self.budget) for n in (gold, answer))
            return bool(abs(x - y) <= cfg.abs_tol + cfg.rel_tol * abs(x))
        return False

    def rounds_to(self, exact: Node, decimal: t.Num, truncated: bool) -> bool:
        """Whether `decimal` is the value rounded, or also truncated, to its number of places."""
        assert decimal.places is not None
        if isinstance(exact, t.Num):
            value = exact.value
        else:
            found = numeric.value(exact, max(numeric.DIGITS, decimal.digits + 20), self.budget)
            if found.imag != 0 or abs(found.real) > 10**40:
                return False
            scale = 10 ** (decimal.places + 30)
            value = Fraction(int(found.real * scale), scale)
        shifted = abs(value) * 10**decimal.places
        written = abs(decimal.value) * 10**decimal.places
        if (value < 0) != (decimal.value < 0):
            return False
        return written == math.floor(shifted + Fraction(1, 2)) or (truncated and written == math.floor(shifted))

    def is_undefined(self, node: Node) -> bool:
        """Whether a part of the answer divides by zero or is no number."""
        for n in [node] if t.is_scalar(node) else [c for c in t.walk(node) if t.is_scalar(c)]:
            try:
                self.former.form(n)
            except Undefined:
                return True
            except (NoForm, TooLarge):
                continue
        return False


def _all(found: Iterable[bool | None]) -> bool | None:
    """False at the first False, else None where one is None."""
    verdict: bool | None = True
    for one in found:
        if one is False:
            return False
        verdict = verdict and one
    return verdict


def _any(found: Iterable[bool | None]) -> bool | None:
    """True at the first True, else None where one is None."""
    verdict: bool | None = False
    for one in found:
        if one:
            return True
        verdict = None if one is None else verdict
    return verdict


def read_node(node: Node) -> Node | None:
    """The tree itself where `read` makes nothing else of it."""
    reading = read(node)
    return reading.node if isinstance(reading, Value) and not reading.names else None


def _is_claim(node: Node) -> bool:
    return isinstance(node, t.Chain) or (isinstance(node, t.Group) and isinstance(read(node), Assignments))


def _hundredth(node: Node) -> Node:
    """n / 100 of n %; a decimal stays one."""
    if isinstance(node, t.Num):
        return t.Num(node.value / 100, None if node.places is None else node.places + 2, node.digits)
    return t.Mul((node, t.Num(Fraction(1, 100))))


def _clock_text(node: Node) -> str | None:
    if isinstance(node, t.Word):
        return node.text
    if isinstance(node, t.Ratio) and node.clock:
        return ":".join(str(x.value) for x in node.terms if isinstance(x, t.Num))
    return None


def _digits(node: Node) -> tuple[str, str | None] | None:
    """(digits, base) of a based number, or of a whole number without a base."""
    if isinstance(node, t.Based):
        return node.digits.upper().lstrip("0"), node.base
    if isinstance(node, t.Num) and node.value.denominator == 1 and node.value.numerator.bit_length() < 8 * MAX_LENGTH:
        return str(node.value), None
    if isinstance(node, t.Word):
        return node.text.upper(), None
    if isinstance(node, t.Mul) and all(isinstance(x, t.Sym) for x in node.factors):
        return "".join(x.name for x in node.factors if isinstance(x, t.Sym)), None
    return None


def _terminates(value: Fraction) -> bool:
    d = value.denominator
    for p in (2, 5):
        while d % p == 0:
            d //= p
    return d == 1
