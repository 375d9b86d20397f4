"""Options as dataclass fields: one declaration gives the default, the type, the flag, its help and its check."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any, NoReturn, get_args, get_type_hints

from pymathrl.errors import UserError, nearest


class CommandParser(argparse.ArgumentParser):
    """A command line whose errors are one sentence (UserError), not a usage text and an exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def run_command(run: Callable[[], int], interrupted: str = "interrupted; checkpoints written before are whole") -> int:
    """The exit code of a command: that of `run`; 2 with one sentence on stderr where the input cannot be used or the
    system refuses; 130 with `interrupted` after Ctrl-C."""
    try:
        return run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError) as error:
        # torch's error by its name: a command that needs no torch must not wait seconds for its import
        if not isinstance(error, OSError) and type(error).__name__ != "OutOfMemoryError":
            raise
        print(f"error: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    check: Callable[[Any], bool] | None = None,
    expected: str = "",
) -> Any:
    """A dataclass field that is a flag: `help` says meaning and unit; `check` with `expected` bounds the value."""
    return dataclasses.field(
        default=default, metadata={"help": help, "choices": choices, "check": check, "expected": expected}
    )


def positive(default: Any, help: str) -> Any:
    return option(default, help, check=lambda v: v > 0, expected="more than 0")


def at_least(low: float, default: Any, help: str) -> Any:
    return option(default, help, check=lambda v: v >= low, expected=f"at least {low}")


def share(default: Any, help: str) -> Any:
    return option(default, help, check=lambda v: 0 <= v <= 1, expected="in [0, 1]")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def value_type(cls: type, name: str) -> tuple[type, bool]:
    """(int, float or str, whether None is allowed) of a field."""
    hint = get_type_hints(cls)[name]
    members = [t for t in get_args(hint) if t is not type(None)]
    return (members[0], True) if members else (hint, False)


def convert(cls: type, name: str, value: Any, source: str) -> Any:
    """`value` (text of a flag, or a TOML value) as the field's type, checked; UserError names `source`."""
    kind, optional = value_type(cls, name)
    meta = {f.name: f for f in dataclasses.fields(cls)}[name].metadata
    if value is None and optional:
        return None
    wrong = UserError(f"{source}: expected {kind.__name__}, got {value!r}")
    if kind is str:
        if not isinstance(value, str):
            raise wrong
    else:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise wrong
        try:
            number = float(value) if kind is float else int(value)
        except (ValueError, OverflowError):
            raise wrong from None
        if kind is int and isinstance(value, float) and value != number:
            raise wrong
        value = number
        if not math.isfinite(number):
            raise wrong
    if meta.get("choices") and value not in meta["choices"]:
        raise UserError(f"{source}: got {value!r}; {nearest(str(value), meta['choices'])}")
    if meta.get("check") and not meta["check"](value):
        raise UserError(f"{source}: expected {meta['expected']}, got {value!r}")
    return value
