"""A run directory: everything one federation leaves, in one place, by one process at a time.

config.yaml      what was asked for, complete with defaults
inputs.json      hashes of the data, so that a resumed run is the same run
ledger.jsonl     what happened
store/           accepted adapters, by digest
data/            the embedded tasks, where they are used
nodes/  work/    the simulated participants and their scratch
evaluations/     scores by candidate and task
adapters/        the published adapters, by name
results.json outcomes.json report.md report.html
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import yaml

from seedbed.common.compression import INT8
from seedbed.common.config import FederationConfig
from seedbed.common.config_file import dump_config, parse_config
from seedbed.common.errors import AdapterError, ResumeError, StorageError
from seedbed.common.exclusive import take_lock
from seedbed.common.files import storing, temporary_beside
from seedbed.common.peft_format import expand_adapter
from seedbed.common.routing.mixture_file import expert_places
from seedbed.common.routing.router_file import read_router
from seedbed.common.storage import DirectoryStore, atomic_write, read_manifest
from seedbed.server.ledger import Entry, Ledger


class RunDirectory:
    """The open run directory of a running federation; holds its lock until the process ends."""

    def __init__(self, root: Path, config: FederationConfig, lock: int) -> None:
        self._lock = lock
        self.root = root
        self.config = config
        self.store = DirectoryStore(root / "store")
        self.ledger = Ledger(root / "ledger.jsonl")

    @classmethod
    def open(cls, root: Path, config: FederationConfig, inputs: dict[str, str], *, resume: bool) -> RunDirectory:
        """Start a run, or continue one that has the same configuration and inputs.

        Args:
            root: the directory; created when it is not there.
            config: what is asked for now.
            inputs: name -> hash of everything that the run reads from outside.
            resume: continue what is there. Without it an existing directory is refused.

        Raises:
            StorageError: if the directory exists and `resume` is not set, or it cannot be written.
            ResumeError: if the configuration or an input has changed, or another process is at work in it.
        """
        root = root.resolve()
        started = (root / "config.yaml").exists()
        if root.exists() and any(root.iterdir()) and not resume:
            raise StorageError(f"{root} already exists", "Continue it with --resume, or name another --out.")
        if root.exists() and any(root.iterdir()) and not started and not _only_lock(root):
            raise ResumeError(f"{root} is not a run directory: it has no config.yaml", "Name another --out.")
        try:
            root.mkdir(parents=True, exist_ok=True)
            lock = _lock(root)
        except OSError as error:
            raise StorageError(f"{root} cannot be written: {error.strerror}", "Name another --out.") from None
        try:
            if started:
                _refuse_change(root, config, inputs)
            else:
                atomic_write(root / "inputs.json", (json.dumps(inputs, indent=2, sort_keys=True) + "\n").encode())
                atomic_write(root / "config.yaml", dump_config(config).encode())
            run = cls(root, config, lock)
            run.ledger.append(Entry(event="resume" if started else "start", name=config.name))
        except BaseException:
            os.close(lock)
            raise
        return run

    def close(self) -> None:
        """Let another process continue this run."""
        os.close(self._lock)

    def view(self, config: FederationConfig) -> RunDirectory:
        """This directory under another configuration: one store, one ledger, the same evaluations, the same lock.

        What one view has trained, merged or measured the others find. A view publishes nothing.
        """
        return _View(self, config)

    @property
    def adapters(self) -> Path:
        return self.root / "adapters"

    def publish(self, name: str, digest: str) -> None:
        """Give an adapter of the store a readable place, without a second copy where the file system allows links."""
        target = self.adapters / name.replace(":", "-")
        if target.exists():
            if _holds(target, digest):
                return
            with storing("replace", target):  # contributions came or went: the candidate is another one now
                shutil.rmtree(target)
        source = self.store.open(digest)
        aside = temporary_beside(target)
        manifest = read_manifest(source)
        try:
            if manifest.dtype == INT8:  # no other program reads that form
                expand_adapter(source, aside)
            else:
                _link_files(source, aside)
            if manifest.kind == "router":  # whole only with its experts
                _, names, _ = read_router(source)
                for place, parent in zip(expert_places(names), manifest.parents, strict=True):
                    _link_files(self.store.open(parent), aside / place)
            with storing("write", target):
                os.replace(aside, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


class _View(RunDirectory):
    def __init__(self, of: RunDirectory, config: FederationConfig) -> None:
        self._lock = of._lock
        self.root, self.config = of.root, config
        self.store, self.ledger = of.store, of.ledger

    def close(self) -> None:
        """Nothing: the lock is the directory's own."""

    def publish(self, name: str, digest: str) -> None:
        """Nothing: candidates of several configurations may have one name."""


def _holds(directory: Path, digest: str) -> bool:
    try:
        manifest = read_manifest(directory)
    except AdapterError:
        return False
    return digest in (manifest.digest, manifest.settings.get("expanded_from"))


def _link_files(source: Path, target: Path) -> None:
    with storing("write", target):
        target.mkdir(parents=True)
        for file in source.iterdir():
            _link_or_copy(file, target / file.name)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        target.write_bytes(source.read_bytes())


def _only_lock(root: Path) -> bool:
    return {entry.name for entry in root.iterdir()} <= {".lock", "inputs.json"}


def _lock(root: Path) -> int:
    descriptor = take_lock(root / ".lock")  # goes with the process, however that ends
    if descriptor is None:
        raise ResumeError(f"another process is at work in {root}", "Wait until it ends, or end it.")
    return descriptor


def _refuse_change(root: Path, config: FederationConfig, inputs: dict[str, str]) -> None:
    try:
        before = parse_config(yaml.safe_load((root / "config.yaml").read_text(encoding="utf-8")), source="config.yaml")
        old_inputs = dict(json.loads((root / "inputs.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ResumeError(
            f"config.yaml or inputs.json of {root} cannot be read: {error}", "Restore it, or start a new run."
        ) from None
    changed = _differences(before.model_dump(mode="json"), config.model_dump(mode="json"))
    if changed:
        key, old, new = changed[0]
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise ResumeError(
            f"the configuration has changed since {root} was started: {key} was {old!r} and is {new!r}{more}",
            "Resume with the old configuration, or start a new run with another --out.",
        )
    for name in sorted(set(old_inputs) | set(inputs)):
        if old_inputs.get(name) != inputs.get(name):
            raise ResumeError(
                f"{name} has changed since {root} was started", "Restore it, or start a new run with another --out."
            )


def _differences(old: object, new: object, path: str = "") -> list[tuple[str, object, object]]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            found
            for key in sorted(set(old) | set(new))
            for found in _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if old == new else [(path, old, new)]
