"""Stage evaluate: every candidate on every task, each score kept as soon as it is there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from seedbed.common import basemodel
from seedbed.common.files import atomic_write
from seedbed.common.manifest import BaseIdentity, recipe_hash
from seedbed.common.scoring import SeedbedLM
from seedbed.common.storage import read_adapter
from seedbed.common.tasks import EvalTask, resolve_tasks, task_from_jsonl
from seedbed.server.combination import Combination
from seedbed.server.evaluation.suite import TaskResult, evaluate
from seedbed.server.ledger import Entry
from seedbed.server.observer import Observer
from seedbed.server.rundir import RunDirectory

Scores = dict[str, list[TaskResult]]


class Measurement:
    """Scores candidates over one base model, which is loaded once and only when some score is missing.

    Args:
        run: the open run directory.
        base: identity of the base model, which is part of every score's key.
        tests: test file of every task.
        observe: who is told of progress.
    """

    def __init__(self, run: RunDirectory, base: BaseIdentity, tests: dict[str, str], observe: Observer) -> None:
        self.run = run
        self.base = base
        self.tests = tests
        self.observe = observe
        self._lm: SeedbedLM | None = None
        self._worn: str | None = None

    def scores(self, candidates: Sequence[Combination]) -> Scores:
        """All scores by candidate; what an earlier try has measured is read back."""
        tasks = self._tasks()
        pairs = [(candidate, task) for candidate in candidates for task in self._for(candidate, tasks)]
        missing = [pair for pair in pairs if self._held(*pair) is None]
        self.observe.stage("evaluate", len(missing))
        for candidate, task in missing:
            self._measure(candidate, task)
            self.observe.advance(f"{candidate.name} on {task.name}")
        found: Scores = {candidate.name: [] for candidate in candidates}
        for candidate, task in pairs:
            result = self._held(candidate, task)
            assert result is not None  # it was measured above
            found[candidate.name].append(result)
        return found

    def _tasks(self) -> list[EvalTask]:
        config = self.run.config
        own = [
            task_from_jsonl(name, Path(self.tests[name]), config.tasks.prompt, held_in=name in config.tasks.experts)
            for name in (*config.tasks.experts, *config.tasks.held_out)
        ]
        return own + (resolve_tasks(config.evaluation.extra) if config.evaluation.extra else [])

    def _for(self, candidate: Combination, tasks: Sequence[EvalTask]) -> list[EvalTask]:
        own_only = candidate.task is not None and self.run.config.evaluation.expert_tasks == "own"
        return [task for task in tasks if not own_only or task.name == candidate.task]

    def _key(self, candidate: Combination, task: EvalTask) -> str:
        """Hash of what determines a score. The data's hashes are the run's: it is not resumed with other data."""
        return recipe_hash(
            {
                "candidate": candidate.digest,
                "base": self.base.digest,
                "task": task.name,
                "prompt": self.run.config.tasks.prompt,
                "limit": self.run.config.evaluation.limit,
            }
        )

    def _path(self, candidate: Combination, task: EvalTask) -> Path:
        return self.run.root / "evaluations" / f"{self._key(candidate, task)}.json"

    def _held(self, candidate: Combination, task: EvalTask) -> TaskResult | None:
        path = self._path(candidate, task)
        if not path.exists():
            return None
        try:
            return TaskResult.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return None  # measured again

    def _measure(self, candidate: Combination, task: EvalTask) -> None:
        started = time.monotonic()
        (result,) = evaluate(self._wearing(candidate.digest), [task], limit=self.run.config.evaluation.limit)
        atomic_write(self._path(candidate, task), result.model_dump_json().encode())
        self.run.ledger.append(
            Entry(
                event="evaluated",
                name=f"{candidate.name} on {task.name}",
                key=self._key(candidate, task),
                digest=candidate.digest or "",
                seconds=time.monotonic() - started,
            )
        )

    def _wearing(self, digest: str | None) -> SeedbedLM:
        """The base model with an adapter swapped in."""
        if self._lm is None:
            model, tokenizer = basemodel.load(self.run.config.base)
            self._lm = SeedbedLM(model, tokenizer, batch_tokens=self.run.config.evaluation.batch_tokens)
        if digest != self._worn:
            self._lm.set_adapter(read_adapter(self.run.store.open(digest))[0] if digest else None)
            self._worn = digest
        return self._lm
