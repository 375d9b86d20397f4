"""Atomic snapshots of a run: a checkpoint is whole or it does not exist, and a damaged one is recognised.

    RUN/checkpoints/step-N/                 the model in Hugging Face layout, written by the caller
    RUN/checkpoints/step-N/trainer/         state.json (plain values), state.pt (tensors), manifest.json

Order of a save: write everything into `.tmp-step-N-<pid>/`, fsync each file and folder, rename to `step-N`, fsync the
parent, and only then drop older ones. A kill at any moment therefore leaves the earlier checkpoints as they were.
The manifest has size and sha256 of each file, so a torn or rotten file is found on reading, and the checkpoint before
it is used.  Failures of the file system become one-sentence `UserError`s.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from pymathrl.errors import UserError
from pymathrl.files import explain_os_errors, fsync_dir, write_atomic

_log = logging.getLogger(__name__)

_STEP_DIR = re.compile(r"step-(\d+)")
_REPLACED_DIR = re.compile(r"\.replaced-(step-\d+)-\d+")
_MANIFEST = "trainer/manifest.json"
_PLAIN, _TENSORS = "trainer/state.json", "trainer/state.pt"
_FORMAT = 1
_CHUNK_BYTES = 1 << 22


# --- trainer state --------------------------------------------------------------------------------------------------


def _is_plain(value: object) -> bool:
    """True where JSON gives back an equal value of the same type (so: no tuple, no int keys, no nan)."""
    if type(value) is float:
        return math.isfinite(value)
    if type(value) is list:
        return all(_is_plain(v) for v in value)
    if type(value) is dict:
        return all(type(k) is str and _is_plain(v) for k, v in value.items())
    return value is None or type(value) in (bool, int, str)


def _check_loadable(value: object, where: str) -> None:
    """Refuse at save time what torch.load(weights_only=True) would refuse at resume time."""
    if value is None or isinstance(value, torch.Tensor) or type(value) in (bool, int, float, complex, str, bytes):
        return
    if isinstance(value, list | tuple | set) and type(value) in (list, tuple, set):
        for i, item in enumerate(value):
            _check_loadable(item, f"{where}[{i}]")
        return
    if isinstance(value, dict) and type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_loadable(key, f"a key of {where}")
            _check_loadable(item, f"{where}[{key!r}]")
        return
    raise TypeError(
        f"save_checkpoint: {where} has type {type(value).__name__}; state may hold tensors, numbers, strings, bytes, "
        "None, lists, tuples, sets and dicts only, so convert it (an array: torch.from_numpy, a numpy number: .item())"
    )


class _ErrorKeeper(io.BufferedWriter):
    """torch.save hides a full disk behind "unexpected pos N vs M" (its zip writer fails once more while closing):
    keep the first OSError."""

    first_error: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.first_error = self.first_error or error
            raise


def _save_tensors(state: dict[str, Any], path: Path) -> None:
    with _ErrorKeeper(io.FileIO(path, "w")) as f:
        try:
            torch.save(state, f)
        except RuntimeError as error:
            if f.first_error is not None:
                raise f.first_error from error
            raise


def _save_state(state: dict[str, Any], folder: Path) -> None:
    for key, value in state.items():
        if type(key) is not str:
            raise TypeError(f"save_checkpoint: keys of state must be strings, got {key!r}")
        _check_loadable(value, f"state[{key!r}]")
    plain = {k: v for k, v in state.items() if _is_plain(v)}
    (folder / "trainer").mkdir()
    (folder / _PLAIN).write_text(json.dumps(plain, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    _save_tensors({k: v for k, v in state.items() if k not in plain}, folder / _TENSORS)


def load_state(path: str | Path) -> dict[str, Any]:
    """The `state` given to save_checkpoint, tensors on the CPU.   path: a checkpoint folder, as latest_checkpoint
    returns it (which has checked it)."""
    folder = Path(path)
    try:
        state: dict[str, Any] = json.loads((folder / _PLAIN).read_bytes())
        with open(folder / _TENSORS, "rb") as f:
            state.update(torch.load(f, map_location="cpu", weights_only=True))
    except OSError as error:
        raise UserError(
            f"cannot read the trainer state: {error.filename or folder}: {error.strerror or error}"
        ) from error
    # a damaged zip or pickle can raise nearly anything, and each means the same to the reader
    except Exception as error:
        raise UserError(
            f"cannot read the trainer state of {folder}: the file is damaged ({type(error).__name__}); "
            "use an earlier checkpoint"
        ) from error
    return state


# --- checkpoints ----------------------------------------------------------------------------------------------------


def _sync_and_describe(path: Path) -> dict[str, Any]:
    """fsync a file and return its manifest entry."""
    with open(path, "rb") as f:
        digest = hashlib.sha256()
        while chunk := f.read(_CHUNK_BYTES):
            digest.update(chunk)
        os.fsync(f.fileno())
        return {"bytes": f.tell(), "sha256": digest.hexdigest()}


def _seal(folder: Path, step: int) -> None:
    """Write the manifest, then make every file and folder below `folder` durable."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    entries = {p.relative_to(folder).as_posix(): _sync_and_describe(p) for p in files}
    manifest = folder / _MANIFEST
    manifest.write_text(
        json.dumps({"format": _FORMAT, "step": step, "files": entries}, indent=1) + "\n", encoding="utf-8"
    )
    _sync_and_describe(manifest)
    for d in [p for p in folder.rglob("*") if p.is_dir()] + [folder]:
        fsync_dir(d)


