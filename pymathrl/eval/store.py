"""The folder of an evaluation: what it was asked for, and the samples so far, so that it can be cut short and go on.

    DIR/settings.json           how the samples are drawn, the models and the tasks; other settings are refused
    DIR/samples/NAME.jsonl      of each model on each task, a line per sample (fields: `record.Sample`, and set, model,
                                seed); the lines of a problem are added together once all of its samples are there
    DIR/times/NAME.jsonl        of --budget-s, a line per measured batch (fields: `budget.Timing`, and what it ran on)
    DIR/summary.json table.md plots.png    written at the end
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

from pymathrl.errors import UserError
from pymathrl.eval.budget import Timing
from pymathrl.eval.record import Sample
from pymathrl.files import explain_os_errors, write_atomic

FORMAT = 1
Line = TypeVar("Line")


class Store:
    """The samples of one evaluation in a folder. Made by `open_store`."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings

    def agree(self, part: str, name: str, value: Mapping[str, Any]) -> None:
        """Notes settings.json[part][name] = value; UserError where the folder has samples made with another value."""
        known = self.settings.setdefault(part, {}).get(name)
        value = json.loads(json.dumps(value))
        if known is None:
            self.settings[part][name] = value
            path = self.folder / "settings.json"
            with explain_os_errors("write the evaluation", path):
                write_atomic(path, json.dumps(self.settings, indent=1, ensure_ascii=False).encode())
            return
        for key in sorted(known.keys() | value.keys()):
            if known.get(key) != value.get(key):
                raise UserError(
                    f"--out {self.folder}: its samples were made with {key} = {known.get(key)!r} ({part} {name}), now "
                    f"it is {value.get(key)!r}; give the same settings to go on, or another folder"
                )

    def read(self, model: str, task: str, problems: Sequence[int], samples: int) -> dict[int, list[Sample]]:
        """Of each problem (by uid) that is whole, its samples in order; what a stop left half written is dropped."""
        found: dict[int, list[Sample]] = {}
        for sample in _read_lines(self.path(model, task), Sample.read, "a sample"):
            found.setdefault(sample.id, []).append(sample)
        wanted = set(problems)
        return {
            uid: sorted(rows, key=lambda s: s.sample)
            for uid, rows in found.items()
            if uid in wanted and sorted(s.sample for s in rows) == list(range(samples))
        }

    def add(self, model: str, task: str, samples: Sequence[Sample]) -> None:
        """Appends the samples of finished problems."""
        path = self.path(model, task)
        with explain_os_errors("write the samples", path), open(path, "ab") as file:
            file.write(self._lines(model, task, samples))
            file.flush()
            os.fsync(file.fileno())

    def rewrite(self, model: str, task: str, samples: Sequence[Sample]) -> None:
        """Replaces the file by these samples."""
        path = self.path(model, task)
        with explain_os_errors("write the samples", path):
            write_atomic(path, self._lines(model, task, samples))

    def read_times(self, model: str, task: str, conditions: Mapping[str, Any]) -> list[Timing]:
        """The batches that were measured under these conditions; times of another machine say nothing of this one."""

        def read(row: dict[str, Any]) -> Timing | None:
            timing = Timing(*(row[f.name] for f in fields(Timing)))
            return timing if conditions.items() <= row.items() else None

        return [t for t in _read_lines(self.path(model, task, "times"), read, "a measured batch") if t is not None]

    def add_time(self, model: str, task: str, timing: Timing, conditions: Mapping[str, Any]) -> None:
        """Adds a measured batch."""
        path = self.path(model, task, "times")
        row = {"set": task, "model": model, **asdict(timing), **conditions}
        with explain_os_errors("write the times", path):
            before = path.read_bytes() if path.exists() else b""
            write_atomic(path, before + json.dumps(row).encode() + b"\n")

    def path(self, model: str, task: str, kind: str = "samples") -> Path:
        """A readable name, and a number that keeps names apart which differ in other characters."""
        clean = [re.sub(r"[^A-Za-z0-9._-]+", "-", name)[-40:].strip("-.") for name in (model, task)]
        number = crc32(json.dumps([model, task]).encode())
        return self.folder / kind / f"{'--'.join(clean)}-{number:08x}.jsonl"

    def _lines(self, model: str, task: str, samples: Sequence[Sample]) -> bytes:
        seed = self.settings["sampling"]["all"]["seed"]
        rows = (s.line(set=task, model=model, seed=seed) for s in samples)
        return "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows).encode()


def _read_lines(path: Path, read: Callable[[dict[str, Any]], Line], what: str) -> list[Line]:
    """What `read` makes of the objects in the lines of a file that may be missing; of a line that a stop cut short,
    nothing. read: KeyError or TypeError where the object is not one of this version."""
    if not path.exists():
        return []
    with explain_os_errors("read the evaluation", path):
        lines = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            if line:
                found.append(read(json.loads(line)))
        except (ValueError, KeyError, TypeError):
            if number < len(lines):  # else the last line of a write that was cut short: it has no line end
                raise UserError(
                    f"{path}, line {number}: not {what} of this version; move the folder away to start over"
                ) from None
    return found


@contextmanager
def open_store(folder: Path) -> Iterator[Store]:
    """The store of a folder, which is made where it is missing; UserError where another process writes to it."""
    with explain_os_errors("write the evaluation", folder):
        for kind in ("samples", "times"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115 - open as long as the store
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--out {folder}: another evaluation is writing to it; wait, or give another folder"
            ) from None
        path = folder / "settings.json"
        settings: dict[str, Any] = {"format": FORMAT}
        if path.exists():
            try:
                settings = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                settings = {}
            if not isinstance(settings, dict) or settings.get("format") != FORMAT:
                raise UserError(f"{path}: not the settings of an evaluation of this version; give another --out")
        if not any(file.stat().st_size for file in folder.glob("*/*.jsonl")):
            settings = {"format": FORMAT}  # one that ended before its first sample binds nobody
        yield Store(folder, settings)
