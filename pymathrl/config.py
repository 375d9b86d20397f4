"""What a run is told: one dataclass for every run, one per algorithm, and the command line made from both.

Order of precedence: the command line, then `--config FILE.toml`, then the preset of a built-in model, then the default.
The names are flat and the same everywhere: `--max-new-tokens 64` on the command line is `max_new_tokens = 64` in TOML.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pymathrl.algos import REGISTRY, Algo
from pymathrl.errors import UserError, nearest
from pymathrl.options import CommandParser, at_least, convert, flag, option, positive, value_type
from pymathrl.tasks import OPTION_HELP, TASKS, convert_option, task_options


@dataclass(frozen=True)
class TrainConfig:
    """The options of every run. See `--help` for meaning and unit of each."""

    model: str = option("builtin:tiny", "a folder in the Hugging Face layout, a hub name (org/name), or builtin:tiny")
    task: str = option("countdown", f"a task ({', '.join(TASKS)}) or a problem file PATH.jsonl")
    steps: int = at_least(0, 200, "rollout-and-update steps")
    out: str | None = option(None, "run directory, made if absent [runs/ALGO-TASK-seedS]")
    seed: int = at_least(0, 0, "fixes every random number of the run: problems, tokens, order")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = option("auto", "of weights and activations; auto: fp32 on a CPU, bf16 with fp32 masters on a GPU",
                        choices=("auto", "fp32", "bf16"))  # fmt: skip
    threads: int = at_least(0, 0, "CPU threads; 0 = all cores (gradients depend on this number in the last bits)")

    prompts_per_step: int = positive(128, "problems drawn per step")
    samples_per_prompt: int = at_least(2, 8, "responses sampled per problem (the group)")
    temperature: float = positive(1.0, "sampling temperature of the rollouts and of every log-prob of the update")
    top_k: int = at_least(0, 0, "most likely tokens kept in a rollout; 0 = all (the update renormalises over the same)")
    top_p: float = option(1.0, "probability that the tokens kept in a rollout reach, most likely first; 1 = all of it")
    min_p: float = option(0.0, "tokens below this share of the top probability are cut in a rollout; 0 = none")
    old_logp: str = option(
        "sampler", "log-probs of the sampling policy: the sampler's own, or a second pass over the batch",
        choices=("sampler", "recompute"),
    )  # fmt: skip
    max_prompt_tokens: int = positive(1024, "longer prompts are left out, and counted")
    max_new_tokens: int = positive(1024, "length limit of a response, in tokens")
    rollout_rows: int = positive(512, "responses decoded side by side")

    minibatches: int = positive(
        4, "optimizer steps per rollout batch; each takes prompts-per-step / minibatches problems"
    )
    epochs: int = positive(1, "passes over each rollout batch")
    tokens_per_microbatch: int = positive(16384, "tokens of one forward and backward pass (memory, not result)")
    lr: float = positive(1e-6, "peak learning rate of AdamW")
    lr_schedule: str = option("constant", "shape after the warm-up", choices=("constant", "linear", "cosine"))
    warmup_steps: int = at_least(0, 0, "optimizer steps of linear warm-up")
    weight_decay: float = at_least(0, 0.01, "AdamW weight decay, on matrices only")
    adam_beta1: float = option(0.9, "AdamW beta1", check=lambda v: 0 <= v < 1, expected="in [0, 1)")
    adam_beta2: float = option(0.999, "AdamW beta2", check=lambda v: 0 <= v < 1, expected="in [0, 1)")
    adam_eps: float = positive(1e-8, "AdamW epsilon")
    max_grad_norm: float = at_least(0, 1.0, "gradients are scaled down to this norm; 0 = never")

    eval_every: int = at_least(0, 50, "steps between evaluations; 0 = only before and after")
    eval_problems: int = positive(256, "held-out problems of an evaluation before and after the run")
    eval_samples: int = at_least(1, 16, "responses per problem of an evaluation before and after the run")
    eval_problems_during: int = positive(128, "held-out problems of an evaluation in between")
    eval_samples_during: int = at_least(1, 8, "responses per problem of an evaluation in between")

    checkpoint_every: int = at_least(0, 50, "steps between checkpoints; 0 = only at the end or when stopped")
    keep_checkpoints: int = positive(2, "newest checkpoints kept")
    samples_per_step: int = at_least(0, 4, "responses per step written to samples.jsonl")
    prompt_style: str = option("auto", "auto: as the model's folder says", choices=("auto", "compact", "plain", "chat"))


# The built-in model is small and trained from nothing: it bears, and needs, a larger learning rate than a language
# model does.
PRESETS: dict[str, dict[str, Any]] = {
    "builtin:tiny": {
        "steps": 60, "lr": 4e-4, "prompts_per_step": 64, "max_new_tokens": 64, "minibatches": 2, "eval_every": 20,
        "max_prompt_tokens": 64, "checkpoint_every": 20,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A parsed command line: what to run and with which options."""

    algo: Algo
    train: TrainConfig
    own: Any  # an instance of algo.config
    task_options: dict[str, Any]
    resume: Path | None = None
    dry_run: bool = False

    def values(self) -> dict[str, Any]:
        """Every option by its flat name, as `config.toml` holds them."""
        flat = {"algo": self.algo.name, **dataclasses.asdict(self.train), **dataclasses.asdict(self.own)}
        return {k: v for k, v in flat.items() if v is not None} | {f"task_{k}": v for k, v in self.task_options.items()}


