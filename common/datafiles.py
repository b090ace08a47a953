"""Examples from files: JSON lines, Parquet or CSV in one of three shapes, or a data set of the hub.

    {"prompt": str, "choices": [str, str, …], "label": int}     a question with its answers
    {"prompt": str, "completion": str}                          a question with one answer
    {"text": str}                                               plain text

Each may carry an `instruction`; other fields are ignored. In CSV, `choices` is a JSON list.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from seedbed.common.errors import DataError
from seedbed.common.examples import Example

Row = tuple[str, Any]
"""Where a record stands (`FILE, line N`) and the record."""
SHAPES = "prompt/choices/label, prompt/completion or text"


def read_examples(location: str | Path) -> list[Example]:
    """Read every example of a file or of a hub data set's split `train`.

    Args:
        location: a .jsonl (.json, .ndjson), .parquet or .csv file; else a hub id, ``owner/name`` or
            ``owner/name:config``.

    Raises:
        DataError: naming file and line, if anything there is missing, malformed or of no known shape, or if there is
            nothing.
    """
    path = Path(location).expanduser()
    reader = _READERS.get(path.suffix.lower())
    if reader is None and path.exists():
        raise DataError(f"{path} is not a file of a known kind", f"Use {', '.join(sorted(_READERS))}.")
    if reader is not None and not path.is_file():
        raise DataError(f"there is no data file {path}", "Check the path.")
    rows = reader(path) if reader is not None else _hub(str(location))
    examples = [to_example(record, where) for where, record in rows]
    if not examples:
        raise DataError(f"{location} holds no examples", f"Give it at least one record of the shape {SHAPES}.")
    return examples


def to_example(record: Any, where: str) -> Example:
    """Turn one record into an example; `where` opens the message of any error.

    Raises:
        DataError: if the record has none of the three shapes or a field has the wrong type or value.
    """
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object with fields, got {type(record).__name__}", f"Shapes: {SHAPES}.")
    present = {key for key, value in record.items() if value is not None}
    instruction = _string(record, "instruction", where, empty=True) if "instruction" in present else ""
    if {"prompt", "choices", "label"} <= present:
        choices = _choices(record["choices"], where)
        label = _label(record["label"], len(choices), where)
        return Example(_string(record, "prompt", where), choices, label, instruction)
    if {"prompt", "completion"} <= present:
        return Example(
            _string(record, "prompt", where), (_string(record, "completion", where),), instruction=instruction
        )
    if "text" in present:
        return Example("", (_string(record, "text", where),), instruction=instruction)
    found = ", ".join(sorted(map(str, present))) or "none"
    raise DataError(f"{where}: unknown shape, the fields are: {found}", f"Expected {SHAPES}.")


def _string(record: dict[str, Any], field: str, where: str, empty: bool = False) -> str:
    value = record[field]
    if not isinstance(value, str):
        raise DataError(f"{where}: '{field}' must be a string, got {type(value).__name__}", "Put the text in quotes.")
    if not empty and not value.strip():
        raise DataError(f"{where}: '{field}' is empty", "Fill it in, or leave the record out.")
    if any("\ud800" <= character <= "\udfff" for character in value):  # JSON can spell them, no tokenizer can read them
        raise DataError(f"{where}: '{field}' holds half of a surrogate pair", "Save the file as UTF-8.")
    return value


def _choices(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(choice, str) and choice.strip() for choice in value):
        raise DataError(f"{where}: 'choices' must be a list of non-empty strings", 'Example: ["yes", "no"]')
    if len(value) < 2:
        raise DataError(
            f"{where}: 'choices' needs at least 2 answers, got {len(value)}",
            "For one right answer use the shape prompt/completion.",
        )
    return tuple(value)


def _label(value: Any, count: int, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(
            f"{where}: 'label' must be an integer, got {value!r}", "It is the index of the right choice, from 0."
        )
    if not 0 <= value < count:
        raise DataError(
            f"{where}: 'label' is {value}, but the {count} choices are numbered 0 to {count - 1}", "Count from 0."
        )
    return value


def _json_lines(path: Path) -> Iterator[Row]:
    for where, line in _lines(path):
        if line.strip():
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{where}: not valid JSON ({error.msg} at column {error.colno})", "One JSON object on each line."
                ) from None


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines decoded one by one, so that a wrong byte is found with its line number."""
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                yield f"{path}, line {number}", raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise DataError(f"{path}, line {number}: not UTF-8 text", "Save the file as UTF-8.") from None


def _csv(path: Path) -> Iterator[Row]:
    reader = csv.DictReader((line for _, line in _lines(path)), strict=True)
    try:
        for record in reader:
            where = f"{path}, line {reader.line_num}"
            if None in record or None in record.values():
                raise DataError(
                    f"{where}: expected {len(reader.fieldnames or ())} columns", "Quote fields with commas."
                )
            yield where, _typed(record, where)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV ({error})", "Check the quotes.") from None


def _typed(record: dict[str, str], where: str) -> dict[str, Any]:
    """A CSV record, all strings, with `choices` as a list and `label` as an integer; an empty field is absent."""
    typed: dict[str, Any] = {key: value for key, value in record.items() if value != ""}
    if "choices" in typed:
        try:
            typed["choices"] = json.loads(typed["choices"])
        except json.JSONDecodeError:
            raise DataError(f"{where}: 'choices' is not a JSON list", 'Example: "[""yes"", ""no""]"') from None
    if typed.get("label", "").strip().lstrip("-").isdigit():
        typed["label"] = int(typed["label"])
    return typed


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}", "Write it again.") from None


def _hub(location: str) -> Iterator[Row]:
    from datasets import load_dataset

    name, _, config = location.partition(":")
    try:
        records = load_dataset(name, config or None, split="train")
    except Exception as error:  # the hub's client raises a dozen unrelated types: no network, no such id, no right
        raise DataError(
            f"'{location}' is neither a data file here nor a reachable data set of the hub ({type(error).__name__})",
            f"Check the name and the network, or give a {', '.join(sorted(_READERS))} file.",
        ) from None
    return ((f"{location}, row {number}", record) for number, record in enumerate(records, start=1))


_READERS = {".jsonl": _json_lines, ".json": _json_lines, ".ndjson": _json_lines, ".csv": _csv, ".parquet": _parquet}
