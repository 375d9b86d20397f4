"""Rows of every file format, nested fields, and each defect as one sentence that names the place."""

import json

import pytest

from pymathrl.errors import UserError
from pymathrl.tasks.hub import split_files
from pymathrl.tasks.readers import Row, data_files, read_file

ROWS = [{"question": "1+1?", "answer": "2"}, {"question": 'a\u2028b, "c"', "answer": "0,5"}]


def values(path, columns=()):
    return [row.values for row in read_file(path, columns)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"question": "1+1?", "answer": "2"}\n\n{"question": "a\u2028b, \\"c\\"", "answer": "0,5"}\n'),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps({"version": 1, "data": ROWS})),
        ("a.json", json.dumps({"anything": ROWS})),
        ("a.json", "\ufeff" + json.dumps(ROWS)),
    ],
)
def test_json_in_its_forms(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert values(tmp_path / name) == ROWS


def test_tables(tmp_path):
    (tmp_path / "a.csv").write_text('question,answer\n"1+1, or ""2""?\nsay",2\n', encoding="utf-8")
    assert values(tmp_path / "a.csv") == [{"question": '1+1, or "2"?\nsay', "answer": "2"}]
    # in a TSV a quotation mark is a character, and without a header the columns are told
    (tmp_path / "a.tsv").write_text('"Two" and two?\t4\nThree?\t3\n', encoding="utf-8")
    assert values(tmp_path / "a.tsv", ("question", "answer_number")) == [
        {"question": '"Two" and two?', "answer_number": "4"}, {"question": "Three?", "answer_number": "3"},
    ]  # fmt: skip
    (tmp_path / "b.tsv").write_text("question\tanswer_number\nThree?\t3\n", encoding="utf-8")
    assert values(tmp_path / "b.tsv", ("question", "answer_number")) == [{"question": "Three?", "answer_number": "3"}]
    (tmp_path / "wide.csv").write_text("question,answer\n" + "x" * 200_000 + ",1\n")
    assert len(values(tmp_path / "wide.csv")[0]["question"]) == 200_000


def test_parquet_with_nested_columns(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: the extra 'data'")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"prompt": [{"role": "user", "content": f"{i}+1?"}], "reward_model": {"ground_truth": str(i + 1)}}
        for i in range(3000)  # more than one batch
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = list(read_file(tmp_path / "a.parquet"))
    assert len(read) == 3000 and read[2999].place.endswith("a.parquet, row 3000")
    assert [row.get("prompt[0].content") for row in read[:2]] == ["0+1?", "1+1?"]
    assert read[5].get("reward_model.ground_truth") == "6"
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"bad.parquet: cannot be read as Parquet"):
        list(read_file(tmp_path / "bad.parquet"))


def test_paths_into_a_row():
    row = Row("here", {"a": [{"b": 1}, [2, 3]], "a.b": "dotted", "none": None})
    assert row.get("a[0].b") == 1 and row.get("a[1][1]") == 3 and row.get("a.b") == "dotted"
    assert [row.get(path) for path in ("a[2].b", "a.x", "a[0].c.d", "z", "none")] == [None] * 5
    assert row.first(("z", "none", "a[0].b")) == ("a[0].b", 1) and row.first(("z",)) == ("", None)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n[2]\n', "a.jsonl, line 2: expected a JSON object"),
        ("a.jsonl", "", "expected rows, got an empty file"),
        ("a.json", "[]", "expected rows, got an empty file"),
        ("a.json", '{"a": 1}\n{"a": 2}\n', "a.json, line 2: expected JSON, .* one object per line ends in .jsonl"),
        ("a.json", '{"a": 1}', "expected a list of objects, or an object with one under data, rows"),
        ("a.json", '[{"a": 1}, 2]', "a.json, row 2: expected an object, got 2"),
        ("a.json", "[" * 100_000, "expected JSON, got a number or a nesting too large"),
        ("a.csv", "a,b\n1,2\n1\n", r"a.csv, line 3: expected 2 columns \(a, b\), got 1"),
        ("a.csv", "a,b\n", "expected rows, got an empty file"),
        ("a.txt", "x", "expected a file that ends in .jsonl, .json, .parquet, .csv, .tsv, got .txt"),
    ],
)
def test_defects(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        list(read_file(tmp_path / name))


def test_files_that_cannot_be_read(tmp_path):
    for name in ("none.json", "none.jsonl", "none.csv"):
        with pytest.raises(UserError, match=f"{name}: cannot read the file"):
            list(read_file(tmp_path / name))
    (tmp_path / "latin.csv").write_bytes(b"a\n\xe9\n")
    with pytest.raises(UserError, match="not UTF-8 at byte 3"):
        list(read_file(tmp_path / "latin.csv"))


def test_the_files_of_a_split(tmp_path):
    names = (
        "README.md", ".cache/train.jsonl", "main/train-00000-of-00002.parquet", "main/train-00001-of-00002.parquet",
        "main/test-00000-of-00001.parquet", "socratic/train-00000-of-00001.parquet", "main/validation.jsonl",
    )  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert len(data_files(tmp_path)) == 5
    files = split_files(tmp_path, config="main")
    assert [f.name[:11] for f in files.train] == ["train-00000", "train-00001"] and len(files.test) == 1
    assert files.plain == ()
    assert len(split_files(tmp_path, config="absent").train) == 3  # a preference, not a condition
    with pytest.raises(UserError, match="expected a data file of en-hard, got test-00000"):
        split_files(tmp_path, subset="en-hard")
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "OlymMATH-EN-HARD.jsonl").touch()
    (tmp_path / "sets" / "OlymMATH-EN-EASY.jsonl").touch()
    assert [f.name for f in split_files(tmp_path / "sets", subset="en-hard").plain] == ["OlymMATH-EN-HARD.jsonl"]
    one = tmp_path / "main" / "validation.jsonl"
    assert split_files(one).plain == (one,)
