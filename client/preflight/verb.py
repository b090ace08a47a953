"""The preflight: all checks in order, with a coordinator or without one."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from seedbed.client.join.address import parse_address
from seedbed.client.join.contact import Contact, Greeting
from seedbed.client.join.gpus import parse_gpus
from seedbed.client.join.keys import load_keys
from seedbed.client.join.place import Place, own_name
from seedbed.client.join.tasks import parse_tasks
from seedbed.client.preflight import connection, machine, material, software
from seedbed.client.preflight.estimate import model_shape
from seedbed.client.preflight.report import Check, Report, failed
from seedbed.common.config import BaseModelConfig, LoraSettings, TrainingSettings
from seedbed.common.errors import SeedbedError
from seedbed.common.registry import FederationInfo


@dataclass(frozen=True, slots=True)
class PreflightRequest:
    """Where a participant has what it joins with; without a host only what this machine alone can tell is checked."""

    host: str | None = None
    """``HOST[:PORT]`` of the coordinator's gateway."""
    tasks: Sequence[str] = ()
    """Data files, NAME=FILE, or YAML files; see `client.join.tasks`."""
    keys: Path | None = None
    """Folder that the coordinator handed out; needed unless it is this machine, or with `insecure`."""
    name: str | None = None
    """The common name of the client certificate, else the host name, unless given."""
    work: Path | None = None
    """Directory of this participant; ~/.local/share/seedbed/NAME unless given."""
    general: Path | None = None
    """File of general-purpose text, for routing tuning."""
    base: Path | None = None
    """Directory of the base model, instead of the one that the federation names."""
    gpus: str = "auto"
    """`auto`, `none`, or indices separated by commas."""
    insecure: bool = False
    """Without TLS, also where the traffic leaves this machine."""


def preflight(request: PreflightRequest) -> Report:
    """Look at everything that a training needs. What is wrong is in the report, not raised."""
    return Report(tuple(_checks(request)))


def run_preflight(request: PreflightRequest, console: Console, *, as_json: bool = False) -> Report:
    """The verb: make the checks and print them, as a table or as JSON. A caller exits by `Report.state`."""
    if as_json:
        report = preflight(request)
        console.print(json.dumps(report.as_json(), indent=2), markup=False, highlight=False, soft_wrap=True)
        return report
    with console.status("checking"):
        report = preflight(request)
    console.print(report.table())
    return report


def _checks(request: PreflightRequest) -> Iterator[Check]:
    greeting = None
    if request.host is not None or request.keys is not None:
        greeting = yield from _way(request)
    info = greeting.info if greeting is not None else None
    yield from software.versions(info)
    yield from _equipment(request, info)
    try:
        sources = parse_tasks(request.tasks, request.general)
    except SeedbedError as error:
        yield failed("data", error)
    else:
        yield from material.data(sources, info)


def _way(request: PreflightRequest) -> Generator[Check, None, Greeting | None]:
    """Checks of the way to the coordinator; returns its greeting, if it gave one."""
    try:
        keys = load_keys(request.keys) if request.keys is not None else None
        if keys is not None:
            yield from connection.keys(keys)
        if request.host is None:
            return None
        contact = Contact(parse_address(request.host), keys, insecure=request.insecure)
    except SeedbedError as error:
        yield failed("keys", error)
        return None
    greeting, check = connection.gateway(contact)
    yield check
    if greeting is not None:
        yield connection.clock(greeting.clock, signed=keys is not None)
        yield connection.registry(contact, greeting.info, own_name(request.name, keys))
    return greeting


def _equipment(request: PreflightRequest, info: FederationInfo | None) -> Iterator[Check]:
    """Devices, base model, memory, DeepSpeed, disk."""
    try:
        gpus = parse_gpus(request.gpus)
        place = Place.of(own_name(request.name, None), request.work)
        config = material.local_base(info.base if info is not None else BaseModelConfig(), request.base)
    except SeedbedError as error:
        yield failed("options", error)
        return
    found, check = machine.devices(gpus)
    yield check
    shape = None
    if info is not None or request.base is not None:
        directory, check = material.base_model(config, info)
        yield check
        try:
            shape = model_shape(directory, info.lora if info is not None else LoraSettings()) if directory else None
        except SeedbedError as error:
            yield Check("memory", "warn", error.message, error.hint)
    if shape is not None:
        training = info.training if info is not None else None
        yield machine.memory(shape, training or TrainingSettings(), config, found, known=training is not None)
    yield software.deepspeed(len(found.names) if found.gpu else 0)
    yield machine.disk(place.root, shape)
