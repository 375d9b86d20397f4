"""Files that are whole or not there, and failures of the file system in one sentence."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pymathrl.errors import UserError


@contextmanager
def explain_os_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a UserError: what could not be done, the path, the system's words, a way out.

    safetensors reports file-system errors as its own class with `(os error N)` in the text; these are recognised too.
    """
    try:
        yield
    except OSError as error:
        where = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else path
        raise UserError(_os_error_sentence(doing, where, error.errno or 0, error.strerror or str(error))) from error
    except UserError:
        raise
    except Exception as error:
        match = re.search(r"\(os error (\d+)\)", str(error))
        if match is None:
            raise
        number = int(match.group(1))
        raise UserError(_os_error_sentence(doing, path, number, os.strerror(number))) from error


def _os_error_sentence(doing: str, path: Path, number: int, words: str) -> str:
    if number in (errno.ENOSPC, errno.EDQUOT):
        hint = "; free some space or use a folder on another disk"
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "; choose a folder you may write to"
    elif number in (errno.ENOTDIR, errno.EEXIST):
        hint = "; a file stands where a folder is needed"
    else:
        hint = ""
    return f"cannot {doing}: {path}: {words}{hint}"


def fsync_dir(path: Path) -> None:
    """Flushes a folder: a rename in it is then on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        # some network file systems have no fsync of folders: their rename is already synchronous
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace the file `path` by `data`: a reader (and a crash) sees the old content or the new, never a part.
    Raises OSError."""
    tmp = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with open(tmp, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)
