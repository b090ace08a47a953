"""One federation that is hit, once or several times, and what became of it.

Faults come one after the other, each in its stage, each when what the one before it had broken works again. At the end the
candidates must have the digests of an undisturbed run, no accepted expert may be lost or trained again, and nothing may be
left running. A verdict is

    survived    nobody had to do anything
    resumed     the coordinator had stopped, with a reason (unless it was killed), and `--resume` completed the run
    refused     what was wrong was refused with a reason, and the run went on without a person
    failed      anything else
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from clock import Clocks
from faults import (
    FULL_SECONDS,
    HANG_SECONDS,
    SKEW,
    SKEW_SECONDS,
    SLOW_DELAY,
    SLOW_RATE,
    SLOW_SECONDS,
    STAGES,
    Cell,
    Stage,
)
from way import Way
from world import TooLongError, World

VICTIM = "alice"
_STAGE: dict[str, Stage] = {"seed": "seed", "experts": "expert", "combine": "combine", "evaluate": "evaluate"}
_PATIENCE = float(os.environ.get("SEEDBED_FAULTS_PATIENCE", "400"))
"""Seconds that a federation may take from one fault to the next, or to its end."""
_RESUMES = 8
_DEEDS = {
    ("client", "corrupt reply"): "wrong-digest",
    ("training", "corrupt reply"): "nan",
    ("client", "duplicate reply"): "twice-reply",
    ("registry", "duplicate reply"): "twice-submit",
    ("training", "duplicate reply"): "twice-done",
}


@dataclass
class Hit:
    """A fault that was done."""

    cell: Cell
    time: float
    accepted: dict[str, str]
    """What the ledger held then: digests by recipe."""
    names: frozenset[str]
    heal: Callable[[], object] | None = None
    """Ends a fault that lasts; until when it does, is `until`."""
    until: float = 0.0
    proof: Callable[[], str] | None = None
    """Says, at the end, why the fault did not happen after all; empty where it did."""
    verdict: str = ""
    said: str = ""


@dataclass
class Outcome:
    """Of one cell, as it is stored."""

    verdict: str
    said: str = ""
    seconds: float = 0.0
    shared: int = 1
    """How many faults this federation had."""


@dataclass
class Journey:
    """One federation with faults to be done; those that cannot be done (the stage went by) are left over.

    Args:
        cells: what to do.
        expected: digests of an undisturbed run.
        logs: where logs of a failure go.
    """

    cells: list[Cell]
    expected: dict[str, str]
    logs: Path
    hits: list[Hit] = field(default_factory=list)
    resumes: list[str] = field(default_factory=list)
    trouble: str = ""
    """What was wrong in the end."""

    def run(self) -> dict[Cell, Outcome]:
        """Do it.

        Returns:
            an outcome for each cell that was done.
        """
        with contextlib.ExitStack() as stack:
            place = tempfile.TemporaryDirectory(prefix="seedbed-faults-", ignore_cleanup_errors=True)
            self._open(Path(stack.enter_context(place)), stack)
            try:
                self._go()
                self.trouble = self._trouble()
            except (TooLongError, OSError, psutil.Error) as error:
                self.trouble = f"{type(error).__name__}: {error}"
            finally:
                for hit in self.hits:
                    self._heal(hit, now=True)
            if self.trouble:
                self.world.copy_logs(self.logs)
            return self._outcomes(self.trouble)

    def _open(self, root: Path, stack: contextlib.ExitStack) -> None:
        kinds = {cell.kind for cell in self.cells}
        targets = {(cell.target, cell.kind) for cell in self.cells}
        (root / "deeds").mkdir()
        self.deeds = root / "deeds"
        clients = {"SEEDBED_SABOTEUR": str(self.deeds)}
        here = str(Path(__file__).with_name("saboteur"))
        clients["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
        environment: dict[str, dict[str, str]] = {VICTIM: clients, "bob": {}, "coordinator": {}}
        if "clock skew" in kinds:
            self.clocks = Clocks(root)
            for name, kind in ((VICTIM, "client"), ("bob", "bystander"), ("coordinator", "coordinator")):
                environment[name].update(self.clocks.environment(kind))
        settings = ["stages.attempts=4"]
        if ("coordinator", "duplicate reply") in targets:
            settings.append("stages.silence=0.5")
        self.world = World(root / "world", settings, environment, {VICTIM: "127.0.0.2", "bob": "127.0.0.3"})
        stack.callback(self.world.close)
        ports = (self.world.port, self.world.registry_port)
        self.ways = {name: Way(address, ports) for name, address in self.world.ways.items()}
        for way in self.ways.values():
            stack.callback(way.close)
        for cell_target, place in (("client", self.world.work_of(VICTIM)), ("coordinator", self.world.run.parent)):
            if (cell_target, "disk full") in targets:
                place.mkdir(parents=True, exist_ok=True)
                subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4g", "none", str(place)], check=True)
                stack.callback(subprocess.run, ["umount", "-l", str(place)])
        stack.callback(self.world.close)

    # -- going ---------------------------------------------------------------------------------------------------------

    def _go(self) -> None:
        world = self.world
        world.start()
        left = list(self.cells)
        end, looked = time.monotonic() + _PATIENCE, 0.0
        while True:
            time.sleep(0.02)
            if time.monotonic() > end:
                raise TooLongError(f"nothing got on for {_PATIENCE:.0f} s")
            for hit in self.hits:
                self._heal(hit)
            if world.finished():
                break
            if world.coordinator is not None and world.coordinator.poll() is not None:
                self._resume(world.coordinator.returncode)
                end = time.monotonic() + _PATIENCE
            if time.monotonic() - looked > 0.5:
                looked = time.monotonic()
                world.tend()
            stage = self.stage()
            due = [cell for cell in left if cell.stage == stage]
            if due and self._now(due[0]) and self._healed() and self._hit(due[0]):
                left.remove(due[0])
                end = time.monotonic() + _PATIENCE
        for hit in self.hits:
            self._heal(hit, now=True)
        world.leave()

    def stage(self) -> Stage | None:
        """The stage that goes on now."""
        self.world.marks.look()
        names = [name for name in self.world.marks.stages() if name in _STAGE]
        return _STAGE[names[-1]] if names else None

    def _now(self, cell: Cell) -> bool:
        """Whether this is a moment to do it: while the victim trains, where the stage has trainings."""
        if cell.stage not in ("seed", "expert"):
            return True
        if cell.kind in ("corrupt reply", "duplicate reply"):
            return True  # armed, and done as soon as there is an occasion
        return self.world.trains(VICTIM, "seed:" if cell.stage == "seed" else "expert:")

    def _healed(self) -> bool:
        """Whether what was broken before works again."""
        return all(hit.heal is None for hit in self.hits) and self.world.whole()

    def _hit(self, cell: Cell) -> bool:
        world = self.world
        names = frozenset(entry["name"] for entry in world.ledger() if entry["event"] == "accepted")
        hit = Hit(cell, time.time(), world.accepted(), names)
        if not self._do(cell, hit):
            return False
        self.hits.append(hit)
        return True

    def _resume(self, code: int) -> None:
        said = self.world.said()
        reason = said.splitlines()[-1] if said else ""
        last = self.hits[-1] if self.hits else None
        if last is not None and last.verdict != "resumed":
            for hit in self.hits:
                self._heal(hit, now=True)  # whoever says --resume has mended what was broken
            killed = last.cell.target == "coordinator" and last.cell.kind == "kill -9"
            silent = not killed and (not said or "Traceback" in said)
            last.verdict, last.said = (
                ("failed", f"it stopped without a reason (code {code}): {reason}")
                if silent
                else ("resumed", "" if killed else _sentence(said))
            )
        self.resumes.append(_sentence(said))
        if len(self.resumes) > _RESUMES:
            raise TooLongError(f"it was resumed {_RESUMES} times and stops again: {_sentence(said)}")
        self.world.start_coordinator(resume=True)

    def _heal(self, hit: Hit, *, now: bool = False) -> None:
        if hit.heal is not None and (now or time.monotonic() > hit.until):
            heal, hit.heal = hit.heal, None
            with contextlib.suppress(psutil.Error, OSError):
                heal()

    # -- faults --------------------------------------------------------------------------------------------------------

    def _do(self, cell: Cell, hit: Hit) -> bool:
        """Do it; whether there was something to be hit."""
        if cell.kind in ("kill -9", "SIGTERM"):
            return self._signal(cell, signal.SIGKILL if cell.kind == "kill -9" else signal.SIGTERM)
        if cell.kind == "hang":
            return self._hang(cell, hit)
        if cell.kind == "slow network":
            return self._slow(cell, hit)
        if cell.kind == "disk full":
            return self._fill(cell, hit)
        if cell.kind == "clock skew":
            self.clocks.shift(cell.target, SKEW)
            hit.heal, hit.until = lambda: self.clocks.shift(cell.target, 0), time.monotonic() + SKEW_SECONDS
            return True
        return self._spoil(cell, hit)

    def _processes(self, cell: Cell, *, whole: bool = False) -> list[psutil.Process]:
        """Who is hit.

        Args:
            whole: of a machine, all of its processes.
        """
        world = self.world
        if cell.target == "training":
            return world.trainings(VICTIM)
        if cell.target in ("superlink", "registry"):
            word = {"superlink": "flower-superlink", "registry": "seedbed.server.registry"}[cell.target]
            return world.below(world.coordinator, word)
        top = world.coordinator if cell.target == "coordinator" else world.clients[VICTIM]
        if top is None or top.poll() is not None:
            return []
        process = psutil.Process(top.pid)
        return [process, *(process.children(recursive=True) if whole else [])]

    def _signal(self, cell: Cell, number: int) -> bool:
        found = self._processes(cell)
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        return bool(found)

    def _hang(self, cell: Cell, hit: Hit) -> bool:
        found = self._processes(cell, whole=True)
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()

        def go_on() -> None:
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

        hit.heal, hit.until = go_on, time.monotonic() + HANG_SECONDS
        return bool(found)

    def _slow(self, cell: Cell, hit: Hit) -> bool:
        """The victim's way to everything, or everybody's to one service."""
        port = {"superlink": self.world.port, "registry": self.world.registry_port}.get(cell.target)
        ways = [self.ways[VICTIM]] if port is None else list(self.ways.values())
        weather = [w for way in ways for place, w in way.weather.items() if port in (None, place)]
        for one in weather:
            one.rate, one.delay = SLOW_RATE, SLOW_DELAY

        def clear_up() -> None:
            for one in weather:
                one.rate, one.delay = None, 0.0

        hit.heal, hit.until = clear_up, time.monotonic() + SLOW_SECONDS
        return True

    def _fill(self, cell: Cell, hit: Hit) -> bool:
        hit.until = time.monotonic() + FULL_SECONDS
        if cell.target in ("client", "coordinator"):
            place = self.world.work_of(VICTIM) if cell.target == "client" else self.world.run.parent
            found = os.statvfs(place)
            used = (found.f_blocks - found.f_bfree) * found.f_frsize
            hit.heal = lambda: _resize(place, "4g")
            return _resize(place, str(max(used, 4096)))
        found_processes = self._processes(cell)
        for process in found_processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.rlimit(psutil.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

        def free() -> None:
            for process in found_processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        hit.heal = free
        return bool(found_processes)

    def _spoil(self, cell: Cell, hit: Hit) -> bool:
        if cell.kind == "corrupt reply" and cell.target in ("superlink", "registry"):
            port = self.world.port if cell.target == "superlink" else self.world.registry_port
            weather = [way.weather[port] for way in self.ways.values()]
            for one in weather:
                one.flips, one.flipped = 2, 0
            hit.proof = lambda: "" if any(one.flipped for one in weather) else "no bit was flipped"
            return True
        deed = _DEEDS.get((cell.target, cell.kind))
        if deed is not None:
            (self.deeds / deed).touch()
            hit.proof = lambda: "" if not (self.deeds / deed).exists() else "there was no occasion"
        return True

    # -- judging ---------------------------------------------------------------------------------------------------------

    def _trouble(self) -> str:
        """What is wrong at the end; empty where nothing is."""
        world = self.world
        found = {name: digest for name, digest in world.digests().items() if self.expected.get(name) != digest}
        if found or world.digests().keys() != self.expected.keys():
            return f"other digests than undisturbed: {', '.join(found) or 'other candidates'}"
        accepted = [entry["key"] for entry in world.ledger() if entry["event"] == "accepted"]
        if len(accepted) != len(set(accepted)):
            return "an expert was accepted twice"
        for hit in self.hits:
            if not hit.accepted.items() <= world.accepted().items():
                return f"what was accepted before {hit.cell} is lost"
            again = [
                event.name
                for event in world.marks.events
                if event.kind == "job" and event.detail.get("state") == "running" and event.time > hit.time + 1
            ]
            if hit.names & set(again):
                return f"trained again after it had been accepted: {', '.join(hit.names & set(again))}"
        for digest in set(world.accepted().values()):
            if not (world.run / "store" / "adapters" / digest).is_dir():
                return f"the adapter {digest} is not in the store"
        left = world.processes()
        if left:
            return f"left running: {', '.join(' '.join(process.cmdline()[:5]) for process in left)}"
        return ""

    def _outcomes(self, trouble: str) -> dict[Cell, Outcome]:
        found: dict[Cell, Outcome] = {}
        for index, hit in enumerate(self.hits):
            until = self.hits[index + 1].time if index + 1 < len(self.hits) else float("inf")
            verdict, said = hit.verdict or "survived", hit.said
            missed = hit.proof() if hit.proof is not None and not trouble else ""
            if missed:
                continue  # not done after all: it is left over
            refusal = self._refusal(hit.time, until)
            if verdict == "survived" and hit.cell.kind == "corrupt reply" and refusal:
                verdict, said = "refused", refusal
            elif verdict == "survived" and refusal:
                said = refusal
            if trouble and index + 1 == len(self.hits):
                verdict, said = "failed", f"{trouble} (logs: {self.logs})"
            elif trouble:
                continue  # nothing is known of it: it is done again
            found[hit.cell] = Outcome(verdict, said, 0.0, len(self.hits))
        return found

    def _refusal(self, since: float, until: float) -> str:
        """What was said to be wrong meanwhile."""
        for event in self.world.marks.events:
            if since <= event.time < until and event.kind in ("job", "quarantined") and event.detail.get("reason"):
                return str(event.detail["reason"])
        return ""


def _resize(place: Path, size: str) -> bool:
    done = subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], capture_output=True)
    return done.returncode == 0


def _sentence(said: str) -> str:
    """The reason among what a coordinator printed last."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Participants join", "Hand each"))]
    return " ".join(told[:2])[:300]


def undisturbed(logs: Path) -> dict[str, str]:
    """Digests of all candidates of a federation that nobody hits.

    Raises:
        AssertionError: if even that does not finish.
    """
    with tempfile.TemporaryDirectory(prefix="seedbed-faults-") as root:
        world = World(Path(root) / "world", ["stages.attempts=4"])
        try:
            world.start()
            code = world.wait_for_end(_PATIENCE)
            if code is not None:
                world.copy_logs(logs)
            assert code is None, f"the coordinator ended with {code}: {world.said()}"
            world.leave()
            assert not world.processes(), "something is left running"
            return world.digests()
        finally:
            world.close()


def in_order(cells: Iterable[Cell]) -> list[Cell]:
    """By stage; in a stage what stops the coordinator comes last, since jobs that are done meanwhile are not done again."""
    rank = {"training": 0, "client": 1, "registry": 2, "superlink": 3, "coordinator": 4}
    return sorted(cells, key=lambda cell: (STAGES.index(cell.stage), rank[cell.target], cell.kind))
