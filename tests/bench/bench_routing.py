"""One routed linear layer, side by side: Seedbed's, a loop over the experts, PEFT's Arrow, and one plain LoRA of rank N · r.

All compute ``y + update(x)`` of one square layer for 512 tokens, `y` being what the frozen layer gave, forward alone (without
gradients) and forward with backward (gradients of x, and of the gate where it is learned; the experts are frozen). Times: all
sides in turn in one process, and the ratio of every turn counts, so that a busy machine hurts all alike. Memory: a process for
each side, peak resident set minus the resident set before, with an allocator that gives back at once.

    python tests/bench/bench_routing.py [--json FILE] [--experts 8,16] [--ranks 16] [--hidden 2048] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TOKENS, ALPHA, TOP_K = 512, 32.0, 2
LIMIT = 1.15
"""Largest time, relative to a plain LoRA of rank N · r."""
SPEED, MEMORY = 3.0, 4.0
"""Least factors against the loop and against PEFT."""
RESOLUTION = 1 << 18
"""Bytes in whose steps the kernel counts resident memory; less is not told apart."""
COMPARED = (
    ("learned", "loop"),
    ("arrow", "arrow loop"),
    ("arrow", "peft arrow"),
    ("lora", "learned"),
    ("lora", "arrow"),
)
"""Which side's time is divided by which (second by first)."""
SIDES = ("learned", "arrow", "loop", "arrow loop", "peft arrow", "lora")

Run = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    experts: int
    rank: int
    hidden: int
    tokens: int
    backward: bool


def inputs(shape: Shape) -> tuple[list[tuple[Any, Any]], Any, Any, Any, Any]:
    """Factors of the experts, input, output of the frozen layer, a gate, and the gradient that comes from above."""
    import torch

    generator = torch.Generator().manual_seed(shape.experts)

    def draw(*sizes: int) -> Any:
        return torch.randn(*sizes, generator=generator)

    factors = [
        (draw(shape.rank, shape.hidden) / shape.hidden**0.5, draw(shape.hidden, shape.rank))
        for _ in range(shape.experts)
    ]
    x, y = draw(shape.tokens, shape.hidden), draw(shape.tokens, shape.hidden)
    return factors, x, y, draw(shape.experts, shape.hidden) / shape.hidden**0.5, draw(shape.tokens, shape.hidden)


def adapters(factors: list[tuple[Any, Any]]) -> list[Any]:
    from seedbed.common.adapter import Adapter, LoraFactors

    return [Adapter({"layer": LoraFactors(A, B, ALPHA / A.shape[0])}) for A, B in factors]


def prepare_ours(shape: Shape, kind: str) -> Run:
    import torch

    from seedbed.common.routing import RoutedUpdate, RouterSettings, arrow_router
    from seedbed.common.routing.gates import make_gate

    factors, x, y, weight, above = inputs(shape)
    experts = adapters(factors)
    if kind == "arrow":
        router = arrow_router(experts, RouterSettings(kind="arrow", top_k=TOP_K))
        settings, tensors = router.settings, router.tensors["layer"]
    else:
        settings = RouterSettings(kind="learned")
        tensors = {"weight": weight, "bias": torch.zeros(shape.experts)}
    gate = make_gate(settings, tensors, shape.experts, dtype=torch.float32, trainable=True)
    update = RoutedUpdate([expert["layer"] for expert in experts], gate)
    return _runner(shape, update, x, y, above, list(gate.parameters()))


def prepare_loop(shape: Shape, kind: str) -> Run:
    """What one writes first: a term for each expert."""
    import torch
    from torch.nn import functional as F

    factors, x, y, weight, above = inputs(shape)
    weight = torch.nn.Parameter(weight, requires_grad=kind == "learned")
    bias = torch.nn.Parameter(torch.zeros(shape.experts), requires_grad=kind == "learned")
    scaling = ALPHA / shape.rank
    prototypes = None
    if kind == "arrow":  # how they are found is not what is measured
        from seedbed.common.routing import arrow_prototypes

        prototypes = arrow_prototypes(adapters(factors))["layer"]

    def probabilities(x: Any) -> Any:
        if prototypes is None:
            return F.linear(x, weight, bias).softmax(-1)
        values, places = F.linear(x, prototypes).abs().topk(TOP_K, dim=-1)
        return torch.full((len(x), shape.experts), -torch.inf).scatter(1, places, values).softmax(-1)

    def update(x: Any, y: Any) -> Any:
        p = probabilities(x)
        for index, (A, B) in enumerate(factors):
            y = y + p[:, index : index + 1] * F.linear(F.linear(x, A), B) * scaling
        return y

    return _runner(shape, update, x, y, above, [weight, bias] if kind == "learned" else [])


