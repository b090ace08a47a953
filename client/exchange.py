"""Taking part without Flower: fetch the seed, train with any PEFT trainer, hand the expert in, and take it back."""

from __future__ import annotations

import contextlib
import os
import shlex
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from seedbed.client.connect import connect
from seedbed.client.handin import prepare
from seedbed.client.registry import RegistryClient
from seedbed.client.registry_store import RegistryStore
from seedbed.common.adapter_file import AdapterFile
from seedbed.common.basemodel import cache_dir, smollm2_directory
from seedbed.common.compression import INT8
from seedbed.common.embedded import MODEL_DIR
from seedbed.common.errors import ConfigError, StorageError, nearest
from seedbed.common.files import new_directory
from seedbed.common.manifest import Manifest
from seedbed.common.peft_format import expand_adapter
from seedbed.common.registry import Contribution, FederationInfo
from seedbed.common.routing.mixture_file import expert_places
from seedbed.common.routing.router_file import read_router
from seedbed.common.shapes import require_shapes
from seedbed.common.storage import DirectoryStore, read_manifest

_SHORT = 12


def fetch(
    what: str,
    host: str,
    keys: Path | None,
    out: Path | None,
    console: Console,
    *,
    insecure: bool = False,
    progress: Console | None = None,
) -> Path:
    """The verb `fetch`: bring an adapter of a federation to this disk as an ordinary PEFT directory.

    Args:
        what: a digest, the beginning of one (6 digits or more), ``seed`` or ``best``.
        host, keys, insecure: see `connect`.
        out: directory to make, which must not exist; ./NAME of the federation and what it is unless given.
        console: told what it is and how to train from it.
        progress: where a bar may be drawn.

    Returns:
        the directory.

    Raises:
        StorageError: if the directory is there, or there is no such adapter (yet).
        SeedbedError: see `connect` and `RegistryClient`.
    """
    info, access = connect(host, keys, insecure=insecure)
    with RegistryClient(access) as client:
        digest = client.resolve(what)
        out = out or Path(f"{info.name}-{what if what in ('seed', 'best') else digest[:_SHORT]}")
        if os.path.lexists(out):
            raise StorageError(f"{out} is already there", "Name another --out, or remove it first.")
        with _bar(progress, f"fetching {digest[:_SHORT]}") as on_bytes:
            manifest = _bring(client, digest, out, on_bytes)
        _tell_fetched(console, out, manifest, info)
    return out


def contribute(
    directory: Path,
    task: str,
    host: str,
    keys: Path | None,
    name: str,
    console: Console,
    *,
    from_seed: bool = False,
    insecure: bool = False,
    progress: Console | None = None,
) -> Contribution:
    """The verb `contribute`: hand in an expert that was trained elsewhere. It joins the next combination.

    Everything that can be checked here is checked before a byte is sent; the registry checks it again.

    Args:
        directory: a PEFT directory, with or without ``seedbed.json``.
        task: what it was trained on; a name of the federation's, or a new one.
        host, keys, insecure: see `connect`.
        name: what tables call it; made of the task and the digest unless given.
        from_seed: it was trained from the federation's seed; found out where the directory still says so.
        console: told the digest, and how to withdraw it.
        progress: where a bar may be drawn.

    Raises:
        AdapterError: if it does not fit, with the module, what was expected, and what was got.
        ConfigError: if the task is held out.
        SeedbedError: see `connect` and `RegistryClient`.
    """
    info, access = connect(host, keys, insecure=insecure)
    if not task or task in info.held_out:
        why = f"the task {task} is held out: no expert may be trained on it" if task else "no task was named"
        raise ConfigError(why, f"Tasks of this federation: {', '.join(info.tasks)}.")
    with RegistryClient(access) as client, tempfile.TemporaryDirectory(prefix="seedbed-") as aside:
        prepared = prepare(directory, info, task, Path(aside), from_seed=from_seed)
        if info.seed:
            seed = AdapterFile(_cached(client).open(info.seed))
            require_shapes(prepared.shapes, {module: seed.shape(module) for module in seed.names})
        with _bar(progress, f"handing in {prepared.manifest.digest[:_SHORT]}") as on_bytes:
            digest = client.submit(prepared.directory, on_bytes)
        contribution = client.contribute(digest, task, name)
    _tell_contributed(console, contribution, prepared.manifest, info, _options(host, keys, insecure=insecure))
    return contribution


