"""The iterative merge on one large layer, on all layers of a 7B model, and against float64 with full decompositions.

Called by bench_merge.py, each part in a process of its own.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from peak_memory import PeakMemory
from rich.console import Console
from rich.progress import track
from rich.table import Table

from seedbed.common.adapter import LoraFactors
from seedbed.server.merging import METHODS

N, RANK, SIDE, LAYERS = 8, 16, 4096, 32
CHECKED_SIDE = 1024
"""Side of the layer on which the result is compared: seven full decompositions in float64 take seconds there."""
MODULES = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
"""``(out, in)`` of q, k, v, o, gate, up and down of one of the 32 layers of a 7B model."""
# The error's goal is a multiple of what full decompositions in float32 have.
GOALS = {"seconds": 1.0, "model_seconds": 300.0, "resident": 1e9, "error": 1.5}


def make_updates(out: int, width: int, number: int, seeded: bool) -> list[LoraFactors]:
    """Eight updates; those of one seed drift from it by a fifth of its size."""
    generator = torch.Generator().manual_seed(number)
    A, B = torch.randn(RANK, width, generator=generator) / width**0.5, torch.randn(out, RANK, generator=generator)
    if not seeded:
        A, B = A * 0, B * 0
    drift = 0.2 if seeded else 1.0
    return [
        LoraFactors(
            A + drift * torch.randn(RANK, width, generator=generator) / width**0.5,
            B + drift * torch.randn(out, RANK, generator=generator),
            1.0,
        )
        for _ in range(N)
    ]


def merge(updates: list[LoraFactors]) -> LoraFactors:
    """With default options, as `seedbed merge --method iterative` does it for each module."""
    return METHODS["iterative"].merge_module("layer", updates, [1 / N] * N)


def measure_layer(repeats: int) -> dict[str, Any]:
    """Times and extra memory on one 4096 × 4096 layer, and errors on a smaller one."""
    merge(make_updates(256, 256, 0, seeded=True))  # loads code and buffers
    updates = make_updates(SIDE, SIDE, 1, seeded=True)
    seconds = []
    with PeakMemory() as memory:
        for _ in range(repeats):
            start = time.perf_counter()
            merge(updates)
            seconds.append(time.perf_counter() - start)
    errors = {name: _errors(name == "seeded") for name in ("seeded", "independent")}
    return {"seconds": seconds, "bytes": memory.extra, "errors": errors}


def measure_model(layers: int) -> dict[str, Any]:
    """All modules of so many layers, one after the other; inputs are made between, and are not timed."""
    shapes = MODULES * layers
    seconds = 0.0
    with PeakMemory() as memory:
        steps = track(enumerate(shapes), "modules", len(shapes), console=Console(stderr=True), transient=True)
        for number, (out, width) in steps if sys.stderr.isatty() else enumerate(shapes):
            updates = make_updates(out, width, number, seeded=True)
            start = time.perf_counter()
            merge(updates)
            seconds += time.perf_counter() - start
    return {"layers": layers, "modules": len(shapes), "seconds": seconds, "resident": memory.peak}


def _errors(seeded: bool) -> dict[str, float]:
    """Relative Frobenius distances to the same merge in float64 with full decompositions, of ours and of such in float32.

    The latter says what float32 allows: where two entries of opposite signs are equal in size, the larger of them jumps.
    """
    updates = make_updates(CHECKED_SIDE, CHECKED_SIDE, 2, seeded)
    exact = _folded(updates, torch.float64)
    ours = merge(updates).to(dtype=torch.float64).delta()
    candidates = {"ours": ours, "full, float32": _folded(updates, torch.float32).double()}
    size = torch.linalg.norm(exact)
    return {name: float(torch.linalg.norm(result - exact) / size) for name, result in candidates.items()}


def _folded(updates: list[LoraFactors], dtype: torch.dtype) -> torch.Tensor:
    """The merge written down again: dense, full decompositions, no code of ours."""
    kept = -(-RANK * 4 // 5)

    def cut(matrix: torch.Tensor) -> torch.Tensor:
        U, S, Vh = torch.linalg.svd(matrix)
        return (U[:, :kept] * S[:kept]) @ Vh[:kept]

    dense = [update.B.to(dtype) @ update.A.to(dtype) for update in updates]
    fold = cut(dense[0])
    for matrix in dense[1:]:
        other = cut(matrix)
        fold = cut(torch.where(other.abs() > fold.abs(), other, fold))
    return fold


def table(layer: dict[str, Any], model: dict[str, Any] | None, threads: int) -> Table:
    """Both measurements with their goals; what is extrapolated says so."""
    shown = Table("", "measured", "goal", title=f"iterative, {N} adapters of rank {RANK}, defaults; {threads} threads")
    seconds = sorted(layer["seconds"])
    middle = seconds[len(seconds) // 2]
    shown.add_row(
        f"one {SIDE}² layer", f"{middle:.2f} s ({seconds[0]:.2f}–{seconds[-1]:.2f})", f"{GOALS['seconds']:.0f} s"
    )
    shown.add_row("  extra memory", f"{layer['bytes'] / 1e6:.0f} MB", "")
    for name, error in layer["errors"].items():
        ours, full = error["ours"], error["full, float32"]
        shown.add_row(
            f"  error to float64, {CHECKED_SIDE}², {name}",
            f"{ours:.1e} (full decompositions in float32: {full:.1e})",
            f"{GOALS['error'] * full:.1e}",
        )
    if model is None:
        return shown
    whole = model["layers"] == LAYERS
    measured = f"{model['modules']} modules of a 7B model ({model['layers']} of {LAYERS} layers)"
    shown.add_row(measured, f"{model['seconds']:.0f} s", f"{GOALS['model_seconds']:.0f} s" if whole else "")
    if not whole:
        expected = model["seconds"] * LAYERS / model["layers"]
        shown.add_row(
            f"  EXTRAPOLATED to {LAYERS} layers, not measured", f"{expected:.0f} s", f"{GOALS['model_seconds']:.0f} s"
        )
    shown.add_row("  resident memory at most", f"{model['resident'] / 1e6:.0f} MB", f"{GOALS['resident'] / 1e6:.0f} MB")
    return shown
