"""What a federation says of itself, read from its run directory while others write it."""

from __future__ import annotations

import threading
from importlib.metadata import version
from pathlib import Path

import yaml
from pydantic import ValidationError

from seedbed.common.basemodel import identify, resolve
from seedbed.common.config import FederationConfig
from seedbed.common.config_file import parse_config
from seedbed.common.errors import ConfigError, DataError, SeedbedError
from seedbed.common.manifest import BaseIdentity
from seedbed.common.registry import FederationInfo, State
from seedbed.server.evaluation import results as records
from seedbed.server.evaluation.compare import best
from seedbed.server.ledger import Entry
from seedbed.server.plan import Planner

_FILES = ("config.yaml", "ledger.jsonl", records.RESULTS)


class Information:
    """Tells of one federation, and looks again when its files have changed.

    Args:
        run: the run directory, which may not be there yet.
        port: where the registry listens.
        secure: whether it speaks TLS.
    """

    def __init__(self, run: Path, port: int, *, secure: bool) -> None:
        self.run = run
        self.port = port
        self.secure = secure
        self._lock = threading.Lock()
        self._seen: object = None
        self._found: tuple[FederationInfo, FederationConfig] | None = None
        self._identity: BaseIdentity | None = None

    def info(self) -> FederationInfo | None:
        """As `look`, without the configuration."""
        found = self.look()
        return found[0] if found else None

    def look(self) -> tuple[FederationInfo, FederationConfig] | None:
        """What there is to tell, and what was asked for; None before the run directory is set up.

        Raises:
            ConfigError: if its configuration cannot be read.
        """
        with self._lock:
            seen = [_stamp(self.run / name) for name in _FILES]
            if seen != self._seen:
                self._found = self._read()
                self._seen = seen
            return self._found

    def _read(self) -> tuple[FederationInfo, FederationConfig] | None:
        try:
            values = yaml.safe_load((self.run / "config.yaml").read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, yaml.YAMLError):
            values = None
        if not isinstance(values, dict):
            raise ConfigError("the run's config.yaml cannot be read", "Restore it from a copy.")
        config = parse_config(values, source="config.yaml")
        return self._told(config), config

    def _told(self, config: FederationConfig) -> FederationInfo:
        entries = _entries(self.run / "ledger.jsonl")
        identity = self._identify(config)
        return FederationInfo(
            name=config.name,
            version=version("seedbed"),
            state=_state(entries),
            base=config.base,
            identity=identity,
            lora=config.lora,
            tasks=config.tasks.experts,
            held_out=config.tasks.held_out,
            prompt=config.tasks.prompt,
            needs_general_text=Planner(config, identity).needs_general_text,
            training=config.training,
            registry_port=self.port,
            secure=self.secure,
            seed=_seed(entries, config),
            best=_best(self.run),
        )

    def _identify(self, config: FederationConfig) -> BaseIdentity:
        """By name alone where the coordinator does not hold the base model."""
        if self._identity is None or not self._identity.digest:
            try:
                self._identity = identify(resolve(config.base), config.base.model)
            except SeedbedError:
                self._identity = BaseIdentity(name=config.base.model)
        return self._identity


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _entries(path: Path) -> list[Entry]:
    """Whole lines of a ledger. `Ledger` itself would mend the file under the hands of its writer."""
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().splitlines():
        try:
            found.append(Entry.model_validate_json(line))
        except ValidationError:
            continue
    return found


def _state(entries: list[Entry]) -> State:
    state: State = "waiting"
    for entry in entries:
        if entry.event == "finished":
            state = "finished"
        elif entry.event == "failed":
            state = "failed"
        elif entry.event == "resume":
            state = "finished" if state == "finished" else "waiting"
        elif entry.event != "start":
            state = "running"
    return state


def _seed(entries: list[Entry], config: FederationConfig) -> str:
    rounds = config.seed.rounds
    names = {
        "given": ("combined", "seed"),
        "public": ("accepted", "seed:public"),
        "federated": ("combined", f"seed:round-{rounds}"),
        "none": ("", ""),
    }
    event, name = names[config.seed.mode]
    return next((entry.digest for entry in reversed(entries) if (entry.event, entry.name) == (event, name)), "")


def _best(run: Path) -> str:
    """Of the best candidate on held-out tasks, or on all where there are none, if it is an adapter or a router."""
    if not (run / records.RESULTS).exists():
        return ""
    try:
        candidates = records.load(run).candidates
    except DataError:
        return ""
    name = best(candidates, "held_out") or best(candidates, "all")
    return (candidates[name].digest or "") if name else ""
