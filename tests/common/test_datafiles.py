"""Files of examples are read in three shapes, and a bad one is refused with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest

from seedbed.common.datafiles import read_examples
from seedbed.common.errors import DataError
from seedbed.common.examples import Example

QUESTION = {"instruction": "Add.", "prompt": "1 + 1", "choices": ["2", "3"], "label": 0}
ANSWER = {"prompt": "1 + 2", "completion": "3"}
TEXT = {"text": "One and one are two."}
EXAMPLES = [
    Example("1 + 1", ("2", "3"), 0, "Add."),
    Example("1 + 2", ("3",)),
    Example("", ("One and one are two.",)),
]


def lines(path: Path, *records: object) -> Path:
    path.write_text("".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records))
    return path


def test_json_lines_hold_any_of_the_three_shapes_and_blank_lines(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", QUESTION, "", ANSWER, {**TEXT, "source": "ignored"})
    assert read_examples(path) == EXAMPLES
    assert read_examples(str(path)) == EXAMPLES


def test_a_byte_order_mark_is_no_part_of_the_first_example(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(TEXT).encode())
    assert read_examples(path) == EXAMPLES[2:]


def test_parquet_holds_the_same_shapes(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([QUESTION, {**QUESTION, "label": 1}]), path)
    assert [example.label for example in read_examples(path)] == [0, 1]
    # A column that only some rows fill is absent in the others.
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**ANSWER, "text": None}, {**TEXT, "prompt": None}]), path)
    assert read_examples(path) == EXAMPLES[1:]


def test_csv_holds_choices_as_a_json_list_and_text_over_several_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        'instruction,prompt,choices,label\nAdd.,1 + 1,"[""2"", ""3""]",0\n,"two\nlines","[""a"", ""b""]",1\n'
    )
    assert read_examples(path) == [EXAMPLES[0], Example("two\nlines", ("a", "b"), 1)]
    path.write_text("prompt,completion\n1 + 2,3\n")
    assert read_examples(path) == [EXAMPLES[1]]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ('{"prompt": ', "line 2: not valid JSON"),
        ([1, 2], "line 2: expected an object with fields, got list"),
        ({"question": "?", "answer": "!"}, "line 2: unknown shape, the fields are: answer, question"),
        ({}, "line 2: unknown shape, the fields are: none"),
        ({**QUESTION, "label": 2}, "line 2: 'label' is 2, but the 2 choices are numbered 0 to 1"),
        ({**QUESTION, "label": -1}, "line 2: 'label' is -1"),
        ({**QUESTION, "label": "0"}, "line 2: 'label' must be an integer, got '0'"),
        ({**QUESTION, "label": True}, "line 2: 'label' must be an integer, got True"),
        ({**QUESTION, "choices": ["2"]}, "line 2: 'choices' needs at least 2 answers, got 1"),
        ({**QUESTION, "choices": "23"}, "line 2: 'choices' must be a list of non-empty strings"),
        ({**QUESTION, "choices": ["2", 3]}, "line 2: 'choices' must be a list of non-empty strings"),
        ({**QUESTION, "prompt": " "}, "line 2: 'prompt' is empty"),
        ({**ANSWER, "completion": 3}, "line 2: 'completion' must be a string, got int"),
        ('{"text": "\\ud83d"}', "line 2: 'text' holds half of a surrogate pair"),
    ],
)
def test_a_bad_record_is_refused_with_file_and_line(tmp_path: Path, record: object, reason: str) -> None:
    path = lines(tmp_path / "a.jsonl", TEXT, record)
    with pytest.raises(DataError) as refusal:
        read_examples(path)
    assert refusal.value.message.startswith(f"{path}, {reason}")
    assert refusal.value.hint


def test_an_unknown_shape_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError) as refusal:
        read_examples(lines(tmp_path / "a.jsonl", {"question": "?"}))
    assert refusal.value.hint == "Expected prompt/choices/label, prompt/completion or text."


def test_bad_csv_and_parquet_are_refused_with_their_place(tmp_path: Path) -> None:
    table, columns = tmp_path / "a.csv", tmp_path / "a.parquet"
    table.write_text('prompt,choices,label\n1 + 1,"[""2"", ""3""]",0\n1 + 2,2;3,1\n')
    with pytest.raises(DataError, match=r"a\.csv, line 3: 'choices' is not a JSON list"):
        read_examples(table)
    table.write_text("prompt,completion\n1 + 1,2,3\n")
    with pytest.raises(DataError, match=r"a\.csv, line 2: expected 2 columns"):
        read_examples(table)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([QUESTION, {**QUESTION, "label": 5}]), columns)
    with pytest.raises(DataError, match=r"a\.parquet, row 2: 'label' is 5"):
        read_examples(columns)
    columns.write_bytes(b"no table")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_examples(columns)


def test_bytes_that_are_no_text_are_refused_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(TEXT).encode() + b"\n\xff\xfe\n")
    with pytest.raises(DataError, match="line 2: not UTF-8 text"):
        read_examples(path)


def test_an_empty_a_missing_and_an_odd_file_are_refused(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv"):
        (tmp_path / name).write_text("\n")
        with pytest.raises(DataError, match="holds no examples"):
            read_examples(tmp_path / name)
    with pytest.raises(DataError, match="there is no data file"):
        read_examples(tmp_path / "missing.jsonl")
    (tmp_path / "a.xlsx").write_text("")
    with pytest.raises(DataError, match="not a file of a known kind"):
        read_examples(tmp_path / "a.xlsx")


def test_a_data_set_that_no_hub_has_is_a_readable_refusal() -> None:
    with pytest.raises(DataError, match="neither a data file here nor a reachable data set of the hub"):
        read_examples("nobody/nothing")
