"""Merging by truncated SVD, side by side: Seedbed's and PEFT's ``add_weighted_adapter(combination_type="svd")``.

Eight LoRA adapters of rank 16 on one square linear layer are averaged and cut to rank 16 again, in one run, in turn.
Every measurement has a process of its own, so that memory is what this work took: peak resident set minus the resident
set before. The error is that of the result against the best rank-16 approximation in float64.

Then the iterative merge, on one layer and on all 224 modules of a 7B model (see merge_iterative.py).

    python tests/bench/bench_merge.py [--json FILE] [--sizes 1024,2048] [--threads 2] [--layers 32] [--large]

`--large` adds 4096², where PEFT takes minutes. `--layers` less than 32 takes part of the 7B model, and 0 none.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peak_memory import PeakMemory

N, RANK = 8, 16
REPEATS = {"seedbed": 30, "peft": {1024: 3, 2048: 2}}
GOALS = {
    1024: {"speed": 80.0, "memory": 50.0},
    2048: {"speed": 500.0, "memory": 50.0},
    4096: {"speed": 1000.0, "memory": 50.0},
}
LARGE = 4096


def make_inputs(size: int) -> list[tuple[Any, Any]]:
    """Eight pairs A [16, size], B [size, 16], the same in every process."""
    import torch

    generator = torch.Generator().manual_seed(size)
    return [
        (torch.randn(RANK, size, generator=generator) / size**0.5, torch.randn(size, RANK, generator=generator))
        for _ in range(N)
    ]


def prepare_seedbed(size: int) -> Callable[[], tuple[Any, Any]]:
    """A call that merges and gives ``(A, B)`` of the result, whose update is ``B · A``."""
    from seedbed.common.adapter import Adapter, LoraFactors
    from seedbed.server.merging import METHODS

    adapters = [Adapter({"layer": LoraFactors(A, B, 1.0)}) for A, B in make_inputs(size)]
    method = METHODS["svd"]
    options = method.parse({"rank": RANK})

    def merge() -> tuple[Any, Any]:
        merged = method.merge(adapters, None, options)["layer"]
        return merged.A, merged.B * merged.scaling

    return merge


def prepare_peft(size: int) -> Callable[[], tuple[Any, Any]]:
    """As `prepare_seedbed`, by PEFT, with its defaults."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Sequential()
    model.add_module("layer", torch.nn.Linear(size, size, bias=False))
    names = [f"expert{index}" for index in range(N)]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["layer"])
    wrapped = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    layer = wrapped.base_model.model.layer
    for name, (A, B) in zip(names, make_inputs(size), strict=True):
        layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = A, B

    def merge() -> tuple[Any, Any]:
        if "merged" in wrapped.peft_config:
            wrapped.delete_adapter("merged")
        with torch.no_grad():
            wrapped.base_model.add_weighted_adapter(names, [1 / N] * N, "merged", combination_type="svd", svd_rank=RANK)
        return layer.lora_A["merged"].weight.detach(), layer.lora_B["merged"].weight.detach()

    return merge


PREPARE = {"seedbed": prepare_seedbed, "peft": prepare_peft}


def measure(side: str, size: int, repeats: int) -> dict[str, Any]:
    """In a process of its own: memory and error of the first merge at this size, and the times of `repeats`."""
    import torch

    PREPARE[side](256)()  # loads the libraries' code and buffers, so that they are not counted as the merge's
    merge = PREPARE[side](size)
    with PeakMemory() as memory:
        start = time.perf_counter()
        A, B = merge()
        first = time.perf_counter() - start
    times = [] if side == "seedbed" else [first]
    while len(times) < repeats:
        start = time.perf_counter()
        merge()
        times.append(time.perf_counter() - start)
    return {"seconds": times, "bytes": memory.extra, "error": _error(A.double(), B.double(), size, torch)}


def _error(A: Any, B: Any, size: int, torch: Any) -> float:
    """Relative Frobenius distance to the best rank-16 approximation, in float64 and with no code of either side.

    The exact mean is ``L · R`` with L [size, 128], R [128, size]. Its right singular vectors lie in the span of R's
    rows, so it is decomposed in an orthonormal basis of those.
    """
    pairs = make_inputs(size)
    L, R = torch.cat([b for _, b in pairs], 1).double() / N, torch.cat([a for a, _ in pairs], 0).double()
    basis = torch.linalg.qr(R.T).Q
    U, S, Vh = torch.linalg.svd(L @ (R @ basis), full_matrices=False)
    best = (U[:, :RANK] * S[:RANK]) @ (Vh[:RANK] @ basis.T)
    return float(torch.linalg.norm(B @ A - best) / torch.linalg.norm(best))