def save_checkpoint(
    run_dir: str | Path, step: int, write: Callable[[Path], None], state: dict[str, Any], *, keep: int = 2
) -> Path:
    """Save one checkpoint atomically and durably; return its folder RUN/checkpoints/step-N.

    write(folder): puts the model there.   state: all else that a resume needs; string keys, values as
    `_check_loadable` lists. keep: checkpoints left of the steps up to this one, this one included; older ones go only
    when it is durable. Raises UserError where the file system refuses (earlier checkpoints stay as they are); what
    `write` raises otherwise passes through.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"save_checkpoint: needs step >= 0 and keep >= 1, got step = {step}, keep = {keep}")
    root = Path(run_dir) / "checkpoints"
    final, tmp = root / f"step-{step}", root / f".tmp-step-{step}-{os.getpid()}"
    with explain_os_errors(f"save the checkpoint of step {step} (earlier checkpoints are intact)", tmp):
        root.mkdir(parents=True, exist_ok=True)
        if tmp.exists():
            shutil.rmtree(tmp)
        try:
            tmp.mkdir()
            write(tmp)
            _save_state(state, tmp)
            _seal(tmp, step)
            _publish(tmp, final)
        except BaseException:
            # best effort: what stays is a .tmp- folder, which the next start removes
            shutil.rmtree(tmp, ignore_errors=True)
            raise
    with explain_os_errors(f"remove old checkpoints (that of step {step} is saved)", root):
        for old, _ in [c for c in _list_checkpoints(root) if c[0] <= step][keep:]:
            doomed = root / f".tmp-step-{old}-{os.getpid()}"
            # first out of sight: a kill during the removal must not leave half a step-N
            os.rename(root / f"step-{old}", doomed)
            shutil.rmtree(doomed)
    return final


def _publish(tmp: Path, final: Path) -> None:
    """tmp -> final.  A checkpoint of the same step steps aside first (rename cannot replace a filled folder);
    clean_checkpoints puts it back after a kill."""
    aside = final.with_name(f".replaced-{final.name}-{os.getpid()}")
    replacing = final.exists()
    if replacing:
        os.rename(final, aside)
    try:
        os.rename(tmp, final)
    except OSError:
        if replacing:
            os.rename(aside, final)
        raise
    fsync_dir(final.parent)
    if replacing:
        shutil.rmtree(aside)


def clean_checkpoints(run_dir: str | Path) -> list[str]:
    """Remove what killed saves left behind; return the names removed.  Call once when a run starts, never while
    another process saves there."""
    root = Path(run_dir) / "checkpoints"
    if not root.is_dir():
        return []
    removed = []
    with explain_os_errors("remove unfinished checkpoints", root):
        for path in sorted(root.iterdir()):
            replaced = _REPLACED_DIR.fullmatch(path.name)
            if replaced and not (root / replaced.group(1)).exists():
                os.rename(path, root / replaced.group(1))
            elif replaced or path.name.startswith(".tmp-"):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
                removed.append(path.name)
    return removed


def _list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder), newest first."""
    found = [(int(m.group(1)), p) for p in root.iterdir() if (m := _STEP_DIR.fullmatch(p.name)) and p.is_dir()]
    return sorted(found, reverse=True)