def withdraw(digest: str, host: str, keys: Path | None, console: Console, *, insecure: bool = False) -> Contribution:
    """The verb `withdraw`: take one's own contribution back; the next combination is without it.

    Args:
        digest: that `contribute` printed, or the beginning of it (6 digits or more).
        host, keys, insecure: see `connect`.

    Raises:
        StorageError: if there is no such contribution, or it is another's.
        SeedbedError: see `connect` and `RegistryClient`.
    """
    _, access = connect(host, keys, insecure=insecure)
    with RegistryClient(access) as client:
        gone = client.withdraw(client.resolve(digest))
    _say(
        console,
        f"Withdrawn: {gone.name} ({gone.digest[:_SHORT]}), for task {gone.task}. The next combination is without it.",
    )
    return gone


def _bring(client: RegistryClient, digest: str, out: Path, on_bytes: Callable[[int, int], None]) -> Manifest:
    """An adapter, or a mixture's router with its experts in the folders that it is read from."""
    known = next((one for one in client.manifests() if one.digest == digest), None)
    if known is not None and known.kind == "router":
        _bring_mixture(client, digest, out)
    elif known is not None and known.dtype == INT8:
        _bring_expanded(client, digest, out, on_bytes)
    else:
        client.fetch(digest, out, on_bytes)
    return read_manifest(out)


def _bring_expanded(client: RegistryClient, digest: str, out: Path, on_bytes: Callable[[int, int], None]) -> None:
    """One that travels in a form which only Seedbed reads, as what any PEFT program loads."""
    with tempfile.TemporaryDirectory(prefix="seedbed-", dir=out.absolute().parent) as aside:
        client.fetch(digest, Path(aside) / "int8", on_bytes)
        expand_adapter(Path(aside) / "int8", out)


def _bring_mixture(client: RegistryClient, digest: str, out: Path) -> None:
    with new_directory(out) as aside:
        router = aside / "router"
        client.fetch(digest, router)
        _, names, manifest = read_router(router)
        for file in list(router.iterdir()):
            os.rename(file, aside / file.name)
        router.rmdir()
        for place, parent in zip(expert_places(names), manifest.parents, strict=True):
            client.fetch(parent, aside / place)


def _cached(client: RegistryClient) -> RegistryStore:
    """The registry, with what was fetched before: a seed is large and does not change."""
    return RegistryStore(client, DirectoryStore(cache_dir() / "adapters"))


def _tell_fetched(console: Console, out: Path, manifest: Manifest, info: FederationInfo) -> None:
    made_from = ", ".join(parent[:_SHORT] for parent in manifest.parents) or "nothing: a fresh start"
    rank = f"rank {manifest.rank}, " if manifest.kind != "router" else ""
    _say(console, f"{out}: {manifest.kind} {manifest.digest}")
    _say(console, f"{rank}{manifest.modules} modules, {manifest.dtype}, for base model {manifest.base.name}")
    _say(console, f"made from {made_from}{f', on task {manifest.task}' if manifest.task else ''}")
    if manifest.kind == "router":
        _say(console, "A mixture of experts: measure it with `seedbed evaluate`.")
        return
    named = {"embedded": MODEL_DIR, "smollm2": smollm2_directory()}
    model = named.get(info.base.model, info.base.model)
    _say(console, "Train from it with any PEFT trainer:")
    _say(console, f'    model = AutoModelForCausalLM.from_pretrained("{model}")')
    _say(console, f'    model = PeftModel.from_pretrained(model, "{out}", is_trainable=True)')


def _tell_contributed(
    console: Console, contribution: Contribution, manifest: Manifest, info: FederationInfo, options: str
) -> None:
    parent = f"trained from {manifest.parents[0][:_SHORT]}" if manifest.parents else "without a recorded parent"
    _say(console, f"Contributed: {contribution.name}, rank {manifest.rank}, {parent}, as {contribution.participant}")
    _say(console, f"digest {contribution.digest}")
    if contribution.task not in info.tasks:
        _say(console, f"'{contribution.task}' is a new task here. {nearest(contribution.task, info.tasks)}")
    _say(console, "It joins the next combination. To take it back:")
    _say(console, f"    seedbed withdraw {contribution.digest[:_SHORT]} {options}")


def _options(host: str, keys: Path | None, *, insecure: bool) -> str:
    words = ["--host", host, *(["--keys", str(keys)] if keys else []), *(["--insecure"] if insecure else [])]
    return shlex.join(words)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _bar(console: Console | None, what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar for one transfer, where there is a terminal."""
    if console is None or not console.is_terminal:
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
