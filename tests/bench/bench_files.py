"""Merging from file to file, against copying the same files: time and memory.

Adapters of a 7B model (rank 16; per layer four 4096 × 4096 modules and three of 4096 and 11008) are averaged exactly, so the
result is as large as all inputs together, and read, hashed, checked and written whole. `cp` copies the same files in the
same run, in turn; before every run the files are put out of the page cache, after it the copies are flushed to the disk.
Memory is the peak of resident memory above that of the loaded libraries, in a process of its own for each merge.

    python tests/bench/bench_files.py [--adapters 64] [--layers 32] [--dtypes bfloat16,float32] [--json FILE]
        [--directory DIR] [--repeats 3] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RANK = 16
SHAPES = {
    **{f"self_attn.{name}_proj": (4096, 4096) for name in "qkvo"},
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}
GOALS = {"time": 2.0}
"""At most so many times as long as copying."""
FEW = 8
METHODS = {"svd": {"rank": RANK}, "iterative": {}}
"""Measured for memory, over one layer of a few adapters."""


def make_adapters(root: Path, count: int, layers: int, dtype: str) -> list[Path]:
    """Random adapters, each of its own seed."""
    import torch

    from seedbed.common.adapter import LoraFactors
    from seedbed.common.adapter_writer import new_adapter
    from seedbed.common.manifest import BaseIdentity

    kind = getattr(torch, dtype)
    shapes = {f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in SHAPES.items()}
    directories = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        directories.append(root / f"adapter{index}")
        with new_adapter(directories[-1], sorted(shapes)) as new:
            for name in sorted(shapes):
                rows, columns = shapes[name]
                A = torch.randn(RANK, columns, generator=generator).to(kind) / 64
                B = torch.randn(rows, RANK, generator=generator).to(kind) / 64
                new.add(name, LoraFactors(A, B, 2.0))
            new.finish(kind="expert", base=BaseIdentity(name="bench"))
    return directories


def merge_in_this_process(inputs: list[Path], method: str, out: Path) -> dict[str, Any]:
    """Time and memory of one merge."""
    import torch
    from peak_memory import PeakMemory

    from seedbed.server.adapters.files import merge_directories

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.randn(300, 300) @ torch.randn(300, 300)  # loads the libraries' buffers, so that they are not counted
    with PeakMemory() as memory:
        start, cpu = time.perf_counter(), time.process_time()
        merge_directories(inputs, method, out, options=METHODS.get(method, {}))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"seconds": seconds, "cpu": cpu, "bytes": memory.extra}


def merged(inputs: list[Path], method: str, out: Path, threads: int) -> dict[str, Any]:
    """One merge in a fresh interpreter; its result is removed."""
    forget(inputs)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--merge", method, "--directory", str(out), *map(str, inputs)]
    try:
        output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    finally:
        shutil.rmtree(out, ignore_errors=True)
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def copied(inputs: list[Path], out: Path) -> float:
    """Seconds that `cp` takes for the same files, flushed to the disk as a merge is."""
    forget(inputs)
    out.mkdir()
    try:
        start = time.perf_counter()
        subprocess.run(["cp", "-r", *map(str, inputs), str(out)], check=True)
        for path in files_of([out]):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        return time.perf_counter() - start
    finally:
        shutil.rmtree(out, ignore_errors=True)


def forget(directories: list[Path]) -> None:
    """Put files out of the page cache, so that they are read from the disk."""
    for path in files_of(directories):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def files_of(directories: list[Path]) -> Iterator[Path]:
    for directory in directories:
        yield from (path for path in directory.rglob("*") if path.is_file())


def require_space(root: Path, count: int, layers: int, dtype: str) -> int:
    """Bytes of all inputs; refuses where they and their copy do not fit with something to spare."""
    numbers = layers * RANK * sum(rows + columns for rows, columns in SHAPES.values())
    size = count * numbers * (2 if dtype == "bfloat16" else 4)
    free = shutil.disk_usage(root).free
    if free < 2.2 * size + 2e9:
        sys.exit(
            f"{dtype}: {2.2 * size / 1e9:.1f} GB and 2 GB to spare are needed in {root}, {free / 1e9:.1f} GB are free"
        )
    return size


def compare(root: Path, options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """All measurements of one dtype, in a directory that is gone afterwards."""
    size = require_space(root, options.adapters, options.layers, dtype)
    with tempfile.TemporaryDirectory(dir=root, prefix="bench-files-") as place:
        out = Path(place) / "out"
        inputs = make_adapters(Path(place) / "many", options.adapters, options.layers, dtype)
        merges, copies = [], []
        for _ in range(options.repeats):
            copies.append(copied(inputs, out))
            merges.append(merged(inputs, "average", out, options.threads))
        few = merged(inputs[:FEW], "average", out, options.threads)
        shutil.rmtree(Path(place) / "many")
        layer = make_adapters(Path(place) / "layer", FEW, 1, dtype)
        memory = {method: merged(layer, method, out, options.threads) for method in METHODS}
    return {
        "dtype": dtype,
        "adapters": options.adapters,
        "layers": options.layers,
        "input_bytes": size,
        "copy_seconds": copies,
        "merge_seconds": [run["seconds"] for run in merges],
        "merge_cpu_seconds": [run["cpu"] for run in merges],
        "ratio": statistics.median(run["seconds"] for run in merges) / statistics.median(copies),
        "bytes": {str(options.adapters): max(run["bytes"] for run in merges), str(FEW): few["bytes"]},
        "methods": memory,
    }


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    for row in rows:
        title = (
            f"{row['adapters']} adapters of {row['layers']} layers, {row['dtype']}, {row['input_bytes'] / 1e9:.2f} GB"
        )
        table = Table("", "median time", "CPU", "speed", "against cp", "memory", title=title, title_justify="left")
        copy, merge = statistics.median(row["copy_seconds"]), statistics.median(row["merge_seconds"])
        speed = row["input_bytes"] / 1e9
        table.add_row("cp", f"{copy:.2f} s", "", f"{speed / copy:.2f} GB/s", "1")
        cpu = statistics.median(row["merge_cpu_seconds"])
        cells = [
            f"{merge:.2f} s",
            f"{cpu:.2f} s",
            f"{speed / merge:.2f} GB/s",
            f"{row['ratio']:.2f} (goal: {GOALS['time']:g} at most)",
        ]
        table.add_row(f"average of {row['adapters']}", *cells, f"{row['bytes'][str(row['adapters'])] / 1e6:.0f} MB")
        table.add_row(f"average of {FEW}", "", "", "", "", f"{row['bytes'][str(FEW)] / 1e6:.0f} MB")
        for method, run in row["methods"].items():
            times = [f"{run['seconds']:.2f} s", f"{run['cpu']:.2f} s", "", ""]
            table.add_row(f"{method} of {FEW}, one layer", *times, f"{run['bytes'] / 1e6:.0f} MB")
        Console(width=None if sys.stdout.isatty() else 110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--directory", type=Path, default=Path(), help="where files are made and removed again")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    parser.add_argument("--merge", help=argparse.SUPPRESS)
    parser.add_argument("inputs", nargs="*", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.merge:
        print(json.dumps(merge_in_this_process(options.inputs, options.merge, options.directory)))
        return
    rows = [compare(options.directory, options, dtype) for dtype in options.dtypes.split(",")]
    show(rows)
    if options.json:
        options.json.write_text(json.dumps({"threads": options.threads, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
