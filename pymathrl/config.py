"""What a run is told: one dataclass for every run, one per algorithm, and the command line made from both.

Order of precedence: the command line, then `--config FILE.toml` (a stage's table, then what stands above it), then the
algorithm's defaults, then the preset of a built-in model, then the default. The names are flat and the same everywhere:
`--max-new-tokens 64` on the command line is `max_new_tokens = 64` in TOML.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pymathrl.algos import REGISTRY, Algo
from pymathrl.errors import UserError, nearest
from pymathrl.ops.aggregation import MODES
from pymathrl.ops.policy_loss import KLS, LEVELS
from pymathrl.options import CommandParser, at_least, convert, flag, option, positive, value_type
from pymathrl.tasks import OPTION_HELP, TASK_HELP, convert_option, task_options


@dataclass(frozen=True)
class TrainConfig:
    """The options of every run. See `--help` for meaning and unit of each."""

    model: str = option(
        "builtin:tiny", "a folder in the Hugging Face layout, a hub name (org/name), builtin:tiny, or builtin:tiny-m1"
    )  # fmt: skip
    task: str = option("countdown", TASK_HELP)
    steps: int = at_least(0, 200, "rollout-and-update steps")
    out: str | None = option(None, "run directory, made if absent [runs/ALGO-TASK-seedS]")
    seed: int = at_least(0, 0, "fixes every random number of the run: problems, tokens, order")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = option("auto", "of weights and activations; auto: fp32 on a CPU, bf16 with fp32 masters on a GPU",
                        choices=("auto", "fp32", "bf16"))  # fmt: skip
    threads: int = at_least(0, 0, "CPU threads; 0 = all cores (gradients depend on this number in the last bits)")

    prompts_per_step: int = positive(128, "problems drawn per step")
    samples_per_prompt: int = positive(8, "responses sampled per problem (the group)")
    temperature: float = positive(1.0, "sampling temperature of the rollouts and of every log-prob of the update")
    top_k: int = at_least(0, 0, "most likely tokens kept in a rollout; 0 = all (the update renormalises over the same)")
    top_p: float = option(1.0, "probability that the tokens kept in a rollout reach, most likely first; 1 = all of it")
    min_p: float = option(0.0, "tokens below this share of the top probability are cut in a rollout; 0 = none")
    old_logp: str = option(
        "sampler", "log-probs of the sampling policy: the sampler's own, or a second pass over the batch",
        choices=("sampler", "recompute"),
    )  # fmt: skip
    filter: str = option(
        "off", "groups that are trained on: all; mixed: with right and wrong answers (dynamic sampling); band: with an "
        "accuracy in --filter-low .. --filter-high. Missing ones are drawn anew, surplus ones wait one step",
        choices=("off", "mixed", "band"),
    )  # fmt: skip
    filter_low: float = option(0.3, "least accuracy of a group under --filter band (paper: 0.3)")
    filter_high: float = option(0.7, "largest accuracy of a group under --filter band (paper: 0.7)")
    filter_rounds: int = positive(10, "draws per step at most until the batch is full, under --filter (DAPO: 10)")
    max_prompt_tokens: int = positive(1024, "longer prompts are left out, and counted")
    max_new_tokens: int = positive(1024, "length limit of a response, in tokens")
    rollout_rows: int = positive(512, "responses decoded side by side")

    minibatches: int = positive(
        4, "optimizer steps per rollout batch; each takes prompts-per-step / minibatches problems"
    )
    epochs: int = positive(1, "passes over each rollout batch")
    aggregation: str = option(
        "auto", "average over tokens (counts of the whole optimizer step); auto: the algorithm's own",
        choices=("auto", *MODES),
    )  # fmt: skip
    kl: str = option("none", "KL to a reference policy: estimator; the + ones take the gradient of k2", choices=KLS)
    kl_coef: float = positive(0.001, "factor of the KL (verl: 0.001; TRL: 0.05 in the reward)")
    kl_in: str = option("loss", "where the KL goes: a term of the loss, or k1 taken off the reward of each token",
                        choices=("loss", "reward"))  # fmt: skip
    kl_target: float = at_least(0, 0.0, "KL per token that --kl-coef is steered to; 0 = it stays (verl: 0.1)")
    kl_horizon: int = positive(10000, "responses over which --kl-target acts (verl: 10000)")
    kl_reference: str | None = option(None, "model of the reference policy [--model, as it was before training]")
    entropy_coef: float = at_least(0, 0.0, "bonus for the entropy of the policy, per token, in nats")
    is_level: str = option(
        "none", "importance weights between sampler and trainer: per token, of the sequence, or its geometric mean; "
        "needs --old-logp recompute (else the two are one)", choices=("none", *LEVELS),
    )  # fmt: skip
    is_cap: float = positive(2.0, "bound of the importance weights (verl: 2; TRL: 3)")
    is_mode: str = option(
        "truncate", "weights above the bound become it, or 0 (TRL: mask)", choices=("truncate", "mask")
    )
    truncated: str = option("train", "responses cut at the length limit: trained on, or left out of loss and counts",
                            choices=("train", "mask"))  # fmt: skip
    entropy_quantile: float = option(
        1.0, "share of the tokens, those of highest entropy, that are trained on (80/20 rule: 0.2); the others count "
        "in the averages", check=lambda v: 0 < v <= 1, expected="in (0, 1]",
    )  # fmt: skip
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
    stage_optimizer: str = option(
        "continue", "moments of AdamW at the start of a later stage of a schedule (CAMPO: continue)",
        choices=("continue", "fresh"),
    )  # fmt: skip
    samples_per_step: int = at_least(0, 4, "responses per step written to samples.jsonl")
    prompt_style: str = option("auto", "auto: as the model's folder says", choices=("auto", "compact", "plain", "chat"))

    @property
    def updates(self) -> int:
        """Optimizer steps in all, at most: the clock of a learning-rate schedule."""
        return self.steps * self.epochs * self.minibatches


# The built-in models are small and trained from nothing: they bear, and need, a larger learning rate than a language
# model does.
TINY: dict[str, Any] = {
    "steps": 60, "lr": 4e-4, "prompts_per_step": 64, "max_new_tokens": 64, "minibatches": 2, "eval_every": 20,
    "max_prompt_tokens": 64, "checkpoint_every": 20,
}  # fmt: skip
PRESETS = {"builtin:tiny": TINY, "builtin:tiny-m1": TINY}


@dataclass(frozen=True)
class Run:
    """A parsed command line: what to run and with which options.

    stages: of a schedule, in order, each a run of its own number of steps; empty: the run is one stage.
    """

    algo: Algo
    train: TrainConfig
    own: Any  # an instance of algo.config
    task_options: dict[str, Any]
    resume: Path | None = None
    dry_run: bool = False
    stages: tuple[Run, ...] = ()

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.train.steps for stage in self.stages) if self.stages else self.train.steps

    def values(self) -> dict[str, Any]:
        """Every option by its flat name, as `config.toml` holds them; the stages as a list of tables under "stage"."""
        flat = {"algo": self.algo.name, **dataclasses.asdict(self.train), **dataclasses.asdict(self.own)}
        values = {k: v for k, v in flat.items() if v is not None}
        values |= {f"task_{k}": v for k, v in self.task_options.items()}
        if self.stages:  # each with all its options: they do not change meaning when defaults do
            values["stage"] = [
                {k: v for k, v in stage.values().items() if k not in OF_THE_RUN} for stage in self.stages
            ]
        return values


# Options that the stages of a schedule share.
OF_THE_RUN = (
    "model", "out", "seed", "device", "dtype", "threads", "prompt_style", "keep_checkpoints", "eval_problems",
    "eval_samples", "eval_problems_during", "eval_samples_during",
)  # fmt: skip

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
    task_defaults = task_options(task)
    parser = _parser(algos, task_defaults)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        _unknown(unknown[0], algos[0], task, parser)
    algo = algos[0]
    typed = {k: v for k, v in vars(given).items() if v is not None and k not in ("algo", "config", "resume", "dry_run")}

    model = typed.get("model") or file.get("model") or saved.get("model") or _default("model")
    preset = {} if saved else PRESETS.get(model, {})
    own = {} if saved else algo.defaults
    if saved:
        _check_resume(typed, known.algo, saved, algo, task)
    stages = {**saved, **file}.get("stage", [])
    layers: list[Layer] = [
        (_source(f"preset of {model}"), preset),
        (_source(f"default of --algo {algo.name}"), own),
        (_source(f"{known.resume}/config.toml"), {k: v for k, v in saved.items() if k != "stage"}),
        (_source(str(known.config)), {k: v for k, v in file.items() if k != "stage"}),
    ]
    last: Layer = (flag, typed)
    run = _assemble(algo, task, [*layers, last])
    if saved:  # what may not change is the run's, and a stage may have its own
        last = (flag, {k: v for k, v in typed.items() if k in RESUME_MAY_CHANGE})
    run = dataclasses.replace(run, resume=Path(known.resume) if known.resume else None, dry_run=given.dry_run)
    if not stages:
        if run.train.stage_optimizer != _default("stage_optimizer"):
            raise UserError("--stage-optimizer is of schedules: it has no effect without [[stage]] tables in --config")
        return run
    return _add_stages(run, stages, layers, last, str(known.config or f"{known.resume}/config.toml"))


Layer = tuple[Callable[[str], str], Mapping[str, Any]]  # how an option's source is named; options by flat name


def _assemble(algo: Algo, task: str, layers: Sequence[Layer]) -> Run:
    """The run that these layers of options give, later ones over earlier ones."""
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for where, table in layers:
        values |= table
        sources |= {k: where(k) for k in table}
    values.pop("algo", None)
    train, own = build(TrainConfig, values, sources), build(algo.config, values, sources)
    defaults = task_options(task)
    options = {
        k.removeprefix("task_"): convert_option(task, k.removeprefix("task_"), values.pop(k))
        for k in list(values)
        if k.removeprefix("task_") in defaults and k.startswith("task_")
    }
    known_names = _names(TrainConfig) | _names(algo.config)
    for key in values:
        if key not in known_names:
            raise UserError(f"{sources[key]}: unknown option for --algo {algo.name}; {nearest(key, known_names)}")
    given = {k for k, source in sources.items() if not source.startswith(("preset", "default"))}
    _check_together(algo, train, own, given)
    return Run(algo, train, own, options)


def _check_together(algo: Algo, train: TrainConfig, own: Any, given: set[str]) -> None:
    """What no single option can check. given: names that a person wrote."""
    if train.prompts_per_step % train.minibatches:
        raise UserError(
            f"--minibatches must divide --prompts-per-step: expected a divisor of "
            f"{train.prompts_per_step}, got {train.minibatches}"
        )
    if not (0 < train.top_p <= 1 and 0 <= train.min_p <= 1):
        raise UserError(f"expected --top-p in (0, 1] and --min-p in [0, 1], got {train.top_p} and {train.min_p}")
    if train.samples_per_prompt < algo.min_samples:
        raise UserError(
            f"--samples-per-prompt: --algo {algo.name} compares the responses to a problem, expected at least "
            f"{algo.min_samples}, got {train.samples_per_prompt}"
        )
    algo.check(train, own)  # before the filter's need of groups: some algorithms have none, and say so
    if train.filter != "off" and train.samples_per_prompt < 2:
        raise UserError(
            f"--filter {train.filter} keeps groups by the accuracy of their responses: expected at least 2 "
            f"--samples-per-prompt, got {train.samples_per_prompt}"
        )
    if not 0 <= train.filter_low <= train.filter_high <= 1:
        raise UserError(
            f"expected 0 <= --filter-low <= --filter-high <= 1, got {train.filter_low} and {train.filter_high}"
        )
    if train.is_level != "none" and train.old_logp != "recompute":
        raise UserError(
            f"--is-level {train.is_level} needs --old-logp recompute: with the sampler's own log-probs as the old ones "
            "there is nothing to correct"
        )
    if train.kl_in == "reward" and train.kl not in ("none", "k1"):
        raise UserError(f"--kl-in reward takes k1 off the rewards: expected --kl k1, got --kl {train.kl}")
    needs = {
        "filter_low": ("filter", train.filter == "band"), "filter_high": ("filter", train.filter == "band"),
        "filter_rounds": ("filter", train.filter != "off"), "is_cap": ("is_level", train.is_level != "none"),
        "is_mode": ("is_level", train.is_level != "none"),
        **{"kl_" + name: ("kl", train.kl != "none") for name in ("coef", "in", "target", "reference")},
        "kl_horizon": ("kl_target", train.kl != "none" and train.kl_target > 0),
    }  # fmt: skip
    for name, (other, on) in needs.items():
        if name in given and not on and getattr(train, name) != _default(name):
            raise UserError(f"{flag(name)} has no effect with {flag(other)} {getattr(train, other)}; set that too")


def _add_stages(run: Run, tables: Any, layers: Sequence[Layer], last: Layer, source: str) -> Run:
    """The run with the stages of its file: a stage's table stands over the file's other options and under the command
    line. In a stage of another algorithm or task, what the run's own one reads does not count."""
    if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise UserError(f"{source}: expected stages as tables [[stage]], got {tables!r}")
    if "steps" in last[1]:
        raise UserError("--steps: the stages of the schedule say how long each is; change them there")
    stages = []
    for number, table in enumerate(tables, 1):
        where = f"{source}, stage {number}"
        if "steps" not in table:
            raise UserError(f"{where}: each stage says its number of steps")
        for key in (*OF_THE_RUN, "stage"):
            if key in table:
                raise UserError(f"{where}: {key} is an option of the whole run; set it above the first [[stage]]")
        name, task = table.get("algo", run.algo.name), table.get("task", run.train.task)
        if name not in REGISTRY:
            raise UserError(f"{where}, algo: unknown algorithm {name!r}; {nearest(str(name), REGISTRY)}")
        algo = REGISTRY[name]
        foreign = _names(run.algo.config) - _names(algo.config)
        below: list[Layer] = []
        for layer, options in layers:
            if options is run.algo.defaults:
                below.append((_source(f"default of --algo {name}"), algo.defaults))
                continue
            keep = {k: v for k, v in options.items() if k not in foreign}
            below.append((layer, keep if task == run.train.task else _without_task(keep)))
        stages.append(_assemble(algo, task, [*below, (_source(where), table), last]))
    return dataclasses.replace(run, stages=tuple(stages))


