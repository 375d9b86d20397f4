# ruff: noqa: SIM905  (lists of words read best as text)
"""Words that an answer may hold: functions, units, numbers, phrases that name a set, words around a value."""

from __future__ import annotations

import re

FUNCTIONS = {
    **{n: n for n in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth", "sech", "csch")},
    **{n: n for n in ("ln", "log", "exp", "max", "min", "gcd", "lcm", "det", "arg", "floor", "ceil", "abs")},
    **{f"arc{n}": f"arc{n}" for n in ("sin", "cos", "tan", "cot", "sec", "csc")},
    **{f"a{n}": f"arc{n}" for n in ("sin", "cos", "tan")},
    **{f"ar{h}": f"arc{n}" for h, n in (("sinh", "sinh"), ("cosh", "cosh"), ("tanh", "tanh"))},
    **{f"arc{n}": f"arc{n}" for n in ("sinh", "cosh", "tanh")},
    "lg": "log10", "sgn": "sgn", "sign": "sgn", "Re": "re", "Im": "im", "cosec": "csc", "arctg": "arctan", "tg": "tan",
    "ctg": "cot",
    "abs": "abs", "ceiling": "ceil", "binom": "binom", "gcf": "gcd", "hcf": "gcd", "log10": "log10", "cbrt": "cbrt",
}  # fmt: skip
INVERSE = {
    "sin": "arcsin", "cos": "arccos", "tan": "arctan", "cot": "arccot", "sec": "arcsec", "csc": "arccsc",
    "sinh": "arcsinh", "cosh": "arccosh", "tanh": "arctanh",
}  # fmt: skip
GREEK = frozenset(
    (
        "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho varrho sigma "
        "tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar "
        "imath jmath aleph"
    ).split()
)
_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
NUMBERS = {w: i for i, w in enumerate((_ONES + " seventeen eighteen nineteen").split())}
_TENS = {w: 10 * (i + 2) for i, w in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split())}
NUMBERS |= _TENS | {
    f"{t}-{o}": v + i for t, v in _TENS.items() for i, o in enumerate(_ONES.split()[1:10], start=1)
}  # fmt: skip
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

_UNITS = {
    "%": "% percent pct percentage percents",
    "$": "$ dollar dollars usd us$ bucks euro euros eur pound-sterling gbp yen rupee rupees",
    "cent": "cent cents ¢",
    "deg": "degree degrees deg °",
    "degC": "°c celsius degc", "degF": "°f fahrenheit degf",
    "rad": "radian radians rad rads",
    "mm": "mm millimeter millimeters millimetre millimetres", "cm": "cm centimeter centimeters centimetre centimetres",
    "dm": "dm decimeter decimeters decimetre", "m": "m meter meters metre metres",
    "km": "km kilometer kilometers kilometre kilometres kms", "in": "in inch inches", "ft": "ft foot feet",
    "yd": "yd yds yard yards", "mi": "mi mile miles", "mg": "mg milligram milligrams", "g": "g gm gram grams gms",
    "kg": "kg kgs kilogram kilograms kilo kilos", "lb": "lb lbs pound pounds", "oz": "oz ounce ounces",
    "ton": "ton tons tonne tonnes", "ml": "ml milliliter milliliters millilitre millilitres",
    "l": "l liter liters litre litres", "gal": "gal gallon gallons", "s": "s sec secs second seconds",
    "min": "min mins minute minutes", "h": "h hr hrs hour hours", "day": "day days", "week": "week weeks wk wks",
    "month": "month months", "year": "year years yr yrs", "acre": "acre acres", "ha": "hectare hectares",
    "J": "joule joules", "kJ": "kj kilojoule kilojoules", "W": "watt watts", "kW": "kw kilowatt kilowatts",
    "N": "newton newtons", "Pa": "pascal pascals", "V": "volt volts", "A": "ampere amperes amp amps",
    "Hz": "hz hertz", "unit": "unit units u", "mol": "mol mole moles", "mi/h": "mph", "km/h": "kmh kph kmph",
    "person": "person persons people", "child": "child children", "man": "man men", "woman": "woman women",
    "penny": "penny pennies pence", "mouse": "mouse mice", "tooth": "tooth teeth",
    "leaf": "leaf leaves", "die": "die dice", "vertex": "vertex vertices", "goose": "goose geese",
}  # fmt: skip
UNITS = {word: unit for unit, words in _UNITS.items() for word in words.split()}
BARE_UNITS = frozenset(w for w in UNITS if len(w) > 1)  # without \text a lone letter is a variable

