"""What a supervised run is told. Flags, TOML names, presets and errors follow the conventions of `pymathrl.config`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymathrl.config import TrainConfig, add_options, add_task_options, build, formatter, read_toml
from pymathrl.errors import UserError, nearest
from pymathrl.options import CommandParser, at_least, convert, flag, option, positive, share
from pymathrl.sft.accept import ACCEPT, Rules
from pymathrl.sft.blend import parse_data
from pymathrl.sft.retro import Retro
from pymathrl.tasks import TASK_HELP, convert_option, task_options

MODES = {
    "sft": "cross-entropy on the responses of --data, or on the task's own worked solutions",
    "rft": "samples responses to the task's problems, keeps verified ones, trains on them; --rounds times",
    "cft": "cross-entropy on critiques: rows of --data hold question, solution and critique",
    "distill": "reverse KL to a teacher on the rows of mode sft; a transformer becomes an M1 hybrid, which starts from "
    "it (python -m pymathrl.distill)",
}


def like(name: str, *default: Any) -> Any:
    """The option of that name of `TrainConfig`, with another default if one is given."""
    field = next(f for f in dataclasses.fields(TrainConfig) if f.name == name)
    return dataclasses.field(default=default[0] if default else field.default, metadata=field.metadata)


@dataclass(frozen=True)
class SftConfig:
    """The options of a supervised run. See `--help` for meaning and unit of each."""

    mode: str = option("sft", "what the rows are and where they come from", choices=tuple(MODES))
    model: str = like("model")
    average_of: str | None = option(
        None, "start from the mean of these models' weights, DIR,DIR,.., not from --model; --steps 0 to only save it"
    )  # fmt: skip
    teacher: str | None = option(None, "distill: the model to be like, a folder or name as in --model [--model]")
    attention_layers: str | None = option(
        None, "distill: layers of a transformer --model that stay attention, 3,8,13 from 0 on; the others become "
        "Mamba layers [M1's share, 6 of 28, evenly spread]"
    )  # fmt: skip
    kl_weight: float = at_least(0, 1.0, "distill: factor of KL(student || teacher) in the loss")
    ce_weight: float = at_least(0, 0.0, "distill: factor of the cross-entropy on the rows' own tokens in the loss")
    data: str | None = option(
        None, "rows: FILE.jsonl[:WEIGHT][:mcq|open], comma-separated; no weights = all rows equally often"
    )
    task: str | None = option(
        None, f"to evaluate on, and to sample in rft: {TASK_HELP} [countdown if needed]"
    )  # fmt: skip
    steps: int = at_least(0, 200, "optimizer steps, in mode rft of each round")
    epochs: int = at_least(0, 0, "passes over the rows of --data, in the place of --steps; 0 = as --steps says")
    out: str | None = option(None, "run directory, made if absent [runs/MODE-seedS]")
    seed: int = like("seed")
    device: str = like("device")
    dtype: str = like("dtype")
    threads: int = like("threads")

    rows_per_step: int = positive(64, "rows of an optimizer step; the loss is the weighted mean over all their tokens")
    max_tokens: int = positive(2048, "rows of more tokens, prompt included, are left out, and counted")
    tokens_per_microbatch: int = like("tokens_per_microbatch")
    lr: float = like("lr", 1e-5)
    lr_schedule: str = like("lr_schedule", "cosine")
    warmup_steps: int = like("warmup_steps")
    weight_decay: float = like("weight_decay")
    adam_beta1: float = like("adam_beta1")
    adam_beta2: float = like("adam_beta2")
    adam_eps: float = like("adam_eps")
    max_grad_norm: float = like("max_grad_norm")

    rounds: int = positive(1, "rft: times to sample and to train")
    reset_to_base: str = option("no", "rft: train each round from the first weights again (Satori)",
                                choices=("no", "yes"))  # fmt: skip
    problems: int = positive(1024, "rft: problems sampled in a round; the next round takes the next ones")
    samples_per_prompt: int = positive(16, "rft: responses sampled per problem")
    temperature: float = like("temperature")
    top_k: int = like("top_k")
    top_p: float = like("top_p")
    min_p: float = like("min_p")
    hint: str = option("", "rft: text that each sampled response begins with; it is trained with the rest")
    accept: str = option("correct", "rft: keep what is right, or what is right where greedy decoding without the hint "
                         "is wrong (START)", choices=ACCEPT)  # fmt: skip
    min_accepted_tokens: int = at_least(0, 0, "rft: shorter responses are not kept")
    max_accepted_tokens: int = at_least(0, 0, "rft: longer responses are not kept; 0 = no bound")
    repetition_ngram: int = positive(8, "rft: tokens of the n-grams that --max-repetition counts")
    max_repetition: float = share(0.5, "rft: responses with more than this share of repeated n-grams are not kept")
    max_per_problem: int = positive(4, "rft: different responses kept of one problem")
    revise: str = option("no", "rft: what is kept is first made shorter by Retro-Search", choices=("no", "retro"))
    switch_words: str = option("alternatively,wait", "retro: words, comma-separated, that begin another thought (the "
                               "paper's list was not found; ours)",
                               check=lambda v: any(w.strip() for w in v.split(",")), expected="a word")  # fmt: skip
    step_break: str = option("\n\n", "retro: text between steps; a try may not begin a thought in its first step",
                             check=bool, expected="a text that is not empty")  # fmt: skip
    step_discount: float = option(0.9, "retro: value of a right answer per step that leads to it (not found; ours)",
                                  check=lambda v: 0 < v < 1, expected="in (0, 1)")  # fmt: skip

    max_prompt_tokens: int = like("max_prompt_tokens")
    max_new_tokens: int = like("max_new_tokens")
    rollout_rows: int = like("rollout_rows")
    eval_data: str | None = option(None, "held-out rows: FILE.jsonl[:mcq|open]; their loss is part of each evaluation")
    eval_every: int = like("eval_every")
    eval_problems: int = like("eval_problems")
    eval_samples: int = like("eval_samples")
    eval_problems_during: int = like("eval_problems_during")
    eval_samples_during: int = like("eval_samples_during")
    checkpoint_every: int = like("checkpoint_every")
    keep_checkpoints: int = like("keep_checkpoints")
    samples_per_step: int = at_least(0, 4, "rft: accepted responses of a round written to samples.jsonl")
    prompt_style: str = like("prompt_style")

    def common(self) -> TrainConfig:
        """Those options that a run of `pymathrl.train` has too, for the stages that read them there."""
        shared = {f.name for f in dataclasses.fields(TrainConfig)} - {"task", "samples_per_prompt"}
        return TrainConfig(**{n: v for n, v in dataclasses.asdict(self).items() if n in shared})

    @property
    def rows(self) -> str:
        """The mode whose rows are read."""
        return "sft" if self.mode == "distill" else self.mode

    def kept_layers(self) -> tuple[int, ...] | None:
        """--attention-layers as numbers. UserError where it is none."""
        if self.attention_layers is None:
            return None
        words = [word.strip() for word in self.attention_layers.split(",") if word.strip()]
        if not all(word.isdigit() for word in words):
            raise UserError(f"--attention-layers: expected numbers like 3,8,13, got {self.attention_layers!r}")
        return tuple(map(int, words))

    def rules(self) -> Rules:
        return Rules(
            self.accept, self.min_accepted_tokens, self.max_accepted_tokens, self.repetition_ngram,
            self.max_repetition, self.max_per_problem,
        )  # fmt: skip

    def retro(self) -> Retro | None:
        words = tuple(w.strip() for w in self.switch_words.split(",") if w.strip())
        return Retro(words, self.step_break, self.step_discount) if self.revise == "retro" else None


TINY = {"steps": 60, "max_tokens": 128, "max_new_tokens": 64, "max_prompt_tokens": 64, "eval_every": 20,
        "checkpoint_every": 20}  # fmt: skip
PAPER = {  # what the paper of a mode trains with (M1, arXiv 2504.10449, section 3), for every model
    "distill": {"adam_beta2": 0.95, "weight_decay": 0.1, "warmup_steps": 200},
}
# By mode: worked solutions are what the built-in model was made of, and at 1e-4 they move it more than they teach it.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    name: {
        "sft": {**TINY, "lr": 3e-5}, "cft": {**TINY, "lr": 3e-5}, "rft": {**TINY, "lr": 4e-4, "problems": 512},
        "distill": {**TINY, "lr": 4e-3, "warmup_steps": 20, "weight_decay": 0.01},
    }
    for name in ("builtin:tiny", "builtin:tiny-m1")
}  # fmt: skip


@dataclass(frozen=True)
class SftRun:
    """A parsed command line."""

    config: SftConfig
    task_options: dict[str, Any]
    resume: Path | None = None
    dry_run: bool = False

    def values(self) -> dict[str, Any]:
        """Every option by its flat name, as `config.toml` holds them."""
        flat = {k: v for k, v in dataclasses.asdict(self.config).items() if v is not None}
        return flat | {f"task_{k}": v for k, v in self.task_options.items()}


RESUME_MAY_CHANGE = ("steps", "device", "eval_every", "checkpoint_every", "keep_checkpoints", "samples_per_step")

HEADER = """Train a language model on rows: supervised fine-tuning, on given or on its own verified responses.

