"""Evaluation tasks as lm-eval understands them: from files of questions, or lm-eval's own by name.

A file of questions becomes an lm-eval multiple-choice task in memory, so nothing is cached in anybody's home and no
hub is asked. lm-eval's own 14,000 tasks are indexed only when one is wanted by name, which takes it a quarter of a
minute.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from seedbed.common.batteries import BATTERIES
from seedbed.common.config import TaskSettings
from seedbed.common.datafiles import read_examples
from seedbed.common.errors import ConfigError, DataError
from seedbed.common.examples import Example

DEFAULT_PROMPT: str = TaskSettings().prompt
_FILES = (".jsonl", ".json", ".ndjson", ".parquet", ".csv")
_EMBEDDED_EXAMPLES = 200
_FEWSHOT_SEED = 1234
"""lm-eval's own default."""


@dataclass(frozen=True, slots=True, eq=False)
class EvalTask:
    """A task to measure candidates on; one value serves any number of candidates."""

    name: str
    parts: Mapping[str, Any]
    """lm-eval `Task`s by name: one, or those of a group that counts as one task."""
    held_in: bool = False
    """Whether some expert was trained on this task's training data."""
    metric: str = ""
    """The metric that counts; none leaves it to what the task has."""

    @property
    def task(self) -> Any:
        """The lm-eval `Task`; of a group the first."""
        return next(iter(self.parts.values()))


def task_from_jsonl(name: str, test_file: Path, prompt: str = DEFAULT_PROMPT, *, held_in: bool = False) -> EvalTask:
    """Make a multiple-choice task of a file of questions (JSON lines, Parquet or CSV).

    Raises:
        DataError: if the file cannot be read, or a record is not a question with choices.
    """
    return task_from_examples(name, read_examples(test_file), prompt, held_in=held_in, source=str(test_file))


def task_from_examples(
    name: str, examples: Sequence[Example], prompt: str = DEFAULT_PROMPT, *, held_in: bool = False, source: str = ""
) -> EvalTask:
    """Make a multiple-choice task of examples that are in memory; metrics are `acc` and `acc_norm`.

    The likelihood of each choice, after one space, is compared given the prompt; `acc_norm` divides it by the
    choice's length in characters.

    Raises:
        DataError: if there are no examples, or one has no choices.
    """
    if not examples:
        raise DataError(f"task '{name}' has no examples", "Give at least one question.")
    for number, example in enumerate(examples, start=1):
        if len(example.choices) < 2 or not example.prompt:
            raise DataError(
                f"{source or name}, example {number}: not a question with choices", "A test needs prompt/choices/label."
            )
    from lm_eval.api.task import ConfigurableTask

    documents = [
        {"text": example.context(prompt), "choices": list(example.choices), "label": example.label}
        for example in examples
    ]
    with quiet_lm_eval():
        return EvalTask(name, {name: ConfigurableTask(config=_lm_eval_config(name, documents))}, held_in)


def _lm_eval_config(name: str, documents: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "task": name,
        "custom_dataset": partial(_in_memory, documents),
        "test_split": "test",
        "output_type": "multiple_choice",
        # Functions, not templates: lm-eval would take a text of digits for a number, and braces for its own.
        "doc_to_text": _text,
        "doc_to_choice": _choices,
        "doc_to_target": _label,
        "target_delimiter": " ",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
    }


def _in_memory(documents: list[dict[str, Any]], **_: Any) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(documents)}


def _text(document: dict[str, Any]) -> str:
    return str(document["text"])


def _choices(document: dict[str, Any]) -> list[str]:
    return list(document["choices"])


def _label(document: dict[str, Any]) -> int:
    return int(document["label"])


def resolve_tasks(specs: Sequence[str], prompt: str = DEFAULT_PROMPT) -> list[EvalTask]:
    """Find tasks by what a user calls them.

    Args:
        specs: each the path of a file of questions (named by its stem, without `.test`), a directory of such files (all
            NAME.test.jsonl, .parquet or .csv in it), an embedded task, the name of an lm-eval task, group or tag, or
            of a battery (`zero-shot-16`).
        prompt: template of the files' questions.

    Raises:
        DataError: if a file or a hub's data set cannot be read.
        ConfigError: if a name is unknown or names two tasks.
    """
    index = _Index()
    tasks = [task for spec in specs for task in _find(spec, prompt, index)]
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two tasks are named '{name}'", "Name each task once; rename one of the files.")
    return tasks


def _find(spec: str, prompt: str, index: _Index) -> list[EvalTask]:
    from seedbed.common.embedded import TASKS, examples

    if Path(spec).expanduser().is_dir():
        return [_from_file(str(path), prompt) for path in _tests_in(Path(spec).expanduser())]
    if _is_file(spec):
        return [_from_file(spec, prompt)]
    if spec in TASKS:
        return [task_from_examples(spec, examples(spec, "test", _EMBEDDED_EXAMPLES, 0), prompt)]
    if spec in BATTERIES:
        return [EvalTask(name, index.load(name), metric=metric) for name, metric in BATTERIES[spec].items()]
    return [EvalTask(name, {name: task}) for name, task in index.load(spec, [*TASKS, *BATTERIES]).items()]


def _tests_in(directory: Path) -> list[Path]:
    found = sorted(path for path in directory.iterdir() if path.stem.endswith(".test") and path.suffix in _FILES)
    if not found:
        raise DataError(f"{directory} holds no task", "A task is a file NAME.test.jsonl (or .parquet, .csv).")
    return found


def _is_file(spec: str) -> bool:
    return spec.lower().endswith(_FILES) or os.sep in spec


def _from_file(spec: str, prompt: str) -> EvalTask:
    path = Path(spec).expanduser()
    return task_from_jsonl(path.stem.removesuffix(".test"), path, prompt)


class _Index:
    """lm-eval's tasks by name; they are indexed once, when the first is asked for."""

    def __init__(self) -> None:
        self._manager: Any = None

    def load(self, name: str, also: Sequence[str] = ()) -> dict[str, Any]:
        """The tasks of a name, several for a group or tag.

        Args:
            also: further names, for the hint where there is none of this name.
        """
        with quiet_lm_eval():
            if self._manager is None:
                from lm_eval.tasks import TaskManager

                self._manager = TaskManager()
            if name not in self._manager.all_tasks:
                close = difflib.get_close_matches(name, [*self._manager.all_tasks, *also], n=1)
                hint = (
                    f"Did you mean '{close[0]}'?" if close else "Give the path of a .jsonl file, or a name of lm-eval."
                )
                raise ConfigError(f"there is no task and no file named '{name}'", hint)
            try:
                found: dict[str, Any] = self._manager.load([name])["tasks"]
            except Exception as error:  # data set scripts and the hub's client raise anything
                raise DataError(
                    f"the data of lm-eval task '{name}' cannot be loaded ({type(error).__name__}: {_first_line(error)})",
                    "lm-eval's own tasks need a hub, or its cache; a .jsonl file of questions needs neither.",
                ) from None
        for task in found.values():
            task.set_fewshot_seed(_FEWSHOT_SEED)
        return found


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Keep lm-eval's log lines and its own progress bars off the terminal while the body runs; errors still show."""
    import lm_eval.api.task as module

    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, module.tqdm
    logger.setLevel(logging.ERROR)
    module.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        module.tqdm = bar
