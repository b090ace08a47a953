"""Checks of what is installed: versions against what Seedbed needs and the coordinator runs, and whether DeepSpeed works."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
from collections.abc import Iterator

from seedbed.client.preflight.report import Check
from seedbed.common.registry import FederationInfo

_PACKAGES = ("torch", "transformers", "peft", "flwr", "deepspeed", "safetensors", "grpcio")
_IMPORT_SECONDS = 180.0


def versions(info: FederationInfo | None) -> Iterator[Check]:
    """Python and every package that a training depends on; Seedbed itself against the coordinator's."""
    yield Check("python", "ok", platform.python_version())
    own = importlib.metadata.version("seedbed")
    if info is not None and info.version != own:
        remedy = f"Install seedbed=={info.version} here, or have the coordinator use {own}."
        yield Check("seedbed", "fail", f"{own} here, {info.version} at the coordinator", remedy)
    else:
        yield Check("seedbed", "ok", own if info is None else f"{own}, as at the coordinator")
    yield _packages()


def _packages() -> Check:
    from packaging.requirements import Requirement

    wanted = {}
    for line in importlib.metadata.requires("seedbed") or ():
        requirement = Requirement(line)
        if requirement.marker is None:  # not of an extra
            wanted[requirement.name] = requirement.specifier
    found, wrong = [], []
    for name in _PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        found.append(f"{name} {version}")
        if name in wanted and not wanted[name].contains(version, prereleases=True):
            wrong.append(f"{name} {version} is not {wanted[name]}")
    if wrong:
        return Check("packages", "fail", "; ".join(wrong), "Install Seedbed again, in an environment of its own.")
    return Check("packages", "ok", ", ".join(found))


def deepspeed(gpus: int) -> Check:
    """Whether DeepSpeed can be imported, which fails for a missing compiler or a CUDA that does not fit.

    Args:
        gpus: how many there are; without any, plain torch trains, and the seconds of the import are spared.
    """
    if not gpus:
        there = importlib.util.find_spec("deepspeed") is not None
        state = f"{importlib.metadata.version('deepspeed')} is there" if there else "is not there"
        return Check("deepspeed", "ok", f"{state}; not needed: plain torch trains on a CPU")
    command = [sys.executable, "-c", "import deepspeed; print(deepspeed.__version__)"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=False)
        said = (ran.stdout.strip() or "").splitlines()[-1:] if ran.returncode == 0 else []
        reason = (ran.stderr.strip().splitlines() or ["no reason given"])[-1]
    except subprocess.TimeoutExpired:
        said, reason = [], f"its import takes more than {_IMPORT_SECONDS:.0f} s"
    if said:
        return Check("deepspeed", "ok", f"{said[0]}, trains on the GPUs")
    remedy = "Install DeepSpeed again, or have the coordinator set training.engine to torch."
    return Check("deepspeed", "fail", f"cannot be imported: {reason}", remedy)