With no flag at all: the built-in model on Countdown's worked solutions. The loss of an optimizer step is
sum(w nll) / sum(w) over all trained tokens of its rows, whatever the cut into micro-batches. Rows are packed without
padding and attend only to themselves, so that packing changes speed and no result: there is no switch for it."""


def parse_sft(argv: list[str] | None = None) -> SftRun:
    """The run that a command line asks for. UserError for anything unknown, misplaced or out of range."""
    argv = sys.argv[1:] if argv is None else argv
    first = CommandParser(add_help=False, allow_abbrev=False)
    for word in ("--config", "--resume", "--mode", "--task", "--data", "--model", "--average-of"):
        first.add_argument(word)
    known, _ = first.parse_known_args(argv)
    helping = "-h" in argv or "--help" in argv
    if known.resume and known.config:
        raise UserError("--config and --resume exclude each other: a resumed run keeps the options it was started with")
    saved = read_toml(Path(known.resume) / "config.toml") if known.resume and not helping else {}
    file = read_toml(Path(known.config)) if known.config and not helping else {}
    early = {k: v for k, v in vars(known).items() if v is not None}
    early = {**saved, **file, **early}
    for key in ("mode", "task", "data", "model"):
        if not isinstance(early.get(key, ""), str):
            raise UserError(f"{known.config or known.resume}, {key}: expected a string, got {early[key]!r}")
    task = early.get("task")
    if task is None and (early.get("mode") == "rft" or not early.get("data")):
        task = "countdown"
    defaults = {} if task is None else task_options(task)
    parser = _parser(defaults, early.get("mode", SftConfig.mode))
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0].split("=")[0]
        if not word.startswith("-"):
            raise UserError(f"unexpected word {word!r}; options are written --name value, see --help")
        raise UserError(f"unknown option {word}; {nearest(word, parser._option_string_actions)}")
    typed = {k: v for k, v in vars(given).items() if v is not None and k not in ("config", "resume", "dry_run")}
    model = early.get("model", SftConfig.model)
    mode = early.get("mode", SftConfig.mode)
    preset = {} if saved else PAPER.get(mode, {})
    if not saved and not early.get("average_of"):
        preset = {**preset, **PRESETS.get(model, {}).get(mode, {})}
    values = {**preset, **saved, **file, **typed}
    if task is not None:
        values["task"] = task
    sources = {k: f"preset of {model}, {k}" for k in preset} | {k: f"{known.resume}/config.toml, {k}" for k in saved}
    sources |= {k: f"{known.config}, {k}" for k in file} | {k: flag(k) for k in typed}
    if saved:
        _check_resume(typed, saved, task)
    options = {
        key: convert_option(task, key, values.pop(f"task_{key}"))
        for key in defaults
        if task is not None and f"task_{key}" in values
    }
    fields = {f.name for f in dataclasses.fields(SftConfig)}
    for key in values:
        if key not in fields:
            raise UserError(f"{sources[key]}: unknown option; {nearest(key, fields)}")
    config: SftConfig = build(SftConfig, values, {"task": flag("task"), **sources})
    _check(config)
    return SftRun(config, options, Path(known.resume) if known.resume else None, given.dry_run)


def _check(c: SftConfig) -> None:
    """UserError for options that do not go together."""
    if c.mode == "rft" and c.data is not None:
        raise UserError("--data is not read by --mode rft, whose rows are sampled; use --mode sft for rows of a file")
    if c.mode == "cft" and c.data is None:
        raise UserError("--mode cft needs --data: a JSONL file of rows with question, solution and critique")
    if c.mode != "distill":
        for name in ("teacher", "attention_layers"):
            if getattr(c, name) is not None:
                raise UserError(f"{flag(name)} is an option of --mode distill, got --mode {c.mode}")
    elif c.kl_weight == c.ce_weight == 0:
        raise UserError("--kl-weight and --ce-weight are both 0: there is no loss")
    elif c.average_of is not None and (c.teacher is None or c.attention_layers is not None):
        raise UserError(
            "--mode distill with --average-of goes on with the mean of students: it needs --teacher, and takes no "
            "--attention-layers"
        )
    c.kept_layers()
    if c.epochs and c.data is None:
        raise UserError("--epochs counts passes over the rows of --data; without a file give --steps")
    if c.mode != "rft" and (c.rounds > 1 or c.reset_to_base == "yes"):
        raise UserError(f"--rounds and --reset-to-base are options of --mode rft, got --mode {c.mode}")
    if not (0 < c.top_p <= 1 and 0 <= c.min_p <= 1):
        raise UserError(f"expected --top-p in (0, 1] and --min-p in [0, 1], got {c.top_p} and {c.min_p}")
    if c.data is not None:
        parse_data(c.data)
    if c.eval_data is not None:
        specs = parse_data(c.eval_data, "--eval-data")
        if len(specs) > 1 or specs[0].weight is not None:
            raise UserError(f"--eval-data: expected one file, without a weight, got {c.eval_data!r}")


def _check_resume(typed: dict[str, Any], saved: dict[str, Any], task: str | None) -> None:
    for key, text in typed.items():
        if key.startswith("task_") and task is not None:
            name = key.removeprefix("task_")
            value, before = convert_option(task, name, text), saved.get(key, task_options(task)[name])
        else:
            value = convert(SftConfig, key, text, flag(key))
            before = saved.get(key, getattr(SftConfig(), key))  # a run may be older than an option
        fixed = saved.get("lr_schedule") != "constant" or saved.get("mode") == "rft" or saved.get("epochs")
        if key == "steps" and before != value and fixed:
            raise UserError(f"--steps cannot change here: the schedule of the run, or its rounds, ends at {before}")
        if key not in RESUME_MAY_CHANGE and before != value:
            raise UserError(
                f"{flag(key)} cannot change when a run is resumed: it was {before!r}, got {value!r}; "
                f"free to change: {', '.join(flag(k) for k in RESUME_MAY_CHANGE)}"
            )


def _parser(task_defaults: dict[str, Any], mode: str) -> argparse.ArgumentParser:
    modes = "\n".join(f"  {name:<8} {text}" for name, text in MODES.items())
    presets = "".join(
        f"  any model, {mode}: " + ", ".join(f"{flag(k)} {v}" for k, v in preset.items()) + "\n"
        for mode, preset in PAPER.items()
    )
    presets += "\n".join(
        f"  {model}, {mode}: " + ", ".join(f"{flag(k)} {v}" for k, v in preset.items())
        for model, by_mode in PRESETS.items()
        for mode, preset in by_mode.items()
    )
    parser = CommandParser(
        prog=f"python -m pymathrl.{'distill' if mode == 'distill' else 'sft'}",
        description=f"{HEADER}\n\nmodes:\n{modes}\n\ndefaults that differ:\n{presets}",
        formatter_class=formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.toml", help="options from a file, by the same names with _ for -")
    parser.add_argument("--resume", metavar="DIR", help="continue the run in DIR from its newest whole checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="print the plan (model, memory, rows) and exit")
    add_options(parser, "every run", SftConfig)
    add_task_options(parser, task_defaults)
    return parser