def _source(name: str) -> Callable[[str], str]:
    return lambda key: f"{name}, {key}"


def _without_task(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if not k.startswith("task_")}


def write_toml(values: dict[str, Any]) -> str:
    """Flat options as TOML text, then the tables of a list of stages."""
    lines, tables = [], []
    for key, value in values.items():
        if isinstance(value, list):
            tables += [f"\n[[{key}]]\n{write_toml(table)}" for table in value]
            continue
        if isinstance(value, bool):
            text = str(value).lower()
        elif isinstance(value, str):
            text = json.dumps(value, ensure_ascii=False)  # its escapes, of line breaks too, are those of TOML
        else:
            text = repr(value)
        lines.append(f"{key} = {text}\n")
    return "".join(lines + tables)


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


def add_options(
    parser: argparse.ArgumentParser, title: str, cls: type, defaults: Mapping[str, Any] | None = None
) -> None:
    group = parser.add_argument_group(title)
    for f in dataclasses.fields(cls):
        kind, _ = value_type(cls, f.name)
        choices = f.metadata.get("choices")
        metavar = "|".join(choices) if choices else kind.__name__.upper()
        value = (defaults or {}).get(f.name, f.default)
        default = "" if value is None else f" [{value}]"
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
    text = f"algorithms:\n{listed}\n\ndefaults that differ for a built-in model:\n{presets}"
    if len(algos) == 1:  # what its options speak of stands in its own words
        text += f"\n\n--algo {algos[0].name}:\n\n{(sys.modules[algos[0].config.__module__].__doc__ or '').strip()}"
    epilog = []
    for algo in algos if len(algos) > 1 else []:
        own = CommandParser(usage=argparse.SUPPRESS, add_help=False, formatter_class=formatter)
        others = ", ".join(f"{flag(k)} {v}" for k, v in algo.defaults.items())
        title = f"--algo {algo.name}" + (f" (defaults that differ: {others})" if others else "")
        add_options(own, title, algo.config)
        epilog.append(own.format_help().strip())
    parser = CommandParser(
        prog="python -m pymathrl.train",
        description=f"{HEADER}\n\n{text}",
        epilog="\n\n".join(epilog),
        formatter_class=formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--algo", metavar="NAME", help=f"one of {', '.join(REGISTRY)} (needed, except with --resume)")
    parser.add_argument(
        "--config", metavar="FILE.toml",
        help="options from a file, by the same names with _ for -; [[stage]] tables are run one after the other",
    )  # fmt: skip
    parser.add_argument("--resume", metavar="DIR", help="continue the run in DIR from its newest whole checkpoint")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan (model, memory, tokens per step) and exit"
    )
    add_options(parser, "every run", TrainConfig, algos[0].defaults if len(algos) == 1 else None)
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
