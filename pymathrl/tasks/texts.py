"""Plain texts to predict, from a file: rows {"text": ..} of a JSONL file, or the parts of any other file between blank
lines."""

from pathlib import Path

from pymathrl.errors import UserError
from pymathrl.tasks.jsonl import fail, read_objects


def read_texts(path: str) -> list[str]:
    """The texts of a file; UserError where there is none."""
    if path.endswith(".jsonl"):
        texts = []
        for line, row in read_objects(path):
            if not isinstance(row.get("text"), str) or not row["text"].strip():
                fail(path, line, row, "text", "a text that is not empty")
            texts.append(row["text"])
        return texts
    try:
        texts = [part for part in Path(path).read_text("utf-8").split("\n\n") if part.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path}: cannot be read as UTF-8 text: {error}") from None
    if not texts:
        raise UserError(f"--text {path}: expected texts between blank lines, got an empty file")
    return texts
