"""Prompt templates: how a question is put to a model, and where its answer is to stand.

A template has words for the user's message of a chat model and, where a base model is asked otherwise, a text for it to
continue. ``{question}`` is the place of the question; other braces stand for themselves. The public ones are those that
published results were reached with; the examples of the few-shot ones are our own.
"""

from dataclasses import dataclass

from pymathrl.errors import UserError, nearest
from pymathrl.tasks.prompt_style import STYLES, instruct

SLOT = "{question}"


@dataclass(frozen=True)
class Template:
    """user: the message of the user. system: the message before it, "" for the model's own. plain: the text that a
    base model continues; "" for the dialogue of `instruct` around the user's message. mode: how the answer is read, a
    mode of `verify.extract`. stop: texts that end a response; what they complete belongs to it."""

    user: str
    mode: str
    system: str = ""
    plain: str = ""
    stop: tuple[str, ...] = ()

    def prompt(self, question: str, style: str) -> str:
        """style "chat": the user's message. "plain": a text to continue. "compact": the short form of the built-in
        model, the same under every template."""
        if style == "compact":
            return f"{question}\n<think>"
        if style not in STYLES:
            raise UserError(f"unknown prompt style {style!r}: {nearest(style, STYLES)}")
        if style == "plain" and self.plain:
            return self.plain.replace(SLOT, question)
        return instruct(self.user.replace(SLOT, question), style)


BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
BOXED_ZH = "请逐步推理，并将最终答案放在 \\boxed{} 中。"  # noqa: RUF001

GSM8K_SHOTS = (
    ("A baker fills 6 trays with 8 rolls each and sells 31 rolls before noon. How many rolls are left?",
     "The baker has 6 * 8 = 48 rolls. After noon 48 - 31 = 17 rolls are left.", "17"),
    ("Tickets cost 12 dollars for adults and half of that for children. What do 3 adults and 4 children pay together?",
     "A child pays 12 / 2 = 6 dollars. The adults pay 3 * 12 = 36 dollars and the children 4 * 6 = 24 dollars. "
     "Together that is 36 + 24 = 60 dollars.", "60"),
    ("Noor reads 15 pages on Monday, twice as many on Tuesday and 5 fewer than on Tuesday on Wednesday. How many pages "
     "does she read in the three days?",
     "On Tuesday she reads 2 * 15 = 30 pages, on Wednesday 30 - 5 = 25. In all she reads 15 + 30 + 25 = 70 pages.",
     "70"),
    ("A tank holds 240 litres. A pump takes out 9 litres a minute for 20 minutes. How many litres stay in the tank?",
     "The pump takes out 9 * 20 = 180 litres. So 240 - 180 = 60 litres stay in the tank.", "60"),
    ("A class of 28 pupils splits into groups of 4, and each group gets 3 sheets of paper. How many sheets are needed?",
     "There are 28 / 4 = 7 groups. They need 7 * 3 = 21 sheets.", "21"),
)  # fmt: skip

MINERVA_SHOTS = (
    ("For which values of $x$ is the expression $\\sqrt{7-2x}$ a real number? Give your answer as an interval.",
     "The number under the root must not be negative: $7-2x \\ge 0$, so $x \\le \\frac{7}{2}$. That is the interval "
     "$\\left(-\\infty,\\frac{7}{2}\\right]$.", "\\left(-\\infty,\\frac{7}{2}\\right]"),
    ("Let $A$ be a $2 \\times 2$ matrix with $\\det A = 5$. Find $\\det(3A)$.",
     "Each of the two rows is multiplied by $3$, so the determinant is multiplied by $3^2 = 9$. "
     "Hence $\\det(3A) = 9 \\cdot 5 = 45$.", "45"),
    ("A fair die is thrown twice. What is the probability that the second throw is larger than the first?",
     "Of the $36$ outcomes $6$ have two equal throws. Of the other $30$ half have the larger throw second, which are "
     "$15$. The probability is $\\frac{15}{36} = \\frac{5}{12}$.", "\\frac{5}{12}"),
    ("If $3a+2b=16$ and $a-b=2$, what is $ab$?",
     "From the second equation $a = b+2$. Then $3(b+2)+2b = 16$, so $5b = 10$, $b = 2$ and $a = 4$. Thus $ab = 8$.",
     "8"),
)  # fmt: skip

# The phrase that each language of MGSM (arXiv 2210.03057) ends an answer with; Bengali rows were published with the
# English one.
MGSM_PHRASES = {
    "bn": "The answer is {n}.", "de": "Die Antwort lautet {n}.", "en": "The answer is {n}.",
    "es": "La respuesta es {n}.", "fr": "La réponse est {n}.", "ja": "答えは{n}です。", "ru": "Ответ — {n}.",
    "sw": "Jibu ni {n}.", "te": "సమాధానం {n}.", "th": "คำตอบคือ {n}", "zh": "答案是 {n}。",
}  # fmt: skip


