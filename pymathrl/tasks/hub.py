"""Where the files of a data set are: a folder on this machine, or a repository on the Hugging Face hub."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pymathrl.errors import UserError
from pymathrl.tasks.readers import SUFFIXES, data_files

VARIABLE = "PYMATHRL_DATA"  # a folder with one folder per data set, named as in `datasets.DATASETS`
TRAIN, TEST, OTHER = {"train", "training"}, {"test", "testing"}, {"validation", "valid", "val", "dev"}


@dataclass(frozen=True)
class Files:
    """Of a train and a test split; plain: of those that name no split."""

    train: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()
    plain: tuple[Path, ...] = ()


def find_folder(name: str, hub: str, path: str, data: str) -> Path:
    """The folder, or the file, of a data set: `path` if one is given; else the one of its name in the folder `data`, or
    in that of the environment's variable, or such a folder itself; else a copy of its repository."""
    if path:
        found = Path(path).expanduser()
        if not found.exists():
            raise UserError(f"task {name}:{path}: no such file or folder")
        return found
    if data:
        folder = Path(data).expanduser()
        if not folder.is_dir():
            raise UserError(f"--task-data {data}: expected a folder with the files of {name}, or with a folder {name}")
        return folder / name if (folder / name).is_dir() else folder
    root = os.environ.get(VARIABLE)
    if root and (Path(root).expanduser() / name).is_dir():
        return Path(root).expanduser() / name
    # not at the top: it takes a second, and most tasks need no hub
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    where = f"a folder {name} in {VARIABLE}={root}" if root else f"{VARIABLE}, which is not set"
    try:
        return Path(snapshot_download(hub, repo_type="dataset", allow_patterns=[f"*{s}" for s in SUFFIXES]))
    except LocalEntryNotFoundError as error:  # no connection, or HF_HUB_OFFLINE=1, and not in the cache either
        raise UserError(
            f"task {name}: its files are not in {where}, not in the Hugging Face cache, and the hub cannot be reached; "
            f"name them (--task {name}:PATH or --task-data DIR), or fetch {hub} once while online"
        ) from error
    except (OSError, ValueError) as error:  # what else the hub client raises: no such name, not allowed, disk full
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"task {name}: its files are not in {where}, and {hub} could not be fetched from the Hugging Face hub "
            f"({reason}); name them: --task {name}:PATH or --task-data DIR"
        ) from error


def split_files(folder: Path, config: str = "", subset: str = "") -> Files:
    """The data files of a folder by the words in their paths, as in data/train-00000-of-00001.parquet or
    en-hard.jsonl. subset: words that must stand there; config: those that are preferred, where some file has them."""
    if folder.is_file():
        return Files(plain=(folder,))
    files = {file: _words(file.relative_to(folder)) for file in data_files(folder)}
    if subset:
        chosen = {f: words for f, words in files.items() if _words(Path(subset)) <= words}
        if not chosen:
            raise UserError(f"{folder}: expected a data file of {subset}, got {_listed(files)}")
        files = chosen
    if config and any(_words(Path(config)) <= words for words in files.values()):
        files = {f: words for f, words in files.items() if _words(Path(config)) <= words}
    if not files:
        raise UserError(f"{folder}: expected data files ({', '.join(SUFFIXES)}), got none")
    train = tuple(f for f, words in files.items() if words & TRAIN)
    test = tuple(f for f, words in files.items() if words & TEST)
    plain = tuple(f for f, words in files.items() if not words & (TRAIN | TEST | OTHER))
    return Files(train, test, plain)


def _words(path: Path) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", path.as_posix().lower()))


def _listed(files: Sequence[Path] | dict[Path, set[str]]) -> str:
    names = [f.name for f in files]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"
