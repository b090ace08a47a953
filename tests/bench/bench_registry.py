"""The adapter registry over loopback: speed of one transfer and of many at once, plaintext and mTLS, and the registry's memory.

The registry runs in a process of its own, as it is deployed; so does every participant. A transfer is whole: hashed,
flushed to the disk, and in its place. Where other work shares the machine, the CPU seconds say more than the speed.

    python tests/bench/bench_registry.py [--megabytes 1000] [--many 16] [--json FILE] [--directory DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GOALS = {"plaintext": 300.0, "mtls": 150.0, "memory": 100e6}
"""Megabytes a second at least, of one transfer; bytes of the registry over idle at most."""
ROWS = 16


def make_adapter(path: Path, megabytes: int, number: int) -> None:
    """Random numbers: one adapter of about that size."""
    import torch

    from seedbed.common.adapter import Adapter, LoraFactors
    from seedbed.common.manifest import BaseIdentity
    from seedbed.common.storage import write_adapter

    generator = torch.Generator().manual_seed(number)
    width = megabytes * 1_000_000 // (4 * ROWS * 8 * 2)
    modules = {
        f"m{index}": LoraFactors(
            torch.randn(ROWS, width, generator=generator), torch.randn(width, ROWS, generator=generator), 1.0
        )
        for index in range(8)
    }
    write_adapter(path, Adapter(modules), kind="expert", base=BaseIdentity(name="bench"))


class Registry:
    """The registry's process, with or without keys."""

    def __init__(self, run: Path, keys: Path | None) -> None:
        self.run = run
        trust = ["--keys", str(keys)] if keys else []
        command = [sys.executable, "-m", "seedbed.server.registry", "--run", str(run), "--listen", "127.0.0.1:0"]
        self.child = subprocess.Popen([*command, *trust, "--log-level", "warning"], stdout=subprocess.PIPE, text=True)
        assert self.child.stdout is not None
        self.port = json.loads(self.child.stdout.readline())["port"]

    def status(self, field: str) -> int:
        lines = Path(f"/proc/{self.child.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))

    def cpu(self) -> float:
        fields = Path(f"/proc/{self.child.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def forget_peak(self) -> None:
        """Let the peak of memory begin at what is held now."""
        Path(f"/proc/{self.child.pid}/clear_refs").write_text("5")

    def stop(self) -> None:
        self.child.terminate()
        self.child.wait()


def access(port: int, keys: Path | None, name: str) -> Any:
    from seedbed.common.registry import RegistryAccess

    address = f"127.0.0.1:{port}"
    if keys is None:
        return RegistryAccess(address=address, name=name)
    folder = keys / "participants/bench"
    return RegistryAccess(
        address=address, ca=folder / "ca.crt", certificate=folder / "client.crt", key=folder / "client.key"
    )


def transfer(way: str, where: Any, what: str, place: Path) -> dict[str, float]:
    """One transfer in this process, after a word that opens the connection."""
    from seedbed.client.registry import RegistryClient

    with RegistryClient(where, patience=600) as client:
        client.find("0" * 64)
        before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        if way == "submit":
            client.submit(place)
        else:
            client.fetch(what, place)
        seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu": cpu}


def participants(jobs: list[tuple[str, Any, str, Path]]) -> tuple[float, list[dict[str, float]]]:
    """Each job in a process of its own, all at once; seconds until the last has ended its transfer, and what each says."""
    children = []
    for way, where, what, place in jobs:
        command = [sys.executable, __file__, "--transfer", way, where.model_dump_json(), what, str(place)]
        children.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    for child in children:  # all are ready
        assert child.stdout is not None
        child.stdout.readline()
    started = time.perf_counter()
    for child in children:
        assert child.stdin is not None
        child.stdin.close()
    told = []
    for child in children:
        assert child.stdout is not None
        told.append(child.stdout.read())
    seconds = time.perf_counter() - started
    if any(child.wait() for child in children):
        sys.exit("a participant failed")
    return seconds, [json.loads(one) for one in told]


def be_participant(way: str, where: str, what: str, place: Path) -> None:
    from seedbed.client.registry import RegistryClient  # noqa: F401  loads everything before the clock runs
    from seedbed.common.registry import RegistryAccess

    print("ready", flush=True)
    sys.stdin.read()
    print(json.dumps(transfer(way, RegistryAccess.model_validate_json(where), what, place)))


def measure(root: Path, options: argparse.Namespace, keys: Path | None) -> list[dict[str, Any]]:
    """Submit and fetch, one at a time and many at once, over one kind of connection."""
    adapters = sorted((root / "adapters").iterdir())
    rows = []
    for chosen, megabytes, repeats in (
        (adapters[:1], options.megabytes, options.repeats),
        (adapters[1:], options.many_megabytes, 1),
    ):
        registry = Registry(root / "run", keys)
        try:
            for way in ("submit", "fetch"):
                measured = measure_way(way, registry, chosen, megabytes, repeats, keys)
                rows.append({"connection": "mtls" if keys else "plaintext", **measured})
        finally:
            registry.stop()
            shutil.rmtree(registry.run, ignore_errors=True)
    return rows


def measure_way(
    way: str, registry: Registry, chosen: list[Path], megabytes: int, repeats: int, keys: Path | None
) -> dict[str, Any]:
    """All of the chosen adapters at once, one way, several times."""
    from seedbed.common.storage import read_manifest

    places, total = registry.run.with_name("fetched"), megabytes * len(chosen)
    idle = registry.status("VmRSS")
    speeds, served, taken, peaks = [], [], [], []
    for _ in range(repeats):
        if way == "submit":
            shutil.rmtree(registry.run / "store", ignore_errors=True)
        registry.forget_peak()
        before = registry.cpu()
        jobs = [
            (
                way,
                access(registry.port, keys, f"p{index}"),
                read_manifest(source).digest,
                source if way == "submit" else places / str(index),
            )
            for index, source in enumerate(chosen)
        ]
        seconds, told = participants(jobs)
        shutil.rmtree(places, ignore_errors=True)
        speeds.append(total / (told[0]["seconds"] if len(chosen) == 1 else seconds))
        served.append(1000 / total * (registry.cpu() - before))
        taken.append(1000 / total * sum(one["cpu"] for one in told))
        peaks.append(registry.status("VmHWM"))
    return {
        "way": way,
        "at_once": len(chosen),
        "megabytes": megabytes,
        "speeds": speeds,
        "speed": statistics.median(speeds),
        "registry_cpu_per_gb": statistics.median(served),
        "participants_cpu_per_gb": statistics.median(taken),
        "idle": idle,
        "memory": max(peaks) - idle,
    }


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "MB/s", "goal", "CPU s/GB: registry", "participants", "memory over idle", "goal")
    for row in rows:
        single = row["at_once"] == 1
        table.add_row(
            f"{row['way']}, {row['connection']}, {row['at_once']} × {row['megabytes']} MB",
            f"{row['speed']:.0f}" + ("" if single else " in all"),
            f"≥ {GOALS[row['connection']]:g}" if single else "",
            f"{row['registry_cpu_per_gb']:.2f}",
            f"{row['participants_cpu_per_gb']:.2f}",
            f"{row['memory'] / 1e6:.0f} MB",
            f"≤ {GOALS['memory'] / 1e6:.0f} MB",
        )
    Console(width=None if sys.stdout.isatty() else 130).print(table)


def make_keys(directory: Path) -> Path:
    from seedbed.server.keys import Authority

    Authority.create(directory).participant("bench")
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="of one adapter")
    parser.add_argument("--many", type=int, default=16, help="participants at once")
    parser.add_argument("--many-megabytes", type=int, default=1000, help="of each of their adapters")
    parser.add_argument("--repeats", type=int, default=3, help="of one transfer at a time")
    parser.add_argument("--directory", type=Path, default=Path(), help="where files are made and removed again")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    parser.add_argument("--transfer", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.transfer:
        way, where, what, place = options.transfer
        be_participant(way, where, what, Path(place))
        return
    needed = 1e6 * (3 * options.megabytes + 3 * options.many * options.many_megabytes) + 2e9
    if (free := shutil.disk_usage(options.directory).free) < needed:
        sys.exit(f"{needed / 1e9:.0f} GB are needed in {options.directory}, {free / 1e9:.0f} GB are free")
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="bench-registry-") as place:
        root = Path(place).resolve()
        (root / "adapters").mkdir()
        make_adapter(root / "adapters/000", options.megabytes, 0)
        for number in range(options.many):
            make_adapter(root / f"adapters/{number + 1:03}", options.many_megabytes, number + 1)
        rows = measure(root, options, None) + measure(root, options, make_keys(root / "keys"))
    show(rows)
    if options.json:
        options.json.write_text(json.dumps({"goals": GOALS, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