def _gsm8k_shots() -> str:
    shots = "".join(f"Question: {q}\nAnswer: {worked}\n#### {n}\n\n" for q, worked, n in GSM8K_SHOTS)
    return f"{shots}Question: {SLOT}\nAnswer:"


def _minerva_shots() -> str:
    shots = "".join(
        f"Problem:\n{q}\n\nSolution:\n{worked}\nFinal Answer: The final answer is ${n}$. I hope it is correct.\n\n"
        for q, worked, n in MINERVA_SHOTS
    )
    return f"{shots}Problem:\n{SLOT}\n\nSolution:"


def _mgsm(language: str) -> Template:
    phrase = MGSM_PHRASES[language].replace("{n}", "N")
    task = (
        f"{SLOT}\n\nReason step by step in the language of the question, and end with the sentence “{phrase}”, with "
        "the number that is the answer in the place of N."
    )
    return Template(task, "answer", plain=f"{task}\n\n")


TEMPLATES: dict[str, Template] = {
    "as_is": Template(SLOT, "answer", plain=f"{SLOT}\n\n"),  # for questions that say how to answer
    "tag": Template(
        f"{SLOT}\nReason step by step, and put the final answer between <answer> and </answer>.", "tag"
    ),
    "last": Template(
        f"{SLOT}\nReason step by step, and put the final number at the end, after 'The answer is'.", "last_number"
    ),
    "choice": Template(
        f"{SLOT}\nReason step by step, and put the letter of the right option between <answer> and </answer>.", "tag"
    ),
    # Qwen2.5-Math's evaluation
    "qwen_boxed_sys": Template(SLOT, "boxed", system=BOXED, plain=f"{BOXED}\n\nProblem:\n{SLOT}\n\nSolution:\n"),
    "qwen_boxed_user": Template(f"{SLOT}\n{BOXED}", "boxed", plain=f"{BOXED}\n\nProblem:\n{SLOT}\n\nSolution:\n"),
    # verl's examples, ROVER's and many others' training data
    "verl_boxed": Template(
        f"{SLOT} Let's think step by step and output the final answer within \\boxed{{}}.", "boxed",
        plain=f"{SLOT} Let's think step by step and output the final answer within \\boxed{{}}.\n",
    ),
    "verl_gsm8k": Template(
        f'{SLOT} Let\'s think step by step and output the final answer after "####".', "gsm8k",
        plain=f'{SLOT} Let\'s think step by step and output the final answer after "####".\n',
    ),
    # the dialogue of DeepSeek-R1-Zero in our words
    "r1_tag": Template(
        f"{SLOT}\nThink first, between <think> and </think>, then give the answer between <answer> and </answer>.",
        "tag",
        plain=(
            "In this conversation the User poses a problem and the Assistant solves it. The Assistant first thinks, "
            "between <think> and </think>, and then gives the User the answer, between <answer> and </answer>.\n"
            f"User: {SLOT}\nAssistant: <think>"
        ),
        stop=("</answer>",),
    ),
    # DAPO's data, in our words
    "dapo_answer": Template(
        "Solve the problem below step by step. The last line of your response is to be of the form Answer: $Answer, "
        f"where $Answer is the answer to the problem.\n\n{SLOT}\n\n"
        'Remember to put the answer on a line of its own after "Answer:".', "answer",
        plain=(
            "Solve the problem below step by step. The last line is to be of the form Answer: $Answer, where $Answer "
            f"is the answer to the problem.\n\n{SLOT}\n\n"
        ),
    ),
    # The few-shot forms of lm-evaluation-harness
    "lm_gsm8k_5shot": Template(_gsm8k_shots(), "gsm8k", plain=_gsm8k_shots(), stop=("Question:",)),
    "lm_minerva_4shot": Template(_minerva_shots(), "answer", plain=_minerva_shots(), stop=("Problem:",)),
    # OlymMATH: the instruction first, in the language of the problem
    "olymmath_en": Template(f"{BOXED}\n\n{SLOT}", "boxed", plain=f"{BOXED}\n\n{SLOT}\n\n"),
    "olymmath_zh": Template(f"{BOXED_ZH}\n\n{SLOT}", "boxed", plain=f"{BOXED_ZH}\n\n{SLOT}\n\n"),
    **{f"mgsm_{language}": _mgsm(language) for language in MGSM_PHRASES},
}  # fmt: skip


def find_template(name: str, where: str) -> Template:
    """UserError, which begins with `where`, for a name that is none."""
    if name not in TEMPLATES:
        raise UserError(f"{where}: unknown template {name!r}: {nearest(name, TEMPLATES)}")
    return TEMPLATES[name]
