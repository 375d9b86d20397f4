"""Rows of data files: JSONL, JSON, CSV, TSV and Parquet, each row an object with the place it stands at.

Every defect is a UserError that names the file, the row and what was expected.
"""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pymathrl.errors import UserError
from pymathrl.tasks.jsonl import decode_object, read_lines, shorten

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
LISTS = ("data", "rows", "train", "test", "examples")  # where a JSON file keeps its list if its top is an object
BATCH = 1024  # rows of a Parquet file made into objects at a time: DAPO's has 1.8 million, most of them repeated
_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


@dataclass(frozen=True)
class Row:
    """One row of a file. place: "rows.jsonl, line 3", as errors name it."""

    place: str
    values: dict[str, Any]

    def get(self, path: str) -> Any:
        """The value under a field name, or under a path into nested ones such as ``prompt[0].content``; None where
        there is none."""
        if path in self.values:
            return self.values[path]
        value: Any = self.values
        for name, index in _STEP.findall(path):
            if name:
                value = value.get(name) if isinstance(value, dict) else None
            else:
                at = int(index)
                value = value[at] if isinstance(value, list) and at < len(value) else None
        return value

    def first(self, paths: Sequence[str]) -> tuple[str, Any]:
        """(path, value) of the first of these paths that leads to something; ("", None) where none does."""
        for path in paths:
            if path and (value := self.get(path)) is not None:
                return path, value
        return "", None

    def fail(self, path: str, expected: str) -> NoReturn:
        """The error of a bad or a missing field."""
        value = self.get(path)
        if value is None and path not in self.values:
            got = f"no such field among {', '.join(map(repr, self.values)) or 'none'}"
        else:
            got = shorten(json.dumps(value, default=str))
        raise UserError(f"{self.place}: field {path!r} must be {expected}, got {got}")


def read_file(path: str | Path, columns: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of one file, by its suffix; never none.

    columns: names of the columns of a CSV or TSV file without a header. It has none if its first line holds none of
    these names.
    """
    path = Path(path)
    readers = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
    if path.suffix in (".csv", ".tsv"):
        rows = _table(path, columns)
    elif path.suffix in readers:
        rows = readers[path.suffix](path)
    else:
        raise UserError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}, got {path.suffix or 'no suffix'}")
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise UserError(f"{path}: expected rows, got an empty file")


def data_files(folder: Path) -> list[Path]:
    """Every data file below a folder, in the order of their paths; hidden ones are left out."""
    found = [f for f in folder.rglob("*") if f.suffix in SUFFIXES and f.is_file()]
    return sorted(f for f in found if not any(part.startswith(".") for part in f.relative_to(folder).parts))


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in read_lines(path):
        yield Row(f"{path}, line {number}", decode_object(path, number, line))


def _json(path: Path) -> Iterator[Row]:
    """A list of objects, an object with such a list under one of `LISTS` or alone, or columns: an object of lists."""
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}: expected JSON, got a text that is none ({error.msg} at column {error.colno})"
            "; a file of one object per line ends in .jsonl"
        ) from None
    except (ValueError, RecursionError):  # an integer of more than 4300 digits; brackets nested thousands deep
        raise UserError(f"{path}: expected JSON, got a number or a nesting too large to read") from None
    if isinstance(value, dict):
        lists = [key for key, inner in value.items() if isinstance(inner, list)]
        chosen = next((key for key in LISTS if key in lists), lists[0] if len(lists) == 1 else None)
        value = value if chosen is None else value[chosen]
    if not isinstance(value, list):
        raise UserError(
            f"{path}: expected a list of objects, or an object with one under {', '.join(LISTS)}, got "
            f"{shorten(json.dumps(value))}"
        )
    for number, item in enumerate(value, 1):
        if not isinstance(item, dict):
            raise UserError(f"{path}, row {number}: expected an object, got {shorten(json.dumps(item))}")
        yield Row(f"{path}, row {number}", item)


def _table(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    csv.field_size_limit(1 << 27)  # the default refuses a field of 131,072 characters; problems with figures have more
    # In a TSV as data sets publish them a quotation mark is a character: MGSM's questions begin and end with some.
    tab = path.suffix == ".tsv"
    lines = _read_text(path).splitlines(keepends=True)
    reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tab else csv.reader(lines)
    header: list[str] | None = None
    try:
        for cells in reader:
            if not cells:
                continue
            if header is None:
                named = not columns or any(name in cells for name in columns)
                header = [name.strip() for name in cells] if named else list(columns)
                if named:
                    continue
            if len(cells) != len(header):
                raise UserError(
                    f"{path}, line {reader.line_num}: expected {len(header)} columns ({', '.join(header)}), got "
                    f"{len(cells)}"
                )
            yield Row(f"{path}, line {reader.line_num}", dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not a table that can be read: {error}") from None


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path}: Parquet files are read with pyarrow, which is not installed; run pip install 'pymathrl[data]', "
            "or give the data as JSONL"
        ) from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", values)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 at byte {error.start + 1}"
        raise UserError(f"{path}: cannot read the file ({reason})") from None
