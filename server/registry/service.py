"""The servicer: it unpacks a call, says who calls, has the work done elsewhere, and packs the answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from pydantic_core import PydanticSerializationError

from seedbed.common.errors import ConfigError, EnvironmentFailure
from seedbed.common.events import Event, EventKind, EventLog
from seedbed.common.files import storing
from seedbed.common.registry import CHUNK
from seedbed.proto.v1 import registry_pb2 as pb
from seedbed.server.registry import messages
from seedbed.server.registry.contributions import Contributions
from seedbed.server.registry.fairness import Rates, Turns
from seedbed.server.registry.identity import Identities
from seedbed.server.registry.information import Information
from seedbed.server.registry.quotas import Quotas
from seedbed.server.registry.refusals import Busy, Refusal, refusing
from seedbed.server.registry.store import ServedStore
from seedbed.server.registry.uploads import Announced, Uploads

PAGE = 200
"""Manifests in one answer at most."""
REPORTED: frozenset[EventKind] = frozenset({"step", "note", "job", "node"})
"""Kinds of events that participants tell; what the federation decided or measured only it may tell."""
REPORT_LIMIT = 8192
"""Bytes of one reported event."""
_RATE, _BURST = 20.0, 100.0
"""Reports of one participant in a second, and at once."""


class Service:
    """`seedbed.v1.Registry` over one run directory.

    Args:
        threads: calls that are answered at the same time: half of them may be of `Watch`, a quarter of one participant.
    """

    def __init__(
        self,
        run: Path,
        store: ServedStore,
        information: Information,
        identities: Identities,
        quotas: Quotas,
        *,
        threads: int,
    ) -> None:
        self._store = store
        self._information = information
        self._identities = identities
        self._quotas = quotas
        self._uploads = Uploads(run / "uploads", store, quotas)
        self._contributions = Contributions(run, store, information)
        self._events = EventLog(run / "events.jsonl")
        self._watchers = threading.BoundedSemaphore(max(1, threads // 2))
        self._turns = Turns(max(2, threads // 4))
        self._reports = Rates(_RATE, _BURST)
        self.closing = threading.Event()

    def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:  # noqa: N802
        with self._caller(context) as peer:
            limits, info = self._quotas.limits, self._information.info()
            answer = pb.DescribeResponse(
                limits=pb.Limits(upload=limits.upload, participant=limits.participant, used=self._quotas.used(peer))
            )
            if info is not None:
                answer.federation.CopyFrom(messages.federation(info))
            if request.digest:
                whole = self._store.holds(request.digest)
                answer.holding.complete = whole
                answer.holding.received = 0 if whole else self._uploads.received(peer, request.digest)
            return answer

    def List(self, request: pb.ListRequest, context: Any) -> pb.ListResponse:  # noqa: N802
        with self._caller(context):
            if request.recipe:
                digest = self._store.find(request.recipe)
                return pb.ListResponse(manifests=[self._store.entry(digest).manifest] if digest else [])
            found, token = self._store.page(request.page_token, min(request.page_size or PAGE, PAGE))
            return pb.ListResponse(manifests=[manifest.canonical() for manifest in found], next_page_token=token)

    def Fetch(self, request: pb.FetchRequest, context: Any) -> Iterator[pb.FetchResponse]:  # noqa: N802
        with self._caller(context) as peer:
            entry = self._store.entry(request.digest)
            if request.offset > entry.size:
                raise ConfigError(f"expected an offset of at most {entry.size:,}, got {request.offset:,}")
            started, offset = time.monotonic(), request.offset
            yield pb.FetchResponse(header=pb.Header(manifest=entry.manifest, config=entry.config, size=entry.size))
            with storing("read", Path(request.digest)), entry.tensors.open("rb", buffering=0) as file:
                file.seek(offset)
                while data := file.read(CHUNK):
                    yield pb.FetchResponse(tensors=data)
                    offset += len(data)
            self._transferred("fetched", peer, request.digest, offset - request.offset, started)

    def Submit(self, requests: Iterator[pb.SubmitRequest], context: Any) -> pb.SubmitResponse:  # noqa: N802
        with self._caller(context) as peer:
            announced = _announced(next(requests, None))
            if self._store.holds(announced.digest):
                return pb.SubmitResponse(holding=pb.Holding(complete=True))
            started = time.monotonic()
            with self._uploads.open(peer, announced, context.cancel) as upload:
                for request in requests:
                    upload.write(request.tensors)
                received = upload.received
                if received < upload.size:
                    return pb.SubmitResponse(holding=pb.Holding(received=received))
                self._uploads.finish(peer, upload)
            self._transferred("submitted", peer, announced.digest, received - announced.offset, started)
            return pb.SubmitResponse(holding=pb.Holding(complete=True))

    def Watch(self, request: pb.WatchRequest, context: Any) -> Iterator[pb.WatchResponse]:  # noqa: N802
        with self._caller(context):
            if not self._watchers.acquire(blocking=False):
                raise Busy("too many are watching this federation")
            try:
                offset = request.offset
                while context.is_active() and not self.closing.is_set():
                    found, following = self._events.read_numbered(offset)
                    for event, behind in found:
                        yield pb.WatchResponse(event=messages.event(event), offset=behind)
                    if following == offset:
                        self.closing.wait(0.2)
                        self._identities.peer(context)  # whoever is revoked meanwhile sees no more
                    offset = following
            finally:
                self._watchers.release()

    def Contribute(self, request: pb.ContributeRequest, context: Any) -> pb.ContributeResponse:  # noqa: N802
        with self._caller(context) as peer:
            found, new = self._contributions.contribute(request.digest, request.task, request.name, peer)
            if new:
                self._tell("contributed", peer, found.name, digest=found.digest, task=found.task)
            return pb.ContributeResponse(contribution=messages.contribution(found))

    def Withdraw(self, request: pb.WithdrawRequest, context: Any) -> pb.WithdrawResponse:  # noqa: N802
        with self._caller(context) as peer:
            found, new = self._contributions.withdraw(request.digest, peer)
            if new:
                self._tell("withdrawn", peer, found.name, digest=found.digest, task=found.task)
            return pb.WithdrawResponse(contribution=messages.contribution(found))

    def Report(self, request: pb.ReportRequest, context: Any) -> pb.ReportResponse:  # noqa: N802
        with self._caller(context) as peer:
            if request.event.kind not in REPORTED:
                known = ", ".join(sorted(REPORTED))
                raise Refusal(
                    grpc.StatusCode.PERMISSION_DENIED,
                    EnvironmentFailure,
                    f"a participant tells of {known}, not of '{request.event.kind[:40]}'",
                )
            if request.ByteSize() > REPORT_LIMIT:
                raise ConfigError(f"expected an event of at most {REPORT_LIMIT:,} bytes, got {request.ByteSize():,}")
            if not self._reports.allows(peer):
                raise Busy(f"{peer} reports too often")
            try:
                self._events.append(messages.reported(request.event, peer))
            except (UnicodeError, PydanticSerializationError):
                raise ConfigError("the event holds text that is no Unicode") from None
            return pb.ReportResponse()

    @contextmanager
    def _caller(self, context: Any) -> Iterator[str]:
        """Who calls, for as long as the call takes; its errors become its status."""
        with refusing(context):
            peer = self._identities.peer(context)
            with self._turns.one(peer):
                yield peer

    def _transferred(self, way: str, peer: str, digest: str, count: int, started: float) -> None:
        self._tell("transfer", peer, way, digest=digest, bytes=count, seconds=round(time.monotonic() - started, 3))

    def _tell(self, kind: EventKind, node: str, name: str, **detail: Any) -> None:
        self._events.append(Event(kind=kind, node=node, name=name, detail=detail))


def _announced(request: pb.SubmitRequest | None) -> Announced:
    if request is None or request.WhichOneof("part") != "begin":
        raise ConfigError("an upload begins with what is handed in, and this one does not")
    begin = request.begin
    return Announced(begin.digest, begin.header.manifest, begin.header.config, begin.header.size, begin.offset)