# What may differ when a run is resumed: nothing that changes the steps already done.
RESUME_MAY_CHANGE = ("steps", "device", "eval_every", "checkpoint_every", "keep_checkpoints", "samples_per_step")

HEADER = """Train a language model with reinforcement learning on verifiable rewards.

With no flag but --algo: the built-in model on Countdown, minutes on two CPU cores."""


def parse_train(argv: list[str] | None = None) -> Run:
    """The run that a command line asks for. UserError for anything unknown, misplaced or out of range."""
    argv = sys.argv[1:] if argv is None else argv
    first = CommandParser(add_help=False, allow_abbrev=False)
    for word in ("--algo", "--config", "--resume", "--task", "--model"):
        first.add_argument(word)
    known, _ = first.parse_known_args(argv)
    helping = "-h" in argv or "--help" in argv

    saved = read_toml(Path(known.resume) / "config.toml") if known.resume and not helping else {}
    file = read_toml(Path(known.config)) if known.config and not helping else {}
    if known.resume and known.config:
        raise UserError("--config and --resume exclude each other: a resumed run keeps the options it was started with")
    for source, table in ((known.config, file), (f"{known.resume}/config.toml", saved)):
        for key in ("algo", "model", "task"):
            if not isinstance(table.get(key, ""), str):
                raise UserError(f"{source}, {key}: expected a string, got {table[key]!r}")
    name: Any = known.algo or file.get("algo") or saved.get("algo")
    if name is None and not helping:
        raise UserError(f"--algo is missing; give one of {', '.join(REGISTRY)}, for example --algo rover")
    if name is not None and name not in REGISTRY:
        raise UserError(f"--algo: unknown algorithm {name!r}; {nearest(str(name), REGISTRY)}")
    algos = [REGISTRY[name]] if name else list(REGISTRY.values())
    task = known.task or file.get("task") or saved.get("task") or _default("task")
    task_defaults = {} if helping and task not in TASKS else task_options(task)
    parser = _parser(algos, task_defaults)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        _unknown(unknown[0], algos[0], task, parser)
    algo = algos[0]
    typed = {k: v for k, v in vars(given).items() if v is not None and k not in ("algo", "config", "resume", "dry_run")}

    model = typed.get("model") or file.get("model") or saved.get("model") or _default("model")
    preset = {} if saved else PRESETS.get(model, {})
    if saved:
        _check_resume(typed, known.algo, saved, algo, task)
    values = {**preset, **saved, **file, **typed}
    sources = {k: f"preset of {model}, {k}" for k in preset}
    sources |= {k: f"{known.resume}/config.toml, {k}" for k in saved}
    sources |= {k: f"{known.config}, {k}" for k in file} | {k: flag(k) for k in typed}
    values.pop("algo", None)
    train, own = build(TrainConfig, values, sources), build(algo.config, values, sources)
    options = {
        k.removeprefix("task_"): convert_option(task, k.removeprefix("task_"), values.pop(k))
        for k in list(values)
        if k.removeprefix("task_") in task_defaults and k.startswith("task_")
    }
    known_names = _names(TrainConfig) | _names(algo.config)
    for key in values:
        if key not in known_names:
            raise UserError(f"{sources[key]}: unknown option for --algo {algo.name}; {nearest(key, known_names)}")
    if train.prompts_per_step % train.minibatches:
        raise UserError(
            f"--minibatches must divide --prompts-per-step: expected a divisor of "
            f"{train.prompts_per_step}, got {train.minibatches}"
        )
    if not (0 < train.top_p <= 1 and 0 <= train.min_p <= 1):
        raise UserError(f"expected --top-p in (0, 1] and --min-p in [0, 1], got {train.top_p} and {train.min_p}")
    return Run(algo, train, own, options, Path(known.resume) if known.resume else None, given.dry_run)


def write_toml(values: dict[str, Any]) -> str:
    """Flat options as TOML text."""
    lines = []
    for key, value in values.items():
        if isinstance(value, bool):
            text = str(value).lower()
        elif isinstance(value, str):
            text = json.dumps(value, ensure_ascii=False)  # its escapes, of line breaks too, are those of TOML
        else:
            text = repr(value)
        lines.append(f"{key} = {text}\n")
    return "".join(lines)


def _default(name: str, cls: type = TrainConfig) -> Any:
    return next(f.default for f in dataclasses.fields(cls) if f.name == name)


def _names(cls: type) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)}