def run_side(side: str, size: int, repeats: int, threads: int, layers: int = 0) -> dict[str, Any]:
    """Measure in a fresh interpreter."""
    import os

    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--side", side, "--sizes", str(size), "--repeats", str(repeats)]
    command += ["--layers", str(layers)]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def compare(size: int, threads: int) -> dict[str, Any]:
    """Seedbed before and after PEFT, so that a machine that changes under way shows as spread."""
    repeats = REPEATS["peft"].get(size, 1)  # type: ignore[attr-defined]
    ours = [run_side("seedbed", size, REPEATS["seedbed"], threads)]  # type: ignore[arg-type]
    theirs = run_side("peft", size, repeats, threads)
    ours.append(run_side("seedbed", size, REPEATS["seedbed"], threads))  # type: ignore[arg-type]
    seconds = [time for side in ours for time in side["seconds"]]
    quartiles = statistics.quantiles(seconds, n=4)
    middle = statistics.median(theirs["seconds"])
    return {
        "size": size,
        "seedbed": {"seconds": seconds, "bytes": max(side["bytes"] for side in ours), "error": ours[0]["error"]},
        "peft": theirs,
        "speed": middle / statistics.median(seconds),
        "speed_spread": [min(theirs["seconds"]) / quartiles[2], max(theirs["seconds"]) / quartiles[0]],
        "memory": theirs["bytes"] / max(1, max(side["bytes"] for side in ours)),
        "goals": GOALS.get(size, {}),
    }


def show(rows: list[dict[str, Any]], threads: int) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"Mean of {N} adapters of rank {RANK}, cut to rank {RANK}; {threads} threads"
    table = Table(
        "layer", "", "median time", "extra memory", "error to float64", "faster (spread)", "less memory", title=title
    )
    for row in rows:
        for side in ("peft", "seedbed"):
            seconds = statistics.median(row[side]["seconds"])
            cells = [f"{seconds * 1e3:,.1f} ms", f"{row[side]['bytes'] / 1e6:,.1f} MB", f"{row[side]['error']:.1e}"]
            low, high = row["speed_spread"]
            ratios = [f"{row['speed']:,.0f}× ({low:,.0f}–{high:,.0f})", f"{row['memory']:,.0f}×"]
            table.add_row(f"{row['size']}²", side, *cells, *(ratios if side == "seedbed" else []))
        if row["goals"]:
            table.add_row("", "goal", "", "", "", f"{row['goals']['speed']:,.0f}×", f"{row['goals']['memory']:,.0f}×")
        table.add_section()
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def show_iterative(found: dict[str, Any], threads: int) -> None:
    import merge_iterative
    from rich.console import Console

    table = merge_iterative.table(found["layer"], found["model"], threads)
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def measure_side(options: argparse.Namespace) -> dict[str, Any]:
    """What a fresh interpreter was started for."""
    if options.side in PREPARE:
        return measure(options.side, int(options.sizes), options.repeats)
    import merge_iterative

    return (
        merge_iterative.measure_layer(options.repeats)
        if options.side == "iterative"
        else merge_iterative.measure_model(options.layers)
    )


def iterative(threads: int, layers: int) -> dict[str, Any]:
    layer = run_side("iterative", 0, 5, threads)
    return {"layer": layer, "model": run_side("model", 0, 1, threads, layers) if layers else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    parser.add_argument("--sizes", default="1024,2048", help="sides of the square layers; empty for none")
    parser.add_argument("--large", action="store_true", help=f"also {LARGE}², where PEFT takes minutes: once each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--layers", type=int, default=32, help="layers of the 7B model for iterative; fewer extrapolate"
    )
    parser.add_argument("--side", choices=[*sorted(PREPARE), "iterative", "model"], help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure_side(options)))
        return
    sizes = [int(size) for size in options.sizes.split(",") if size] + [LARGE] * options.large
    rows = [compare(size, options.threads) for size in sizes]
    if rows:
        show(rows, options.threads)
    folded = iterative(options.threads, options.layers)
    show_iterative(folded, options.threads)
    if options.json:
        found = {"threads": options.threads, "rows": rows, "iterative": folded}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
