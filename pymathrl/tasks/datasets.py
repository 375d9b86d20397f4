"""The data sets that are known by name: where their questions and answers stand, and how they are asked and graded.

A record adds no code: a set of the same kind is one more entry. Names of fields are tried in their order, and are paths
into nested ones where a dot or an index stands in them. Problem texts of contests may carry rights of the organisers
beside the licence that the authors of a set state.
"""

from dataclasses import dataclass, field

from pymathrl.tasks.templates import MGSM_PHRASES
from pymathrl.verify.policy import Policy

EXACT = Policy()


@dataclass(frozen=True)
class DataSet:
    """question, gold     fields, the first that a row has
    form                  how the gold answer stands in its field, a name of `golds.FORMS`
    solution              field of a worked solution
    template              a name of `templates.TEMPLATES`; "{subset}" is replaced
    metric                what is reported, after the set's paper or its usual evaluation
    hub                   the repository on the Hugging Face hub; config: words in the paths of its files that are meant
    rows                  of each split, as published
    subsets               parts with files of their own, known as NAME-SUBSET; NAME alone is all of them
    benchmark             for evaluation alone: nothing is held out, and nothing is trained on unless split says so
    distinct              a field; of rows that agree in it the first is kept. "question": questions but for blanks
    columns               of a table without a header
    several               a list of gold answers is "all" to be given, or "any" one of them
    kind                  "equal": by equality of answers; "mathcheck", "steps" and "wrapped": see `questions`
    policy                of equality
    """

    question: tuple[str, ...]
    gold: tuple[str, ...]
    licence: str
    rows: dict[str, int]
    hub: str = ""
    config: str = ""
    form: str = "whole"
    solution: tuple[str, ...] = ()
    template: str = "qwen_boxed_user"
    metric: str = "pass@1"
    subsets: tuple[str, ...] = ()
    benchmark: bool = False
    distinct: str = ""
    columns: tuple[str, ...] = ()
    several: str = "any"
    kind: str = "equal"
    policy: Policy = field(default=EXACT)


DATASETS: dict[str, DataSet] = {
    "gsm8k": DataSet(
        ("question",), ("answer",), "MIT", {"train": 7473, "test": 1319}, hub="openai/gsm8k", config="main",
        form="marked", solution=("answer",), template="verl_gsm8k",
    ),
    "math": DataSet(  # 2 of its rows have no answer, 2 repeat a question; MATH-500 is drawn from the test split
        ("problem",), ("answer", "solution"), "MIT", {"train": 7500}, hub="EleutherAI/hendrycks_math", form="guess",
        solution=("solution",), distinct="question",
    ),
    "math500": DataSet(
        ("problem",), ("answer",), "MIT", {"test": 500}, hub="HuggingFaceH4/MATH-500", solution=("solution",),
        benchmark=True,
    ),
    "aime24": DataSet(
        ("problem", "question"), ("answer", "solution"), "MIT (problem text MAA)", {"test": 30}, hub="math-ai/aime24",
        form="guess", benchmark=True, metric="avg@32",
    ),
    "aime25": DataSet(
        ("input", "problem", "question"), ("output", "answer"), "Apache-2.0 (problem text MAA)", {"test": 30},
        hub="math-ai/aime25", benchmark=True, metric="avg@32",
    ),
    "amc23": DataSet(
        ("problem", "question"), ("answer",), "MIT (problem text MAA)", {"test": 40}, hub="math-ai/amc23",
        benchmark=True, metric="avg@32",
    ),
    "olympiadbench": DataSet(
        ("question",), ("final_answer",), "Apache-2.0", {"test": 675}, hub="Hothan/OlympiadBench",
        config="OE_TO_maths_en_COMP", solution=("solution[0]",), benchmark=True,
    ),
    "olymmath": DataSet(
        ("problem",), ("answer",), "MIT", {"test": 400}, hub="RUC-AIBOX/OlymMATH", template="olymmath_{subset}",
        subsets=("en-easy", "en-hard", "zh-easy", "zh-hard"), benchmark=True, metric="avg@8",
    ),
    "mgsm": DataSet(
        ("question",), ("answer_number", "answer"), "CC-BY-4.0", {"test": 250 * len(MGSM_PHRASES)},
        hub="juletxara/mgsm", template="mgsm_{subset}", subsets=tuple(MGSM_PHRASES), benchmark=True,
        columns=("question", "answer_number"),
    ),
    "mathcheck_gsm": DataSet(
        ("question",), ("answer",), "CC-BY-4.0", {"test": 3096}, hub="PremiLab-Math/MathCheck", config="gsm",
        template="as_is", benchmark=True, kind="mathcheck", metric="mathcheck",
    ),
    "math_beyond": DataSet(
        ("problem", "question", "prompt"), ("answer", "gold", "ground_truth", "final_answer"), "MIT", {"test": 181},
        hub="brendel-group/MATH-Beyond", benchmark=True, distinct="question", metric="expansion",
    ),
    "dapo17k": DataSet(
        ("prompt[0].content", "problem", "question"), ("reward_model.ground_truth", "answer", "solution"), "Apache-2.0",
        {"train": 17398}, hub="BytedTsinghua-SIA/DAPO-Math-17k", template="dapo_answer", distinct="extra_info.index",
        kind="wrapped",
    ),
    "deepscaler": DataSet(
        ("problem",), ("answer",), "MIT", {"train": 40315}, hub="agentica-org/DeepScaleR-Preview-Dataset",
        solution=("solution",), distinct="question",
    ),
    # Numbers of limited precision, with units, compared as its authors do: not for training.
    "minerva": DataSet(
        ("problem",), ("answer", "solution"), "not stated (MIT OpenCourseWare)", {"test": 272},
        hub="math-ai/minervamath", form="guess", solution=("solution",), benchmark=True,
        policy=Policy(decimal_round=True, rel_tol=1e-2),
    ),
    "hmmt_feb25": DataSet(
        ("problem",), ("answer",), "CC BY-NC-SA 4.0", {"test": 30}, hub="MathArena/hmmt_feb_2025", benchmark=True,
        metric="avg@32",
    ),
    "brumo25": DataSet(
        ("problem",), ("answer",), "CC BY-NC-SA 4.0", {"test": 30}, hub="MathArena/brumo_2025", benchmark=True,
        metric="avg@32",
    ),
    "omni_math": DataSet(
        ("problem",), ("answer",), "Apache-2.0", {"test": 4428}, hub="KbsdJames/Omni-MATH", solution=("solution",),
        benchmark=True,
    ),
    "processbench": DataSet(
        ("problem",), ("label",), "Apache-2.0", {"test": 3400}, hub="Qwen/ProcessBench",
        subsets=("gsm8k", "math", "olympiadbench", "omnimath"), benchmark=True, kind="steps", metric="process_f1",
    ),
}  # fmt: skip
