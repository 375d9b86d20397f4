"""The command line: every option reaches the run, every wrong one is an error that says what to write instead."""

import tomllib

import pytest

from pymathrl.config import PRESETS, TrainConfig, parse_train, write_toml
from pymathrl.errors import UserError
from pymathrl.sft.options import parse_sft
from pymathrl.train import main


def test_values_come_from_flags_then_file_then_preset_then_default(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('algo = "grpo"\nlr = 3e-5\nsteps = 7\nclip_high = 0.28\ntask_nmax = 3\n')
    run = parse_train(["--config", str(file), "--steps", "9"])
    assert run.algo.name == "grpo" and run.own.clip_high == 0.28 and run.task_options == {"nmax": 3}
    assert run.train.steps == 9 and run.train.lr == 3e-5
    assert run.train.max_new_tokens == PRESETS["builtin:tiny"]["max_new_tokens"]
    assert run.train.temperature == 1.0
    plain = parse_train(["--algo", "rover", "--model", "some/folder"])
    assert plain.train.lr == TrainConfig().lr == 1e-6


def test_config_toml_round_trip(tmp_path):
    run = parse_train(["--algo", "rover", "--rho", "0.5", "--task", "countdown", "--task-nmax", "3", "--out", 'a"b\\c'])
    text = write_toml(run.values())
    assert tomllib.loads(text)["out"] == 'a"b\\c'
    (tmp_path / "c.toml").write_text(text)
    again = parse_train(["--config", str(tmp_path / "c.toml")])
    assert (again.train, again.own, again.algo.name) == (run.train, run.own, "rover")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["--algo is missing", "rover"]),
        (["--algo", "rovr"], ["rovr", "did you mean 'rover'"]),
        (["--algo", "rover", "--clip-low", "0.1"], ["--clip-low", "--algo grpo"]),
        (["--algo", "rover", "--stepz", "3"], ["--stepz", "--steps"]),
        (["--algo", "rover", "--steps"], ["--steps", "expected one argument"]),
        (["--algo", "rover", "--steps", "many"], ["--steps", "expected int", "'many'"]),
        (["--algo", "rover", "--steps", "-1"], ["--steps", "at least 0", "-1"]),
        (["--algo", "rover", "--lr", "nan"], ["--lr", "expected float"]),
        (["--algo", "rover", "--lr", "inf"], ["--lr", "expected float"]),
        (["--algo", "rover", "--temperature", "inf"], ["--temperature", "expected float"]),
        (["--algo", "rover", "--out", "x" * 300], ["x" * 300]),
        (["--algo", "rover", "--lr", "0"], ["--lr", "more than 0"]),
        (["--algo", "rover", "--lr-schedule", "cosin"], ["--lr-schedule", "did you mean 'cosine'"]),
        (["--algo", "rover", "--minibatches", "3"], ["--minibatches", "divisor of 64", "got 3"]),
        (["--algo", "rover", "--samples-per-prompt", "1"], ["--samples-per-prompt", "at least 2"]),
        (["--algo", "rover", "--task", "contdown"], ["contdown", "countdown"]),
        (["--algo", "rover", "--task-nmix", "3"], ["--task-nmix", "--task-nmin"]),
        (["--algo", "rover", "extra"], ["extra", "--name value"]),
        (["--algo", "rover", "--config", "/nowhere.toml"], ["/nowhere.toml", "no such file"]),
        (["--resume", "/nowhere"], ["/nowhere/config.toml", "run directory"]),
        (["--algo", "rover", "--device", "tpu"], ["--device", "'tpu'", "cpu"]),
        (["--algo", "rover", "--device", "cpu,cpu"], ["--device", "one device"]),
        (["--algo", "rover", "--model", "/nowhere/model"], ["/nowhere/model"]),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    for word in words:
        assert word in err, err
    assert not list(tmp_path.iterdir()), "a refused command line leaves nothing behind"


def test_unknown_key_in_a_file_names_the_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('algo = "grpo"\nlearning_rate = 1e-3\n')
    with pytest.raises(UserError, match=r"run\.toml, learning_rate: unknown option"):
        parse_train(["--config", str(file)])
    file.write_text("algo = grpo\n")
    with pytest.raises(UserError, match=r"run\.toml: not valid TOML"):
        parse_train(["--config", str(file)])


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as done:
        parse_train(["--algo", "rover", "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    for name in ("--rho", "--samples-per-prompt", "--task-format-score", "grpo", "arXiv 2509.24981"):
        assert name in text
    assert "--clip-low" not in text and "Q_t   = rho" in text  # what the options speak of: its equations
    with pytest.raises(SystemExit):
        parse_train(["--help"])
    text = capsys.readouterr().out
    assert "--rho" in text and "--clip-low" in text
    assert "rg:chain_sum" in text and "olympiadbench" in text  # of --task
    for task, options in (("gsm8k", ["--task-data", "--task-split"]), ("synth:mixed_arith", ["--task-depth"])):
        with pytest.raises(SystemExit):
            parse_train(["--algo", "grpo", "--task", task, "--help"])
        text = capsys.readouterr().out
        assert all(option in text for option in options) and "--task-nmin" not in text
        with pytest.raises(SystemExit):
            parse_sft(["--task", task, "--help"])
        text = capsys.readouterr().out
        assert all(option in text for option in options) and "synth:chain_sum" in text
