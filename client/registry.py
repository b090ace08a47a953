"""A participant's way to the registry of its federation: adapters by digest, events, contributions.

Network trouble is waited out: calls are repeated with back-off, transfers continued where they broke off, until nothing has
got on for `patience` seconds.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from seedbed.client import registry_messages as messages
from seedbed.client.registry_calls import Patience, Watchdog, open_channel, patiently
from seedbed.client.registry_transfer import Download, OnBytes, Outgoing, downloading
from seedbed.common.errors import AdapterError, AdapterMismatchError, ConfigError, EnvironmentFailure, StorageError
from seedbed.common.events import Event
from seedbed.common.manifest import Manifest
from seedbed.common.registry import NAME_KEY, Contribution, FederationInfo, RegistryAccess
from seedbed.common.storage import is_digest, read_manifest, require_digest
from seedbed.proto.v1 import registry_pb2 as pb
from seedbed.proto.v1 import registry_pb2_grpc

_PREFIX = re.compile(r"[0-9a-f]{6,63}")
_EXAMINING = 900.0
"""Seconds in which a registry has examined a contribution of any size."""
_REPORTING = 5.0
"""Seconds that a report may take."""


class RegistryClient:
    """A registry, for one participant. It connects when it is first asked; any number of threads may use it.

    Args:
        access: where it is, and the participant's certificates.
        deadline: seconds that one call may take, and that a transfer may stand still.
        patience: seconds for which trouble of the network is waited out.

    Raises:
        StorageError: if a certificate or key cannot be read.
    """

    def __init__(self, access: RegistryAccess, *, deadline: float = 30.0, patience: float = 60.0) -> None:
        self.access = access
        self._deadline = deadline
        self._patience = patience
        self._channel = open_channel(access)
        self._stub: Any = registry_pb2_grpc.RegistryStub(self._channel)
        self._metadata = ((NAME_KEY, access.name.encode()),) if access.name else ()
        self._closed = threading.Event()

    def __enter__(self) -> RegistryClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all calls; `watch` returns."""
        self._closed.set()
        self._channel.close()

    # -- what there is ------------------------------------------------------------------------------------------------

    def info(self) -> FederationInfo:
        """What the federation is.

        Raises:
            EnvironmentFailure: if the registry does not answer, or the federation is not set up within `patience`.
        """
        patience = self._new_patience()
        while True:
            answer = patiently(lambda: self._call("Describe", pb.DescribeRequest()), patience)
            if answer.HasField("federation"):
                return messages.federation(answer.federation)
            patience.wait("the federation is not set up yet")

    def manifests(self) -> list[Manifest]:
        """Of all adapters, in the order of their digests."""
        found: list[Manifest] = []
        token = ""
        while True:
            answer = self._patiently("List", pb.ListRequest(page_token=token))
            found += [Manifest.model_validate_json(data) for data in answer.manifests]
            token = answer.next_page_token
            if not token:
                return found

    def find(self, recipe: str) -> str | None:
        """Digest of the adapter that a recipe made, if there is one."""
        if not is_digest(recipe):
            return None
        answer = self._patiently("List", pb.ListRequest(recipe=recipe))
        return Manifest.model_validate_json(answer.manifests[0]).digest if answer.manifests else None

    def resolve(self, name: str) -> str:
        """The digest that a name means: a digest, the beginning of one (6 digits or more), ``seed`` or ``best``.

        Raises:
            StorageError: if there is no such adapter (yet).
            ConfigError: if it is no name, or the beginning of several.
        """
        if is_digest(name):
            return name
        if name in ("seed", "best"):
            info = self.info()
            digest: str = getattr(info, name)
            if not digest:
                raise StorageError(
                    f"the federation {info.name} has no '{name}' yet, its state is {info.state}",
                    "Watch it with `seedbed watch`, and ask again.",
                )
            return digest
        if not _PREFIX.fullmatch(name):
            raise ConfigError(
                f"expected a digest, its first 6 or more digits, 'seed' or 'best', got {name[:80]!r}",
                "The digests stand in the lineage of the report.",
            )
        return self._unique(name)

    # -- adapters --------------------------------------------------------------------------------------------------------

    def fetch(self, digest: str, directory: Path, on_bytes: OnBytes | None = None) -> Manifest:
        """Bring an adapter to this disk: whole and verified, or not there at all.

        Args:
            directory: what it becomes; must not exist. What was broken off is beside it and is continued.
            on_bytes: told of the bytes that are there, and of all.

        Raises:
            StorageError: if the directory is already there, the registry does not hold it, or the disk refuses.
            AdapterError: if what comes is damaged.
            EnvironmentFailure: if the registry does not answer.
        """
        require_digest(digest)
        if os.path.lexists(directory):
            raise StorageError(f"{directory} is already there", "Choose another output, or remove it first.")
        with downloading(digest, directory) as download:
            if download is None:
                return read_manifest(directory)
            try:
                self._download(digest, download, on_bytes or _quiet)
                return download.finish()
            except AdapterError:  # nothing of it is worth going on from
                download.discard()
                raise
            except StorageError:
                if not download.received:
                    download.discard()
                raise

    def submit(self, directory: Path, on_bytes: OnBytes | None = None) -> str:
        """Hand in an adapter and return its digest; what is already there is not sent again.

        Args:
            directory: a PEFT directory or a router's. Without ``seedbed.json`` it counts as an adapter from outside.
            on_bytes: told of the bytes that are sent, and of all.

        Raises:
            AdapterError: if it is malformed, here or to the registry.
            StorageError: if a quota or the registry's disk has no room for it.
            EnvironmentFailure: if the registry does not answer.
        """
        outgoing = Outgoing.of(directory)
        patience = self._new_patience()
        anew = False
        while True:
            holding = self._patiently("Describe", pb.DescribeRequest(digest=outgoing.manifest.digest)).holding
            if holding.complete:
                break
            try:
                if self._attempt(outgoing, holding.received, patience, on_bytes or _quiet):
                    break
            except AdapterMismatchError:
                # What an earlier upload left may have been spoiled by a crash: once more from the beginning.
                if anew or not holding.received:
                    raise
                anew = True
        (on_bytes or _quiet)(outgoing.size, outgoing.size)
        return outgoing.manifest.digest

    # -- the federation ---------------------------------------------------------------------------------------------------

    def contribute(self, digest: str, task: str, name: str = "") -> Contribution:
        """Hand in an adapter that the registry holds as an expert for a task.

        Raises:
            SeedbedError: saying why it may not join.
        """
        request = pb.ContributeRequest(digest=digest, task=task, name=name)
        return messages.contribution(self._patiently("Contribute", request, _EXAMINING).contribution)

    def withdraw(self, digest: str) -> Contribution:
        """Take one's own contribution back.

        Raises:
            StorageError: if there is none, or it is another's.
        """
        return messages.contribution(self._patiently("Withdraw", pb.WithdrawRequest(digest=digest)).contribution)

    def watch(self, offset: int = 0) -> Iterator[Event]:
        """Every event from an offset on, then those that come, until `close`.

        Raises:
            EnvironmentFailure: if the registry does not answer any more.
        """
        return (event for event, _ in self.watch_numbered(offset))

    def watch_numbered(self, offset: int = 0) -> Iterator[tuple[Event, int]]:
        """As `watch`, each event with the offset that follows it."""
        patience = self._new_patience()
        while not self._closed.is_set():
            try:
                for answer in self._stub.Watch(pb.WatchRequest(offset=offset), metadata=self._metadata):
                    patience.progress()
                    offset = answer.offset
                    event = messages.event(answer.event)
                    if event is not None:
                        yield event, offset
            except (grpc.RpcError, ValueError) as error:
                if self._closed.is_set():
                    return
                patience.wait(error if isinstance(error, grpc.RpcError) else str(error))
            else:
                patience.wait("it ended the stream of events")

    def report(self, event: Event) -> None:
        """Tell what this participant is doing. Tried once and briefly: nothing depends on it.

        Raises:
            SeedbedError: if that fails; a training goes on all the same.
        """
        request = pb.ReportRequest(event=messages.reported(event))
        patiently(lambda: self._call("Report", request, _REPORTING), Patience(self.access.address, 0.0))

    # -- calls ------------------------------------------------------------------------------------------------------------

    def _call(self, method: str, request: Any, seconds: float | None = None) -> Any:
        if self._closed.is_set():
            raise EnvironmentFailure(f"the connection to the registry {self.access.address} was closed")
        return getattr(self._stub, method)(request, timeout=seconds or self._deadline, metadata=self._metadata)

    def _patiently(self, method: str, request: Any, seconds: float | None = None) -> Any:
        return patiently(lambda: self._call(method, request, seconds), self._new_patience())

    def _new_patience(self) -> Patience:
        return Patience(self.access.address, self._patience)

    def _unique(self, prefix: str) -> str:
        found = [manifest.digest for manifest in self.manifests() if manifest.digest.startswith(prefix)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ConfigError(f"{len(found)} adapters begin with {prefix}", "Give more digits.")
        raise StorageError(f"no adapter begins with {prefix}", "The digests stand in the lineage of the report.")

    def _download(self, digest: str, download: Download, on_bytes: OnBytes) -> None:
        """Receive until all bytes are there and are the right ones; of those that an earlier process left, once anew."""
        patience = self._new_patience()
        while True:
            try:
                self._receive(digest, download, patience, on_bytes)
            except grpc.RpcError as error:
                patience.wait(error)
                continue
            if download.is_whole() or not download.resumed:
                return
            download.restart()

    def _receive(self, digest: str, download: Download, patience: Patience, on_bytes: OnBytes) -> None:
        call = self._stub.Fetch(pb.FetchRequest(digest=digest, offset=download.received), metadata=self._metadata)
        with Watchdog(call, self._deadline) as watchdog:
            download.begin(next(call).header)
            for answer in call:
                download.write(answer.tensors)
                watchdog.tick()
                patience.progress()
                on_bytes(download.received, download.size)

    def _attempt(self, outgoing: Outgoing, offset: int, patience: Patience, on_bytes: OnBytes) -> bool:
        """Try to send what is missing; whether the registry has it all then. A failure of the network is waited out."""
        reason: grpc.RpcError | str = "it ended an upload before its end"
        try:
            if self._upload(outgoing, offset, patience, on_bytes):
                return True
        except grpc.RpcError as error:
            reason = error
        except grpc.FutureCancelledError:
            reason = f"nothing moved for {self._deadline:g} seconds"
        patience.wait(reason)
        return False

    def _upload(self, outgoing: Outgoing, offset: int, patience: Patience, on_bytes: OnBytes) -> bool:
        """Send from an offset on; whether the registry has it all then."""
        watchdogs: list[Watchdog] = []

        def sent(position: int) -> None:
            patience.progress()
            on_bytes(position, outgoing.size)
            for watchdog in watchdogs:
                watchdog.tick()
                if position == outgoing.size:  # the registry flushes and checks the whole before it answers
                    watchdog.allow(_EXAMINING)

        call = self._stub.Submit.future(outgoing.requests(offset, sent), metadata=self._metadata)
        # Before it goes on from an offset, the registry reads again what it has.
        with Watchdog(call, _EXAMINING if offset else self._deadline) as watchdog:
            watchdogs.append(watchdog)
            return bool(call.result().holding.complete)


def _quiet(done: int, size: int) -> None:
    """Nobody is told."""
