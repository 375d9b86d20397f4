"""Reads a JSONL file of objects, one per line; every defect is a UserError with file, line and what was expected."""

import json
import random
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from pymathrl.errors import UserError


def read_objects(path: str | Path, limit: int | None = None) -> list[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of the lines that are not blank, of the first `limit` of them if given; never empty.
    UTF-8, with or without a byte order mark."""
    rows = [(number, decode_object(path, number, line)) for number, line in islice(read_lines(path), limit)]
    if not rows:
        raise UserError(f"{path}: expected one JSON object per line, got an empty file")
    return rows


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes) of the lines that are not blank."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the file ({error.strerror}); give the path of a JSONL file") from None
    # Split bytes at \n only: str.splitlines would also split at U+2028 inside a JSON string.
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield number, line


@lru_cache(maxsize=4)
def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch visits `count` rows: a permutation that follows from (count, seed, epoch)."""
    order = list(range(count))
    random.Random(seed * 1_000_003 + epoch).shuffle(order)
    return order


def fail(path: str | Path, line: int, item: dict[str, Any], field: str, expected: str) -> NoReturn:
    """The error for one bad or missing field of a row."""
    if field in item:
        got = shorten(json.dumps(item[field]))
    else:
        got = f"no such field among {', '.join(map(repr, item)) or 'none'}"
    raise UserError(f"{path}, line {line}: field '{field}' must be {expected}, got {got}")


def read_hint(path: str | Path, line: int, item: dict[str, Any]) -> str:
    """The optional field "hint" of a row: how one may begin, for a policy that fails; "" where there is none."""
    hint = item.get("hint", "")
    if not isinstance(hint, str) or ("hint" in item and not hint.strip()):
        fail(path, line, item, "hint", "a text that is not empty")
    return hint.strip()


def decode_object(path: str | Path, number: int, line: bytes) -> dict[str, Any]:
    """The object that a line holds."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, line {number}: expected UTF-8 text, got byte 0x{line[error.start]:02x} as byte {error.start + 1}"
        ) from None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {number}: expected a JSON object, got {shorten(ascii(text.strip()))} "
            f"({error.msg} at column {error.colno})"
        ) from None
    except (ValueError, RecursionError):  # an integer of more than 4300 digits; brackets nested thousands deep
        raise UserError(
            f"{path}, line {number}: expected a JSON object, got a number or a nesting too large to read"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}, line {number}: expected a JSON object, got {shorten(json.dumps(value))}")
    return value


def shorten(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
