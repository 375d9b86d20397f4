import pytest

from pymathrl.errors import UserError
from pymathrl.tasks.jsonl import read_objects


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"a": 1}\r\n\n  \n{"a": "x\u2028y"}'.encode())
    assert read_objects(path) == [(1, {"a": 1}), (4, {"a": "x\u2028y"})]
    assert read_objects(path, limit=1) == [(1, {"a": 1})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected one JSON object per line, got an empty file"),
        (b"\n \n", "got an empty file"),
        (b"\xef\xbb\xbf", "got an empty file"),
        (b'{"a": 1}\n{"a": ', "line 2: expected a JSON object, got '{\"a\":' (Expecting value at column 7"),
        (b'{"a": 1}\nnot json\n', "line 2: expected a JSON object, got 'not json'"),
        (b"[1, 2]", "line 1: expected a JSON object, got [1, 2]"),
        (b"7", "line 1: expected a JSON object, got 7"),
        (b'{"a": 1}\n{"a": "\xe9"}', "line 2: expected UTF-8 text, got byte 0xe9 as byte 8"),
        ('{"a": 1}'.encode("utf-16"), "line 1: expected UTF-8 text, got byte 0xff"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 1: expected a JSON object, got a number or a nesting too large"),
        (b"[" * 200_000, "line 1: expected a JSON object, got"),
    ],
)
def test_broken_files(tmp_path, content, message):
    path = tmp_path / "broken.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_objects(path)
    text = str(error.value)
    assert text.startswith(str(path)) and message in text
    assert "\n" not in text and len(text) < 300 + len(str(path))


def test_unreadable(tmp_path):
    for path in (tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(UserError, match="cannot read the file"):
            read_objects(path)
