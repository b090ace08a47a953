"""Which jobs a federation needs: pure functions from configuration to jobs, so that a plan can be shown, hashed and tested.

Steps are counted so that comparisons are fair: an unseeded expert trains as many steps as its seeded twin together with
that twin's share of the seed, and the joint adapter as many as all seeded experts together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from seedbed.common.config import FederationConfig, TrainingSettings
from seedbed.common.jobs import Job, JobKind
from seedbed.common.manifest import BaseIdentity

PUBLIC = "public"
"""Name that the public sample of `seed.mode: public` has as a task."""


@dataclass(frozen=True, slots=True)
class Planner:
    """The jobs of one federation over one base model."""

    config: FederationConfig
    base: BaseIdentity

    def seed_round(self, index: int, parent: str | None, tasks: Sequence[str]) -> list[Job]:
        """One federated round: every client trains from `parent`, or from one shared initialization in the first."""
        return [
            self._job("seed", f"seed:{task}:round-{index + 1}", (task,), parent, self._seed_training()).model_copy(
                update={
                    "fraction": self.config.seed.fraction,
                    "data_seed": self._draw(1000 + index),
                    "sample_seed": self._draw(1000),
                }
            )
            for task in tasks
        ]

    def public_seed(self) -> Job:
        """The seed from a public sample, trained by one participant."""
        return self._job("seed", "seed:public", (PUBLIC,), None, self._seed_training())

    def experts(self, seed: str | None, tasks: Sequence[str]) -> list[Job]:
        """One expert for each task, from the seed (or, without one, from one shared initialization)."""
        return [self._job("expert", f"expert:{task}", (task,), seed, self.config.training) for task in tasks]

    def unseeded(self, tasks: Sequence[str]) -> list[Job]:
        """Experts that never saw the seed, each from its own initialization, with the seed's steps on top."""
        training = self._with_steps(self.config.training.steps + self.config.seed.local_steps)
        return [
            self._job("expert", f"unseeded:{task}", (task,), None, training).model_copy(
                update={"init_seed": self._draw(1 + self.config.tasks.experts.index(task))}
            )
            for task in tasks
        ]

    def joint(self, tasks: Sequence[str]) -> Job:
        """One adapter on the union of all tasks, with as many steps as all clients take together."""
        steps = len(tasks) * (self.config.training.steps + self.config.seed.local_steps)
        return self._job("joint", "joint", tuple(tasks), None, self._with_steps(steps))

    def wants(self, candidate: str) -> bool:
        return candidate in self.config.combine.candidates

    @property
    def needs_pooled_data(self) -> bool:
        """Whether some job needs data that no single client has; only a simulation can do it."""
        return self.wants("joint") or self.config.seed.mode == "public"

    def _seed_training(self) -> TrainingSettings:
        seed = self.config.seed
        rate = seed.learning_rate or self.config.training.learning_rate
        return self._with_steps(seed.steps).model_copy(update={"learning_rate": rate})

    def _with_steps(self, steps: int) -> TrainingSettings:
        return self.config.training.model_copy(update={"steps": steps})

    def _job(
        self, kind: JobKind, name: str, tasks: tuple[str, ...], parent: str | None, training: TrainingSettings
    ) -> Job:
        return Job(
            kind=kind,
            name=name,
            base=self.base,
            tasks=tasks,
            prompt=self.config.tasks.prompt,
            limit=self.config.tasks.train_limit,
            parent=parent,
            lora=self.config.lora,
            training=training,
            init_seed=self._draw(0),
            data_seed=self._draw(0),
        )

    def _draw(self, stream: int) -> int:
        """A seed of its own for each use, apart from those of neighbouring `run.random_seed`s."""
        return self.config.run.random_seed * 10_000 + stream