# A phrase, in lower case and without punctuation, that stands for a set or a value.
PHRASES = {
    **dict.fromkeys(
        (
            "no solution", "no solutions", "there is no solution", "there are no solutions", "none", "empty set",
            "the empty set", "no real solution", "no real solutions", "null set", "no roots", "no real roots",
            "has no solution", "no such number", "no values", "no value",
        ), "0"),
    **dict.fromkeys(
        ("all real numbers", "all reals", "all real", "the set of all real numbers", "any real number", "real numbers",
         "all real number", "every real number", "the real numbers", "all real values", "set of all real numbers"),
        "R"),
    **dict.fromkeys(("all integers", "any integer", "the set of all integers", "the integers", "integers"), "Z"),
    **dict.fromkeys(("all complex numbers",), "C"),
    **dict.fromkeys(("all positive integers", "positive integers", "all natural numbers", "natural numbers"), "N"),
}  # fmt: skip

AND, OR = frozenset({"and", "&"}), frozenset({"or"})
EQUALS = frozenset({"is", "are", "equals", "equal to", "is equal to", "was", "be", "equal"})
# Around a value these change what is said: no phrase with one of them is dropped, nor read as a unit.
CHANGING = frozenset(
    (
        "not no never neither nor or and but except without less more than least most fewer greater smaller larger "
        "between over under above below minus plus times half twice double triple third quarter negative positive "
        "either maybe perhaps possibly if when unless until before after cannot can't isn't undefined unknown infinity "
        "infinite divided multiplied root power log incorrect wrong false true odd even "
        "up to factorial factorials dozen dozens halves thirds quarters fourths fifths sixths sevenths eighths ninths "
        "tenths hundredths thousandths tens hundreds thousands"
    ).split()
)
# Words that may stand before a value and say nothing.
LEADING = frozenset(
    (
        "the a an answer final is are so thus hence therefore we get have it result value total sum number of "
        "solution solutions equals equal be about approximately roughly approx exactly our this that which gives "
        "find will there final: answer: ans solution: only just a maximum minimum largest smallest"
    ).split()
)
# Everyday words of up to three letters that are no product of variables.
SHORT_WORDS = frozenset(
    (
        "is the not no yes for all to of if at an or and one two six ten are was can has its our any out day per odd "
        "by as so be it we he on in"
    ).split()
)

_PER = re.compile(r"\s*(?:/|\bper\b|\ban?\b)\s*")
_POWER = re.compile(r"\^?\{?(\d)\}?$")


def unit(text: str) -> str | None:
    """The normal form of a unit: "square centimeters", "sq cm", "cm^2" -> "cm^2"; "miles per hour" -> "mi/h"; other
    nouns in lower case and singular. None where the words say more than a unit, and for the empty text."""
    for sign, plain in (("~", " "), ("\\,", " "), ("\\", " "), ("{", ""), ("}", "")):
        text = text.replace(sign, plain)
    text = " ".join(text.split()).strip(" .,;")
    if not text or len(text) > 60 or any(c.isdigit() for c in re.sub(r"\^?\d$|\^?\d(?=[ /])", "", text)):
        return None
    parts = [_one_unit(part) for part in _PER.split(text) if part.strip()]
    if not parts or any(part is None for part in parts):
        return None
    return "/".join(part for part in parts if part)


def _one_unit(text: str) -> str | None:
    words = text.split()
    lowered = [w.lower() for w in words]
    if any(w.strip("().:'") in CHANGING or w in NUMBERS or w in SCALES for w in lowered):
        return None
    power = ""
    for square, p in ((("square", "sq", "sq.", "squared"), "^2"), (("cubic", "cu", "cubed"), "^3")):
        if any(w in square for w in lowered) and len(words) > 1:
            words = [w for w in words if w.lower() not in square]
            power = p
    if not words or lowered in (["squared"], ["cubed"], ["square"], ["cubic"]):
        return None
    last = words[-1]
    found = _POWER.search(last)
    if found and found.start() > 0:
        power, last = f"^{found[1]}", last[: found.start()]
    name = UNITS.get(last) or UNITS.get(last.lower())
    if name is None or len(words) > 1:
        plain = [w.lower() for w in [*words[:-1], last] if w.lower() not in ("the", "a", "of", "different")]
        name = " ".join(_singular(w) for w in plain)
        name = UNITS.get(name, name)
    return name + power


def _singular(word: str) -> str:
    if word in UNITS:
        return UNITS[word]
    if len(word) > 3 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    return word[:-1] if len(word) > 2 and word.endswith("s") and not word.endswith("ss") else word
