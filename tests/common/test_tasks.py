"""Evaluation tasks from files and by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from seedbed.common.batteries import BATTERIES, expand
from seedbed.common.errors import ConfigError, DataError
from seedbed.common.examples import Example
from seedbed.common.tasks import quiet_lm_eval, resolve_tasks, task_from_examples, task_from_jsonl


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


QUESTION = {"prompt": "2 + 2", "choices": ["3", "4", "five"], "label": 1}


def requests(task: Any) -> list[tuple[str, str]]:
    task.build_all_requests()
    return [instance.args for instance in task.instances]


def test_a_question_becomes_a_context_and_spaced_choices(tmp_path: Path) -> None:
    found = task_from_jsonl("sums", write(tmp_path / "sums.test.jsonl", QUESTION), "Q: {prompt}\nA:")
    assert requests(found.task) == [
        ("Q: 2 + 2\nA:", " 3"),
        ("Q: 2 + 2\nA:", " 4"),
        ("Q: 2 + 2\nA:", " five"),
    ]


def test_contexts_and_choices_are_exactly_those_that_training_uses() -> None:
    example = Example("why?", ("yes", "no"), 1, "Answer.")
    template = "{instruction} {prompt} =>"
    found = task_from_examples("t", [example], template)
    assert requests(found.task) == [
        (example.context(template), example.continuation(choice)) for choice in example.choices
    ]


@pytest.mark.parametrize("prompt", ["42", "{{ not a template }} {%", "  spaces  ", "line\nbreak", "{instruction}"])
def test_a_prompt_is_never_taken_for_something_else(prompt: str) -> None:
    found = task_from_examples("t", [Example(prompt, ("a", "b"))], "{prompt}")
    assert [context for context, _ in requests(found.task)] == [prompt, prompt]


def test_accuracy_is_by_total_likelihood_and_acc_norm_by_likelihood_per_character() -> None:
    task = task_from_examples("t", [Example("q", ("a", "bbbb"), 1)], "{prompt}").task
    # "a" has −1, "bbbb" has −2 in all but only −0.5 a character.
    metrics = task.process_results(task.task_docs[0], [(-1.0, True), (-2.0, False)])
    assert metrics == {"acc": 0.0, "acc_norm": 1.0}


def test_a_file_is_named_by_its_stem_without_test(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, QUESTION) for name in ("sums.test.jsonl", "plain.jsonl")]
    assert [task.name for task in resolve_tasks([str(path) for path in paths])] == ["sums", "plain"]


def test_an_embedded_task_is_found_by_name() -> None:
    (found,) = resolve_tasks(["addition"])
    assert found.name == "addition"
    assert len(found.task.task_docs) == 200


def test_a_directory_stands_for_all_tests_in_it(tmp_path: Path) -> None:
    for name in ("sums.test.jsonl", "sums.train.jsonl", "capitals.test.jsonl", "notes.txt"):
        write(tmp_path / name, QUESTION)
    assert [task.name for task in resolve_tasks([str(tmp_path)])] == ["capitals", "sums"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no task"):
        resolve_tasks([str(tmp_path / "empty")])


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = [write(tmp_path / "sums.jsonl", QUESTION), write(tmp_path / "other" / "sums.jsonl", QUESTION)]
    with pytest.raises(ConfigError, match="two tasks are named 'sums'"):
        resolve_tasks([str(path) for path in paths])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl"):
        resolve_tasks([str(tmp_path / "nothing.jsonl")])


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "sums.jsonl", QUESTION, {**QUESTION, "label": 7})
    with pytest.raises(DataError, match="line 2"):
        task_from_jsonl("sums", path)


def test_examples_without_choices_are_no_test(tmp_path: Path) -> None:
    path = write(tmp_path / "sums.jsonl", QUESTION, {"prompt": "2 + 2", "completion": "4"})
    with pytest.raises(DataError, match="example 2: not a question"):
        task_from_jsonl("sums", path)


def test_no_examples_are_no_task() -> None:
    with pytest.raises(DataError, match="no examples"):
        task_from_examples("t", [])


def test_nothing_is_cached_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(home))
    found = task_from_jsonl("sums", write(tmp_path / "sums.jsonl", QUESTION))
    assert requests(found.task)
    assert not found.task.dataset["test"].cache_files
    assert not home.exists()


def test_an_unknown_name_is_answered_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    # The index of all of lm-eval's tasks takes a quarter of a minute: two entries are enough here.
    import lm_eval.tasks

    class Few(lm_eval.tasks.TaskManager):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(include_defaults=False)
            self._all_tasks = ["hellaswag", "piqa"]

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Few)
    with pytest.raises(ConfigError, match="'helaswag'") as refused:
        resolve_tasks(["helaswag"])
    assert "'hellaswag'" in refused.value.hint
    with pytest.raises(ConfigError) as refused:
        resolve_tasks(["aditon"])
    assert "'addition'" in refused.value.hint
    with pytest.raises(DataError, match="lm-eval task 'piqa' cannot be loaded"):
        resolve_tasks(["piqa"])


def test_every_task_of_the_battery_is_one_of_lm_eval_that_has_its_metric() -> None:
    from lm_eval.tasks import TaskManager

    with quiet_lm_eval():
        manager = TaskManager()
    battery = BATTERIES["zero-shot-16"]
    assert len(battery) == 16
    assert set(battery) <= set(manager.all_tasks)
    assert expand(("zero-shot-16", "mine")) == (*battery, "mine")


def test_the_battery_asks_the_hub_for_its_first_task_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    class Few(lm_eval.tasks.TaskManager):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(include_defaults=False)
            self._all_tasks = list(BATTERIES["zero-shot-16"])

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Few)
    with pytest.raises(DataError, match="lm-eval task 'arc_easy' cannot be loaded"):
        resolve_tasks(["zero-shot-16"])
