"""Distillation: reverse KL and its gradient in float64, the start of a hybrid, whole runs, bad input."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pymathrl.checkpoint import hash_parameters
from pymathrl.distill import main
from pymathrl.models import Policy, load
from pymathrl.sft import distill as distill_module
from pymathrl.sft.distill import distillation_loss
from pymathrl.sft.rows import Example, pack
from tests.models.plain import plain_hidden
from tests.sft.test_sft import KILL, SMALL, command, data_file, distance, final_hash, some_rows
from tests.tiny import read_metrics, save_tiny, tiny_policy


def flat(policy: Policy) -> Tensor:
    return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])


def reference(student: Policy, teacher: Policy, rows: list[Example], kl_weight: float, ce_weight: float, mutant: str):
    """The loss row by row in float64, by autograd over plain torch: (KL, nll, gradient)."""
    ours = {n: p.detach().double().requires_grad_() for n, p in student.model.named_parameters()}
    theirs = {n: p.detach().double() for n, p in teacher.model.named_parameters()}
    kl = nll = torch.zeros((), dtype=torch.float64)
    norm = 0.0
    for row in rows:
        ids, mask = row.ids.long(), row.trained[1:]
        logp = (plain_hidden(student.config, ours, ids[:-1]) @ ours["head"].T).log_softmax(-1)
        other = (plain_hidden(teacher.config, theirs, ids[:-1]) @ theirs["head"].T).log_softmax(-1)
        each = (logp.exp() * (logp - other)).sum(-1)
        if mutant == "forward KL":
            each = (other.exp() * (other - logp)).sum(-1)
        if mutant == "context too":
            mask = torch.ones_like(mask)
        weight = 1.0 if mutant == "weight" else row.weight
        kl = kl + weight * each[mask].sum()
        nll = nll - weight * logp.gather(1, ids[1:, None])[:, 0][mask].sum()
        norm += weight * int(mask.sum())
    ((kl_weight * kl + ce_weight * nll) / norm).backward()
    gradient = torch.cat([ours[n].grad.flatten() for n, _ in student.model.named_parameters()])
    return kl.item() / norm, nll.item() / norm, gradient


def pair() -> tuple[Policy, Policy]:
    student, teacher = tiny_policy(seed=3, layers=3, hybrid=True), tiny_policy(seed=8)
    with torch.no_grad():
        for policy in (student, teacher):
            policy.model.head_weight.mul_(20)
    return student, teacher


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.5, 2.0)])
@pytest.mark.parametrize("budget", [1, 30, 10_000])
def test_gradient_is_that_of_the_reverse_kl(budget: int, weights: tuple[float, float], monkeypatch) -> None:
    """With chunks of three rows of logits."""
    monkeypatch.setattr(distill_module, "head_chunk_rows", lambda *_: 3)
    student, teacher = pair()
    rows = some_rows()
    before = [p.clone() for p in teacher.model.parameters()]
    made = distillation_loss(
        student, teacher, *pack(rows, torch.device("cpu")), budget, kl_weight=weights[0], ce_weight=weights[1]
    )
    kl, nll, gradient = reference(student, teacher, rows, *weights, mutant="")
    assert float(made.kl) == pytest.approx(kl, rel=1e-5) and float(made.nll) == pytest.approx(nll, rel=1e-5)
    assert kl > 0.3 and distance(flat(student), gradient) < 2e-5
    assert all(p.grad is None for p in teacher.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.model.parameters(), strict=True))


@pytest.mark.parametrize("mutant", ["forward KL", "context too", "weight"])
def test_the_comparison_rejects_wrong_losses(mutant: str) -> None:
    student, teacher = pair()
    distillation_loss(student, teacher, *pack(some_rows(), torch.device("cpu")), 1000)
    assert distance(flat(student), reference(student, teacher, some_rows(), 1.0, 0.0, mutant)[2]) > 1e-2


def test_a_copy_has_nothing_to_learn() -> None:
    teacher = tiny_policy(seed=3)
    student = tiny_policy(seed=3)
    made = distillation_loss(student, teacher, *pack(some_rows(), torch.device("cpu")), 1000)
    assert float(made.kl) == 0.0 and not bool(flat(student).any()) and float(made.nll) > 1


def test_a_token_that_both_rule_out_costs_nothing_and_one_that_only_the_teacher_rules_out_costs_its_logit() -> None:
    """Logits 120 apart: e^-120 is 0 in fp32."""
    hidden, targets, coef = torch.eye(2), torch.tensor([0, 0]), torch.tensor([1.0, 0.0])
    far = torch.tensor([[0.0, 0.0], [0.0, 0.0], [-120.0, 0.0]])

    def kl(weight: Tensor) -> Tensor:
        return distill_module._Head.apply(hidden, weight, hidden, far, targets, coef, 1.0, 0.0, torch.zeros(2))

    leaf = far.clone().requires_grad_()
    loss = kl(leaf)
    loss.backward()
    assert loss.item() == 0.0 and leaf.grad is not None and not bool(leaf.grad.any())
    # a student that is uniform: sum of 1/3 (ln 1/3 - ln 1/2), twice, and 1/3 (ln 1/3 + 120 + ln 2)
    expected = (2 * math.log(2 / 3) + math.log(2 / 3) + 120) / 3
    assert kl(torch.zeros(3, 2)).item() == pytest.approx(expected, rel=1e-5)


# --- runs -------------------------------------------------------------------------------------------------------------


def arguments(tmp_path: Path) -> list[str]:
    model = save_tiny(tmp_path / "model", layers=3)
    return ["--model", str(model), "--data", data_file(tmp_path / "a.jsonl"), *SMALL, "--lr", "3e-3"]


def test_a_run_makes_a_hybrid_that_grows_like_its_teacher(tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    argv = [*arguments(tmp_path), "--attention-layers", "2", "--steps", "30", "--warmup-steps", "2"]
    assert main([*argv, "--out", str(run)]) == 0
    out = capsys.readouterr().out
    assert "student: attention in layers 2, Mamba in the other 2" in out and "KL" in out
    kl = [m["teacher_kl"] for m in read_metrics(run) if "teacher_kl" in m]
    assert len(kl) == 30 and kl[-1] < 0.5 * kl[0]
    made = load(run / "checkpoints" / "step-30")
    assert made.config.mamba is not None and made.config.mamba.attention_layers == (2,)
    assert made.config.mamba.base == str(tmp_path / "model")
    # and on from there, with the teacher named
    again = [*argv[2:4], *SMALL, "--model", str(run / "checkpoints" / "step-30"), "--steps", "1"]
    assert main([*again, "--teacher", str(tmp_path / "model"), "--out", str(tmp_path / "more")]) == 0
    assert json.loads((tmp_path / "more" / "summary.json").read_text())["algo"] == "distill"


def test_kill_then_resume_gives_the_same_bits(tmp_path: Path) -> None:
    argv = ["--mode", "distill", *arguments(tmp_path), "--steps", "6", "--checkpoint-every", "2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, text = command(*argv, "--out", str(whole), driver="")
    assert code == 0, text
    code, text = command(*argv, "--out", str(killed), driver=KILL.format(call=6))
    assert code == -signal.SIGKILL, text
    assert main(["--resume", str(killed)]) == 0
    assert final_hash(killed, 6) == final_hash(whole, 6)
    assert hash_parameters(load_file(tmp_path / "model" / "model.safetensors").items()) != final_hash(whole, 6)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--attention-layers", "one"], ["--attention-layers: expected numbers like 3,8,13, got 'one'"]),
        (["--attention-layers", "7"], ["attn_layers must be different numbers in 0..1, got [7]"]),
        (["--attention-layers", "0,1"], ["attn_layers names every layer"]),
        (["--kl-weight", "0"], ["--kl-weight and --ce-weight are both 0"]),
        (["--teacher", "/nowhere/t"], ["/nowhere/t"]),
        (["--average-of", "MODEL,MODEL"], ["--average-of goes on with the mean of students", "needs --teacher"]),
        (["--teacher", "OTHER"], ["--teacher", "its tokenizer", "is not the student's"]),
        (["--model", "HYBRID"], ["is a hybrid: name the model to be like with --teacher"]),
        (["--model", "HYBRID", "--teacher", "MODEL", "--attention-layers", "1"], ["is a hybrid already"]),
    ],
)
def test_wrong_input_is_one_sentence(argv: list[str], words: list[str], capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "MODEL")
    save_tiny(tmp_path / "HYBRID", hybrid=True)
    other = save_tiny(tmp_path / "OTHER")
    raw = json.loads((other / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    vocab["7"], vocab["8"] = vocab["8"], vocab["7"]
    (other / "tokenizer.json").write_text(json.dumps(raw))
    assert main(["--model", "MODEL", *argv, *SMALL, "--out", "run"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert word in err, err
    assert not (tmp_path / "run").exists()


def test_options_of_distillation_belong_to_it(capsys) -> None:
    from pymathrl.sft.command import main as supervised

    assert supervised(["--mode", "sft", "--teacher", "builtin:tiny"]) == 2
    assert "--teacher is an option of --mode distill, got --mode sft" in capsys.readouterr().err


def test_help_is_of_the_command(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert "usage: python -m pymathrl.distill" in out and "--adam-beta2 0.95" in out
