"""Second answers behind a reworded problem: the four cases, what is asked, and the update."""

import dataclasses

import pytest
import torch

from pymathrl.algos import acre
from pymathrl.algos.acre import Config, reward, trace_of
from pymathrl.config import parse_train
from pymathrl.errors import UserError
from pymathrl.tasks import Problem, load_task
from pymathrl.train import main
from tests.algos.cases import check_gradient, context, graded, make_batch, move, sampled, with_rewards
from tests.tiny import SMALL_RUN, save_tiny, tiny_policy


def test_the_four_cases():
    first, second = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    assert reward(first, second, Config()).tolist() == pytest.approx([1.0, 0.5, 0.2, 0.0])
    own = Config(acre_both=2.0, acre_first=1.0, acre_second=0.75, acre_none=-0.5)
    assert reward(first, second, own).tolist() == [2.0, 1.0, 0.75, -0.5]


def test_the_trace_stops_before_the_last_closed_answer():
    assert trace_of("3+4=7</think><answer>3+4</answer>") == "3+4=7</think>"
    assert trace_of("<answer>1</answer> no: <answer>2</answer>..") == "<answer>1</answer> no: "
    assert trace_of("3+4=7</think><answer>3+4") is None and trace_of("</answer>") is None and trace_of("") is None


class Scripted:
    """An engine that writes what it is told, and keeps what it was asked."""

    def __init__(self, ctx, answers):
        self.ctx, self.answers, self.asked = ctx, answers, []

    def generate(self, prompts, n, limit, **options):
        assert n == 1 and options["temperature"] == 0.0 and options["stop_strings"] == ("</answer>",)
        tokenizer = self.ctx.policy.tokenizer
        self.asked += [tokenizer.decode(p) for p in prompts]
        made = graded([[0.0]] * len(prompts), [[len(tokenizer.encode(a))] for a in self.answers]).rollout
        ids = [i for a in self.answers for i in (1, *tokenizer.encode(a))]
        return dataclasses.replace(made, ids=torch.tensor(ids))


def test_rewards_of_countdown_rows(monkeypatch):
    """Numbers 3 4 5, target 17: right both times, right then wrong, wrong then right, wrong, and no answer."""
    ctx = context("acre")
    problem = Problem(7, "3 4 5 -> 17", "17", {"nums": (3, 4, 5), "target": 17})
    right, wrong = "3*4=12,12+5=17</think><answer>(3*4)+5</answer>", "3+4=7</think><answer>3+4+5</answer>"
    texts = [right, right.replace("3*4=12", "4*3=12"), wrong, wrong.replace("3+4=7", "4+3=7"), "3+4"]
    rewards = [1.0, 1.0, 0.1, 0.1, 0.0]
    rows = graded([rewards], texts=texts)
    rows = dataclasses.replace(rows, problems=[problem], grades=[ctx.task.grade(problem, t) for t in texts])
    engine = Scripted(ctx, ["(4*3)+5</answer>", "5+4+3</answer>", "5+3*4</answer>", "3+4+5</answer>"])
    monkeypatch.setattr(ctx.learner, "engine", engine)
    judged = acre.judge(ctx, rows)
    assert judged.reward.tolist() == pytest.approx([1.0, 0.5, 0.3, 0.1, 0.0])
    assert judged.correct.tolist() == [True, True, False, False, False]  # the verdict is that of the first answer
    for asked, text in zip(engine.asked, texts, strict=False):
        prompt, trace = asked.split("\n<think>")
        numbers = [int(x) for x in prompt.split(" ->")[0].split()]
        assert sorted(numbers) == [3, 4, 5] and numbers != [3, 4, 5] and prompt.endswith("-> 17")
        assert trace == trace_of(text) + "<answer>"
    assert len(engine.asked) == 4
    assert ctx.metrics["acre/unchanged"] == pytest.approx(2 / 4)  # (3*4)+5 again, 3+4+5 again
    assert ctx.metrics["acre/agreement"] == pytest.approx(2 / 4)
    assert ctx.metrics["acre/second_accuracy"] == pytest.approx(2 / 4)