def build(cls: type, values: dict[str, Any], sources: dict[str, str]) -> Any:
    return cls(**{n: convert(cls, n, values[n], sources[n]) for n in _names(cls) if n in values})


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        hint = "; --resume takes a run directory" if path.name == "config.toml" else ""
        raise UserError(f"{path}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None


def _check_resume(typed: dict[str, Any], given: str | None, saved: dict[str, Any], algo: Algo, task: str) -> None:
    if given is not None and given != saved.get("algo"):
        raise UserError(
            f"--algo: the run was started with {saved.get('algo')!r}, got {given!r}; start a new run instead"
        )
    for key, text in typed.items():
        if key.startswith("task_"):
            option = key.removeprefix("task_")
            value = convert_option(task, option, text)
            before = saved.get(key, task_options(task)[option])
        else:
            cls = TrainConfig if key in _names(TrainConfig) else algo.config
            value = convert(cls, key, text, flag(key))
            before = saved.get(key, _default(key, cls))  # a run may be older than an option
        if key == "steps" and before != value and saved.get("lr_schedule") != "constant":
            raise UserError(
                f"--steps cannot change here: the {saved.get('lr_schedule')} schedule of the run ends at {before}"
            )
        if key not in RESUME_MAY_CHANGE and before != value:
            raise UserError(
                f"{flag(key)} cannot change when a run is resumed: it was {before!r}, got {value!r}; "
                f"free to change: {', '.join(flag(k) for k in RESUME_MAY_CHANGE)}"
            )


def add_options(parser: argparse.ArgumentParser, title: str, cls: type) -> None:
    group = parser.add_argument_group(title)
    for f in dataclasses.fields(cls):
        kind, _ = value_type(cls, f.name)
        choices = f.metadata.get("choices")
        metavar = "|".join(choices) if choices else kind.__name__.upper()
        default = "" if f.default is None else f" [{f.default}]"
        group.add_argument(flag(f.name), metavar=metavar, help=(f.metadata["help"] + default).replace("%", "%%"))


def formatter(prog: str) -> argparse.HelpFormatter:
    width = min(120, shutil.get_terminal_size().columns)
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=width)


def _parser(algos: list[Algo], task_defaults: dict[str, Any]) -> argparse.ArgumentParser:
    """The whole command line. With several algorithms (help without --algo) their own options are text at the end."""
    listed = "\n".join(f"  {a.name:<12} {a.summary} ({a.paper})" for a in REGISTRY.values())
    presets = "\n".join(
        f"  {model}: " + ", ".join(f"{flag(k)} {v}" for k, v in preset.items()) for model, preset in PRESETS.items()
    )
    epilog = []
    for algo in algos if len(algos) > 1 else []:
        own = CommandParser(usage=argparse.SUPPRESS, add_help=False, formatter_class=formatter)
        add_options(own, f"--algo {algo.name}", algo.config)
        epilog.append(own.format_help().strip())
    parser = CommandParser(
        prog="python -m pymathrl.train",
        description=f"{HEADER}\n\nalgorithms:\n{listed}\n\ndefaults that differ for a built-in model:\n{presets}",
        epilog="\n\n".join(epilog),
        formatter_class=formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--algo", metavar="NAME", help=f"one of {', '.join(REGISTRY)} (needed, except with --resume)")
    parser.add_argument("--config", metavar="FILE.toml", help="options from a file, by the same names with _ for -")
    parser.add_argument("--resume", metavar="DIR", help="continue the run in DIR from its newest whole checkpoint")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan (model, memory, tokens per step) and exit"
    )
    add_options(parser, "every run", TrainConfig)
    if len(algos) == 1:
        add_options(parser, f"--algo {algos[0].name}", algos[0].config)
    add_task_options(parser, task_defaults)
    return parser


def add_task_options(parser: argparse.ArgumentParser, defaults: dict[str, Any]) -> None:
    """A flag --task-NAME for each option of a task; `defaults` as `task_options` gives them."""
    group = parser.add_argument_group("the task (--task NAME --help shows those of another)")
    for key, default in defaults.items():
        text = f"{OPTION_HELP[key]} [{default}]"
        group.add_argument(flag(f"task_{key}"), metavar=type(default).__name__.upper(), help=text)


def _unknown(word: str, algo: Algo, task: str, parser: argparse.ArgumentParser) -> NoReturn:
    word = word.split("=")[0]
    if not word.startswith("-"):
        raise UserError(f"unexpected word {word!r}; options are written --name value, see --help")
    for other in REGISTRY.values():
        if word in {flag(n) for n in _names(other.config)}:
            raise UserError(f"{word} is an option of --algo {other.name}, not of --algo {algo.name}")
    if word.startswith("--task-"):
        options = [flag("task_" + k) for k in task_options(task)]
        raise UserError(f"{word} is not an option of the task {task}; {nearest(word, options)}")
    raise UserError(f"unknown option {word}; {nearest(word, parser._option_string_actions)}")
