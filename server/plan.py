"""Which jobs a federation needs: pure functions from configuration to jobs, so that a plan can be shown, hashed and tested.

Steps are counted so that comparisons are fair: an unseeded expert trains as many steps as its seeded twin together with
that twin's share of the seed, and the joint adapter (and `molora`) as many as all seeded experts together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seedbed.common.config import FederationConfig, Group, TrainingSettings
from seedbed.common.jobs import Job, JobKind
from seedbed.common.manifest import BaseIdentity
from seedbed.server.candidates import Candidate, groups, resolve, token_level

PUBLIC = "public"
"""Name that the public sample of `seed.mode: public` has as a task."""
PUBLIC_ROUTER = "public-router"
"""Name that the public sample of `combine.routing.mode: public` has as a task."""
_SEED_ROUNDS, _ROUTER_ROUNDS = 1000, 2000
"""Streams of random numbers."""


@dataclass(frozen=True, slots=True)
class Planner:
    """The jobs of one federation over one base model."""

    config: FederationConfig
    base: BaseIdentity

    @property
    def candidates(self) -> list[Candidate]:
        return resolve(self.config)

    def seed_round(self, index: int, parent: str | None, tasks: Sequence[str]) -> list[Job]:
        """One federated round: the clients of `seed.tasks` train from `parent`, in the first from one shared initialization."""
        changes = {
            "fraction": self.config.seed.fraction,
            "data_seed": self._draw(_SEED_ROUNDS + index),
            "sample_seed": self._draw(_SEED_ROUNDS),
        }
        return [
            self._job("seed", f"seed:{task}:round-{index + 1}", (task,), parent, self._seed_training(), **changes)
            for task in tasks
            if self.config.seed.tasks is None or task in self.config.seed.tasks
        ]

    def public_seed(self) -> Job:
        """The seed from a public sample, trained by one participant."""
        return self._job("seed", "seed:public", (PUBLIC,), None, self._seed_training())

    def experts(self, seed: str | None, tasks: Sequence[str]) -> list[Job]:
        """One expert for each task, from the seed (or, without one, from one shared initialization)."""
        return [self._job("expert", f"expert:{task}", (task,), seed, self.config.training) for task in tasks]

    def tuned(self, seed: str | None, tasks: Sequence[str]) -> list[Job]:
        """The same experts under the objective of routing tuning; where that is the ordinary one, the same jobs."""
        tuning = None if self.config.routing_tuning.is_plain else self.config.routing_tuning
        return [
            self._job("expert", f"tuned:{task}", (task,), seed, self.config.training, tuning=tuning) for task in tasks
        ]

    def unseeded(self, tasks: Sequence[str]) -> list[Job]:
        """Experts that never saw the seed, each from its own initialization, with the seed's steps on top."""
        jobs = []
        for task in tasks:
            training = self._training(self.config.training.steps + self.config.seed.steps_on(task))
            stream = self._draw(1 + self.config.tasks.experts.index(task))
            jobs.append(self._job("expert", f"unseeded:{task}", (task,), None, training, init_seed=stream))
        return jobs

    def joint(self, tasks: Sequence[str]) -> Job:
        """One adapter on the union of all tasks, with as many steps as all clients take together."""
        return self._job("joint", "joint", tuple(tasks), None, self._pooled_training(tasks))

    def molora(self, tasks: Sequence[str]) -> list[Job]:
        """As many experts as tasks and their router, trained together from scratch on the union of all tasks."""
        training = self._pooled_training(tasks)
        return [
            self._job(
                "molora",
                molora_job(candidate),
                tuple(tasks),
                None,
                training,
                names=tuple(tasks),
                router=candidate.routing,
                load_balance=self.config.combine.routing.load_balance,
            )
            for candidate in self.candidates
            if candidate.routing is not None and candidate.routing.kind == "molora"
        ]

    def gates(self, group: Group, experts: Mapping[str, str]) -> list[Job]:
        """A gate for each expert, trained by its own client.

        Args:
            experts: digests by task.
        """
        training = self._training(self.config.combine.routing.gate_steps, self.config.combine.routing.learning_rate)
        label = "gate" if group == "experts" else f"gate:{group}"
        return [
            self._job("gate", f"{label}:{task}", (task,), None, training, experts=(digest,), names=(task,))
            for task, digest in experts.items()
        ]

    def routers(self, candidate: Candidate, index: int, parent: str | None, experts: Mapping[str, str]) -> list[Job]:
        """One round of a learned router: every client trains it on its own data, over all experts.

        Args:
            parent: digest of the last round's router.
            experts: digests by task.
        """
        settings = self.config.combine.routing
        training = self._training(settings.steps, settings.learning_rate)
        changes = {
            "experts": tuple(experts.values()),
            "names": tuple(experts),
            "router": token_level(candidate),
            "load_balance": settings.load_balance,
            "data_seed": self._draw(_ROUTER_ROUNDS + index),
        }
        tasks = experts if settings.mode == "federated" else (PUBLIC_ROUTER,)
        return [
            self._job(
                "router", f"router:{candidate.name}:{task}:round-{index + 1}", (task,), parent, training, **changes
            )
            for task in tasks
        ]

    @property
    def router_rounds(self) -> int:
        settings = self.config.combine.routing
        return settings.rounds if settings.mode == "federated" else 1

    def wants(self, name: str) -> bool:
        """Whether a candidate of that name is to be made."""
        return name in self.config.combine.names

    def wants_group(self, group: Group) -> bool:
        return group in groups(self.candidates)

    @property
    def needs_pooled_data(self) -> bool:
        """Whether some job needs data that no single client has; only a simulation can do it."""
        public_router = self.config.combine.routing.mode == "public" and any(c.trains_router for c in self.candidates)
        public = public_router or self.config.seed.mode == "public"
        return public or self.wants("joint") or bool(self.molora([]))

    @property
    def needs_general_text(self) -> bool:
        return self.wants_group("tuned") and self.config.routing_tuning.needs_general_text

    def _seed_training(self) -> TrainingSettings:
        return self._training(self.config.seed.steps, self.config.seed.learning_rate)

    def _pooled_training(self, tasks: Sequence[str]) -> TrainingSettings:
        return self._training(sum(self.config.training.steps + self.config.seed.steps_on(task) for task in tasks))

    def _training(self, steps: int, learning_rate: float | None = None) -> TrainingSettings:
        rate = learning_rate or self.config.training.learning_rate
        return self.config.training.model_copy(update={"steps": steps, "learning_rate": rate})

    def _job(
        self,
        kind: JobKind,
        name: str,
        tasks: tuple[str, ...],
        parent: str | None,
        training: TrainingSettings,
        **more: Any,
    ) -> Job:
        values: dict[str, Any] = {"init_seed": self._draw(0), "data_seed": self._draw(0), **more}
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
            **values,
        )

    def _draw(self, stream: int) -> int:
        """A seed of its own for each use, apart from those of neighbouring `run.random_seed`s."""
        return self.config.run.random_seed * 10_000 + stream


def molora_job(candidate: Candidate) -> str:
    """Name of the job that trains a `molora` candidate."""
    return candidate.name if candidate.name == "molora" else f"molora:{candidate.name}"