def check_checkpoint(path: str | Path) -> str | None:
    """None when every file has the size and sha256 of the manifest, else the reason in words.  Reads the whole
    checkpoint once."""
    folder = Path(path)
    try:
        raw = (folder / _MANIFEST).read_bytes()
    except OSError as error:
        return f"{_MANIFEST}: {error.strerror}"
    try:
        manifest = json.loads(raw)
        if manifest["format"] != _FORMAT:
            return f"{_MANIFEST}: format {manifest['format']!r}, this version reads {_FORMAT}"
        name, files = (
            f"step-{manifest['step']}",
            {str(k): (int(v["bytes"]), str(v["sha256"])) for k, v in manifest["files"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_MANIFEST}: damaged ({type(error).__name__})"
    if _STEP_DIR.fullmatch(folder.name) and folder.name != name:
        return f"{_MANIFEST}: written for {name}"
    if missing := {_PLAIN, _TENSORS} - files.keys():
        return f"{_MANIFEST}: does not list {min(missing)}"
    for file, (size, sha256) in files.items():
        try:
            actual = (folder / file).stat().st_size
            if actual != size:
                return f"{file}: {actual} bytes instead of {size}"
            with open(folder / file, "rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() != sha256:
                    return f"{file}: content differs from its sha256"
        except OSError as error:
            return f"{file}: {error.strerror}"
    return None


def latest_checkpoint(run_dir: str | Path, on_skip: Callable[[str], None] = _log.warning) -> tuple[int, Path] | None:
    """(step, folder) of the newest checkpoint that is whole, or None when there is none.

    on_skip gets one sentence for each damaged newer one.  Only reads, so it is safe beside a running job.  UserError
    when RUN_DIR is not a folder.
    """
    run = Path(run_dir)
    if not run.is_dir():
        raise UserError(f"cannot resume: {run} is not a run folder; give the folder that --out named")
    root = run / "checkpoints"
    if not root.is_dir():
        return None
    for step, path in _list_checkpoints(root):
        reason = check_checkpoint(path)
        if reason is None:
            return step, path
        on_skip(f"checkpoint {path} is damaged and is skipped: {reason}")
    return None


def hash_parameters(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """sha256 (hex) over names, dtypes, shapes and bytes, in the order of the names: equal exactly when all parameters
    are bit for bit equal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- what a resume must undo ----------------------------------------------------------------------------------------


def truncate_metrics(run_dir: str | Path, step: int) -> int:
    """Drop the lines of steps after `step` from metrics.jsonl and samples.jsonl, so that repeating these steps
    doubles nothing; return the lines dropped.

    Call on resume, before RunLog opens the files; step = -1 drops all.  A partial last line (the process died while
    writing it) is dropped too; a broken line elsewhere is a UserError with file and line number.  Each file is
    replaced atomically.
    """
    dropped = 0
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = Path(run_dir) / name
        with explain_os_errors("rewind the logs for a resume", path):
            if not path.exists():
                continue
            lines = path.read_bytes().splitlines(keepends=True)
            kept = []
            for i, line in enumerate(lines):
                try:
                    line_step = int(json.loads(line)["step"])
                except (ValueError, KeyError, TypeError) as error:
                    if i == len(lines) - 1:
                        continue
                    raise UserError(
                        f"{path}, line {i + 1}: not a JSON object with a step; "
                        "mend or delete this line, then resume again"
                    ) from error
                if line_step <= step:
                    kept.append(line.rstrip(b"\n") + b"\n")  # a whole last line may lack the newline only
            if kept != lines:
                write_atomic(path, b"".join(kept))
                dropped += len(lines) - len(kept)
    return dropped
