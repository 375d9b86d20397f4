"""Problems that reasoning-gym (github.com/open-thought/reasoning-gym) generates without end: ``rg:chain_sum``.

Only its generators are used, never its scorer, which pays for answers that contain the gold one. So a family is here if
it states one answer that can be compared exactly: a number or a formula by its value, anything else letter by letter.
"""

import dataclasses
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from pymathrl.errors import UserError, nearest
from pymathrl.tasks.generated import Generated, checked_template, grade_text
from pymathrl.tasks.problem import Check, Grade, Problem
from pymathrl.tasks.questions import grade_equal, without_clothes
from pymathrl.verify import Result
from pymathrl.verify.policy import Policy

ITEMS = 2**31  # the seeds of a family's problems are drawn below this

# The answer is a number or a formula, compared by value.
VALUE = (
    "aiw", "basic_arithmetic", "binary_alternation", "chain_sum", "circuit_logic", "complex_arithmetic", "count_bits",
    "count_primes", "decimal_chain_sum", "dice", "fraction_simplification", "gcd", "gsm_symbolic", "largest_island",
    "lcm", "leg_counting", "letter_counting", "maze", "number_sequence", "polynomial_multiplication", "products",
    "rectangle_count", "rotten_oranges", "self_reference", "simple_equations", "simple_geometry",
)  # fmt: skip
SEEDED = ("gsm_symbolic",)  # a problem is drawn by the seed of its data set, which has one: a table would be too large
# The answer is one word, whatever its case.
WORD = (
    "base_conversion", "bitwise_arithmetic", "color_cube_rotation", "course_schedule", "family_relationships",
    "game_of_life_halting", "isomorphic_strings", "mahjong_puzzle", "needle_haystack", "ransom_note", "syllogism",
    "zebra_puzzles",
)  # fmt: skip
# The answer is a text of which every letter counts.
LITERAL = ("bf", "caesar_cipher", "figlet_font", "spell_backward", "string_insertion", "string_manipulation")
REFUSED = {
    "its answer is a grid, a list or several lines, which one text of an answer does not state exactly": (
        "arc_1d", "arc_agi", "binary_matrix", "game_of_life", "group_anagrams", "list_functions", "manipulate_matrix",
        "modulo_grid", "number_filtering", "number_sorting", "pool_matrix", "rearc", "rotate_matrix", "spiral_matrix",
        "string_splitting", "string_synthesis", "survo", "word_sequence_reversal", "word_sorting",
    ),
    "many answers are right, and its own scorer would have to decide": (
        "ab", "boxnet", "codeio", "countdown", "cryptarithm", "emoji_mystery", "futoshiki", "graph_color", "jugs",
        "kakurasu", "knight_swap", "knights_knaves", "letter_jumble", "mini_sudoku", "n_queens",
        "palindrome_generation", "palindrome_partitioning", "path_star", "propositional_logic", "puzzle24",
        "quantum_lock", "rubiks_cube", "rush_hour", "sentence_reordering", "shortest_path", "sokoban", "sudoku",
        "tower_of_hanoi", "tsumego", "word_ladder",
    ),
    "an antiderivative is right with any constant": ("intermediate_integration", "simple_integration"),
    "its answers are rounded, so that an exact one is not the gold": (
        "advanced_geometry", "coin_flip", "decimal_arithmetic", "number_format", "polynomial_equations",
        "power_function",
    ),
    "it makes all its problems at once, in a third of a second each": ("acre",),
    "its answers are times, dates or days of several forms": ("calendar_arithmetic", "time_intervals"),
    "the value of its answer, a product, is the number that the problem gives": ("prime_factorization",),
    "it mixes other families, which are tasks of their own": ("composite",),
}  # fmt: skip
_REASON = {family: reason for reason, families in REFUSED.items() for family in families}


@dataclass(frozen=True)
class Gym(Generated):
    """A family of reasoning-gym; settings: options of its configuration."""

    prefix: ClassVar[str] = "rg"

    def draw(self, uid: int, rng: random.Random) -> Problem:
        return _draw(self, uid, rng.randrange(ITEMS))

    def key(self, problem: Problem) -> str:
        return f"{self.name}:{problem.question}"

    def check(self, problem: Problem) -> Check:
        # the value of many a question is the answer: "evaluated" is what is left for a model to do
        return Check((problem.answer,), self.mode, Policy(require_form="evaluated" if self.family in VALUE else ""))

    def grade_result(self, problem: Problem, response: str, result: Result) -> Grade:
        if self.family in VALUE or result.extracted is None:
            return grade_equal(problem, result, self.format_score)
        fold = str.casefold if self.family in WORD else str
        return grade_text(fold(problem.answer), fold(without_clothes(result.extracted)), result)


def gym_task(
    family: str,
    *,
    answer: str = "template",
    template: str = "auto",
    format_score: float = 0.0,
    settings: str = "none",
) -> Gym:
    """The task of a family. settings: name=value, separated by commas, of its configuration in reasoning-gym."""
    name = f"rg:{family}"
    families = (*VALUE, *WORD, *LITERAL)
    if family in _REASON:
        raise UserError(f"task {name}: this family is not graded exactly: {_REASON[family]}; use another one")
    if family not in families:
        raise UserError(f"task {name}: unknown family: {nearest(family, families)}")
    template = checked_template(name, answer, template, format_score)
    task = Gym(family, _settings(name, family, settings), template, answer, format_score)
    _dataset(task, 0)  # what its configuration refuses is refused here
    return task


def _factory(name: str) -> Any:
    try:
        from reasoning_gym import factory
    except ImportError:
        raise UserError(
            f"task {name}: its problems are made by reasoning-gym, which is not installed; run pip install "
            "'pymathrl[rg]'"
        ) from None
    return factory


def _settings(name: str, family: str, text: str) -> tuple[tuple[str, Any], ...]:
    """Numbers, true, false and texts of the configuration, by their types there."""
    config: Any = _factory(name).DATASETS[family][1]
    kinds: dict[str, Any] = {
        f.name: type(f.default) for f in dataclasses.fields(config) if f.name not in ("seed", "size")
    }
    kinds = {key: kind for key, kind in kinds.items() if kind in (bool, int, float, str)}
    values: dict[str, Any] = {}
    for part in text.split(",") if text != "none" else ():
        key, _, value = (word.strip() for word in part.partition("="))
        if key not in kinds:
            raise UserError(f"task {name}: settings has no {key!r}: {nearest(key, kinds)}")
        try:
            values[key] = {"true": True, "false": False}[value] if kinds[key] is bool else kinds[key](value)
        except (KeyError, ValueError):
            raise UserError(f"task {name}: settings {key} must be {kinds[key].__name__}, got {value!r}") from None
    return tuple(sorted(values.items()))


@lru_cache(maxsize=8)
def _dataset(task: Gym, seed: int) -> Any:
    factory = _factory(task.name)
    try:
        return factory.create_dataset(task.family, seed=seed, size=1, **dict(task.settings))
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"task {task.name}: reasoning-gym refuses the settings: {error}") from None


def _draw(task: Gym, uid: int, item: int) -> Problem:
    entry = _dataset(task, item)[0] if task.family in SEEDED else _dataset(task, 0)[item]
    answer = str(entry["answer"]).strip().strip("$")
    return Problem(uid, str(entry["question"]).strip(), answer, {"item": item})
