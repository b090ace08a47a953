"""Every fault as a small value: what is hit, how, in which stage; and where a combination makes no sense, why.

client        the participant alice, her `seedbed join` and all below it (her machine)
training      the process that trains her job
coordinator   the `seedbed coordinator` process, which starts all others; what stops it stops the ServerApp, too
superlink     Flower's SuperLink
registry      the adapter registry
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Target = Literal["client", "training", "coordinator", "superlink", "registry"]
Kind = Literal[
    "kill -9", "SIGTERM", "hang", "slow network", "disk full", "corrupt reply", "duplicate reply", "clock skew"
]
Stage = Literal["seed", "expert", "combine", "evaluate"]
TARGETS: tuple[Target, ...] = get_args(Target)
KINDS: tuple[Kind, ...] = get_args(Kind)
STAGES: tuple[Stage, ...] = get_args(Stage)

HANG_SECONDS = 8.0
SLOW_SECONDS, SLOW_RATE, SLOW_DELAY = 15.0, 30_000.0, 0.3
FULL_SECONDS = 8.0
SKEW_SECONDS, SKEW = 12.0, 900
"""How long clocks are wrong, and by how much; Flower accepts signatures that are up to 305 seconds old."""

HOW: dict[Kind, str] = {
    "kill -9": "SIGKILL",
    "SIGTERM": "SIGTERM",
    "hang": f"SIGSTOP, and SIGCONT after {HANG_SECONDS:g} s; of a machine (client, coordinator) all its processes",
    "slow network": f"a relay of our own between participants and coordinator lets {SLOW_RATE / 1000:g} kB/s through, each "
    f"piece {SLOW_DELAY:g} s late, for {SLOW_SECONDS:g} s",
    "disk full": "of a machine: its directory is a tmpfs that has no byte left; of one process: RLIMIT_FSIZE 0; "
    f"for {FULL_SECONDS:g} s",
    "corrupt reply": "on the way from SuperLink or registry: the relay flips a bit; from a client: an answer that names an "
    "adapter which does not exist; from a training: a NaN in the adapter",
    "duplicate reply": "answers pushed twice, adapters submitted twice, 'done' told twice; by the coordinator: every job asked "
    "again and again (stages.silence)",
    "clock skew": f"the wall clock of the process {SKEW} s ahead for {SKEW_SECONDS:g} s, by a preloaded library",
}


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One fault."""

    target: Target
    kind: Kind
    stage: Stage

    def __str__(self) -> str:
        return f"{self.target}/{self.kind}/{self.stage}"

    @property
    def nonsense(self) -> str:
        """Why this fault cannot be; empty where it can."""
        asked = self.stage in ("seed", "expert")
        if self.target == "training" and not asked:
            return "nothing is trained in this stage"
        if self.target == "training" and self.kind == "slow network":
            return "a training process uses no network: its client fetches and hands in"
        if self.kind in ("corrupt reply", "duplicate reply") and not asked:
            return "nobody is asked in this stage, so nobody replies"
        if self.kind == "corrupt reply" and self.target == "coordinator":
            return "it replies to participants through the SuperLink and the registry alone"
        if self.kind == "duplicate reply" and self.target == "superlink":
            return "it repeats no message: who sends one twice is the coordinator or a client"
        if self.kind == "slow network" and self.target == "coordinator":
            return "participants reach it through the SuperLink and the registry alone; the rest is loopback"
        return ""


ALL = tuple(Cell(target, kind, stage) for kind in KINDS for target in TARGETS for stage in STAGES)
POSSIBLE = tuple(cell for cell in ALL if not cell.nonsense)