def prepare_peft(shape: Shape, _kind: str) -> Run:
    """PEFT's own Arrow layer on the same experts."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import ArrowConfig

    factors, x, y, _, above = inputs(shape)
    base = torch.nn.Sequential()
    base.add_module("layer", torch.nn.Linear(shape.hidden, shape.hidden, bias=False))
    names = [f"task_{index}" for index in range(shape.experts)]
    config = LoraConfig(r=shape.rank, lora_alpha=ALPHA, target_modules=["layer"])
    wrapped = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    layer = wrapped.base_model.model.layer
    for name, (A, B) in zip(names, factors, strict=True):
        layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = A, B
    arrow = ArrowConfig(top_k=TOP_K, rng_seed=0)
    arrow.task_adapter_names, arrow.gks_adapter_names = names, []
    wrapped.add_adapter("router", LoraConfig(r=shape.rank, target_modules=["layer"], arrow_config=arrow))
    wrapped.set_adapter("router")
    wrapped.requires_grad_(False)
    inner, dropout = layer.lora_arrow["router"], layer.lora_dropout["router"]
    inner.build_prototypes(layer.lora_A, layer.lora_B)

    def update(x: Any, y: Any) -> Any:
        return y + inner(x, lora_A=layer.lora_A, lora_B=layer.lora_B, dropout=dropout, scaling=layer.scaling)

    return _runner(shape, update, x, y, above, [])


def prepare_lora(shape: Shape, _kind: str) -> Run:
    """One LoRA of rank N · r, frozen like the experts, as lean as this repository can put it on a layer."""
    import torch
    from torch.nn import functional as F

    factors, x, y, _, above = inputs(shape)
    A = torch.cat([A for A, _ in factors])
    B = torch.cat([B * (ALPHA / shape.rank / shape.experts) for _, B in factors], dim=1)

    def update(x: Any, y: Any) -> Any:
        z = F.linear(x, A)
        return torch.addmm(y, z, B.T) if torch.is_grad_enabled() else y.addmm_(z, B.T)

    return _runner(shape, update, x, y, above, [])


def _runner(shape: Shape, update: Any, x: Any, y: Any, above: Any, parameters: list[Any]) -> Run:
    import torch

    if not shape.backward:

        def forward() -> Any:
            with torch.inference_mode():
                return update(x, y)

        return forward
    x.requires_grad_()

    def both() -> Any:
        update(x, y).backward(above)
        gradients = [x.grad, *(parameter.grad for parameter in parameters)]
        for leaf in (x, *parameters):
            leaf.grad = None
        return gradients

    return both


def prepare(side: str, shape: Shape) -> Run:
    kind = "arrow" if "arrow" in side else "learned"
    if side in ("learned", "arrow"):
        return prepare_ours(shape, kind)
    if side.endswith("loop"):
        return prepare_loop(shape, kind)
    return (prepare_peft if side.startswith("peft") else prepare_lora)(shape, kind)


def time_sides(shape: Shape, turns: int) -> dict[str, list[float]]:
    """Seconds of every side in every turn."""
    runs = {side: prepare(side, shape) for side in SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(turns + 2):
        for side, run in runs.items():
            start = time.perf_counter()
            run()
            if turn >= 2:  # the first two warm up
                seconds[side].append(time.perf_counter() - start)
    return seconds


def weigh_side(side: str, shape: Shape) -> int:
    """Peak bytes of one run above what was there before it."""
    from peak_memory import PeakMemory

    run = prepare(side, shape)
    run()  # loads the libraries' code and buffers, so that they are not counted as this layer's
    with PeakMemory() as memory:
        run()
    return int(memory.extra)


def in_process(shape: Shape, threads: int, *arguments: str, lean: bool = False) -> Any:
    """Run this file with `arguments` in a fresh interpreter, and read the JSON in its last line."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    if lean:
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--shape", json.dumps(asdict(shape)), *arguments]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def compare(shape: Shape, turns: int, threads: int) -> dict[str, Any]:
    seconds = in_process(shape, threads, "--turns", str(turns))
    memory = {side: in_process(shape, threads, "--side", side, lean=True) for side in SIDES}
    ratios = {}
    for less, more in COMPARED:
        each = sorted(b / a for a, b in zip(seconds[less], seconds[more], strict=True))
        low, middle, high = statistics.quantiles(each, n=4)
        bytes_ratio = memory[more] / max(RESOLUTION, memory[less])
        ratios[f"{more} / {less}"] = {"time": middle, "spread": [low, high], "memory": bytes_ratio}
    return {"shape": asdict(shape), "seconds": seconds, "bytes": memory, "ratios": ratios}


def show(rows: list[dict[str, Any]], threads: int) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    for row in rows:
        shape = Shape(**row["shape"])
        what = "forward + backward" if shape.backward else "forward"
        title = (
            f"{what}: {shape.experts} experts of rank {shape.rank}, layer {shape.hidden}², {shape.tokens} tokens, "
            f"{threads} threads"
        )
        table = Table("", "median time", "extra memory", "compared", "time (quartiles)", "memory", "goal", title=title)
        told = list(row["ratios"].items())
        for index in range(max(len(SIDES), len(told))):
            side = SIDES[index] if index < len(SIDES) else ""
            cells = ["", ""]
            if side:
                middle = statistics.median(row["seconds"][side])
                cells = [f"{middle * 1e3:,.2f} ms", f"{row['bytes'][side] / 1e6:,.1f} MB"]
            table.add_row(side, *cells, *(_told(*told[index]) if index < len(told) else []))
        console.print(table)


def _told(name: str, ratio: dict[str, Any]) -> list[str]:
    goal = f"≤ {LIMIT}" if name.endswith("lora") else f"≥ {SPEED:g}, {MEMORY:g}"
    low, high = ratio["spread"]
    return [name, f"{ratio['time']:.2f} ({low:.2f}–{high:.2f})", f"{ratio['memory']:.1f}", goal]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    parser.add_argument("--experts", default="8,16", help="numbers of experts")
    parser.add_argument("--ranks", default="16", help="their ranks")
    parser.add_argument("--hidden", type=int, default=2048, help="side of the square layer")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.shape:
        shape = Shape(**options.shape)
        print(json.dumps(weigh_side(options.side, shape) if options.side else time_sides(shape, options.turns)))
        return
    shapes = [
        Shape(int(experts), int(rank), options.hidden, options.tokens, backward)
        for rank in options.ranks.split(",")
        for experts in options.experts.split(",")
        for backward in (False, True)
    ]
    rows = [compare(shape, options.turns, options.threads) for shape in shapes]
    show(rows, options.threads)
    if options.json:
        options.json.write_text(json.dumps({"threads": options.threads, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