def test_options_are_compared_by_content(monkeypatch, tmp_path):
    """Gold 5: the letter that now stands before 5 is right again, the letter of before is not."""
    ctx = context("acre")
    file = tmp_path / "choice.jsonl"
    file.write_text('{"question": "7-2 = ?", "answer": "5", "options": ["3", "5", "7", "9"]}\n')
    task = load_task(file, split="all")
    orders = []

    class Spelled:
        grade = task.grade

        def reword(self, problem, rng):
            orders.append(task.reword(problem, rng).meta["options"])
            return dataclasses.replace(problem, meta={**problem.meta, "options": ("9", "7", "5", "3")})

        def prompt(self, problem, style):  # the built-in vocabulary has no letters
            return f"{problem.question} {' '.join(problem.meta['options'])}\n<think>"

    ctx.task = Spelled()
    rows = graded([[1.0, 1.0]], texts=["7-2=5<answer>B</answer>", "2+5=7<answer>B</answer>"])
    rows = dataclasses.replace(rows, problems=task.test())
    engine = Scripted(ctx, ["3</answer>", "2</answer>"])
    monkeypatch.setattr(ctx.learner, "engine", engine)
    # what the engine wrote, as letters
    monkeypatch.setattr(ctx.policy.tokenizer, "decode_batch", lambda rows: ["C</answer>", "B</answer>"])
    assert acre.judge(ctx, rows).reward.tolist() == [1.0, 0.5]
    assert all(text.startswith("7-2 = ? 9 7 5 3\n") for text in engine.asked)
    assert all(sorted(order) == ["3", "5", "7", "9"] and order != ("3", "5", "7", "9") for order in orders)


def test_a_problem_with_one_wording_keeps_its_answer():
    ctx = context("acre")
    problem = Problem(0, "5 5 -> 10", "10", {"nums": (5, 5), "target": 10})
    text = "5+5=10</think><answer>5+5</answer>"
    rows = dataclasses.replace(graded([[1.0]], texts=[text]), problems=[problem],
                               grades=[ctx.task.grade(problem, text)])  # fmt: skip
    assert acre.judge(ctx, rows).reward.tolist() == [1.0]


def test_the_second_pass_is_a_function_of_the_rows():
    policy = tiny_policy(seed=3)
    ctx = context("acre", policy=policy)
    text = "4*3=12</think><answer>(3*4)+5</answer>"
    problem = Problem(7, "3 4 5 -> 17", "17", {"nums": (3, 4, 5), "target": 17})
    rows = dataclasses.replace(graded([[1.0, 1.0]], texts=[text, text]), problems=[problem])
    one, two = acre.second_answers(ctx, rows)
    assert one == two  # equal responses are asked once
    assert acre.second_answers(ctx, rows)[0] == one


def test_gradient_is_that_of_grpo_on_the_new_rewards():
    policy = tiny_policy(seed=3)
    ctx = context("acre", "--temperature", "0.9", policy=policy)
    batch = make_batch(ctx, with_rewards(sampled(policy), torch.tensor([1.0, 0.5, 0.3, 0.1, 0.0, 0.2, 1.0, 0.1])))
    move(policy)

    def loss(rows):
        terms = [torch.minimum(r.ratio * r.advantage, r.ratio.clamp(0.8, 1.2) * r.advantage).mean() for r in rows]
        return -torch.stack(terms).mean()

    check_gradient(ctx, batch, loss)


def test_coefficients_out_of_order_are_refused():
    with pytest.raises(UserError, match="expected --acre-both >= --acre-first"):
        parse_train(["--algo", "acre", "--acre-second", "0.7"])


def test_a_short_run(tmp_path):
    out = tmp_path / "run"
    assert main(["--algo", "acre", "--model", str(save_tiny(tmp_path / "model")), "--steps", "2", "--out", str(out),
                 *SMALL_RUN]) == 0  # fmt: skip


@pytest.mark.parametrize(
    "trace, kept",
    [
        ("Both are even. 2+3=5, so B.</think>\n", "Both are even. </think>"),
        ("It is 5.\nThe answer is (B)", "It is 5.\n"),
        ("It is 5. So five.</think>", "It is 5. So five.</think>"),
        ("It is 5. So E.</think>", "It is 5. So E.</think>"),  # no letter of these four
        ("So B.</think>", "So B.</think>"),  # nothing would be left
        ("2 A 3. So 3.5 it is", "2 A 3. So 3.5 it is"),
    ],
)
def test_a_letter_at_the_end_of_a_thought_is_not_put_again(trace, kept):
    assert acre.without_letter(trace, 4) == kept
