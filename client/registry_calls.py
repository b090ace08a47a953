"""Calls to a registry over a network that fails now and then: patience, back-off, and errors as Seedbed has them."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import grpc

from seedbed.common.errors import EnvironmentFailure, SeedbedError
from seedbed.common.files import storing
from seedbed.common.hosts import is_loopback
from seedbed.common.registry import CHUNK, ERROR_KEY, HINT_KEY, MESSAGE_LIMIT, RegistryAccess

_FIRST, _LONGEST = 0.1, 10.0
"""Seconds of back-off before the second try, and at most."""
_FINAL = {
    grpc.StatusCode.UNAUTHENTICATED: "Ask whoever runs the federation for keys.",
    grpc.StatusCode.PERMISSION_DENIED: "Ask whoever runs the federation.",
    grpc.StatusCode.UNIMPLEMENTED: "Its version of Seedbed is another one, or this is no registry: check host and port.",
    grpc.StatusCode.INVALID_ARGUMENT: "Its version of Seedbed is another one: use the same.",
    grpc.StatusCode.NOT_FOUND: "Check host and port.",
}
"""Refusals that the same call would meet again."""
_UNTRUSTED = ("SSL_ERROR_SSL", "Hostname Verification Check failed")

T = TypeVar("T")


def open_channel(access: RegistryAccess) -> grpc.Channel:
    """A channel that connects when it is first used.

    Raises:
        StorageError: if a certificate or key cannot be read.
    """
    options = (
        ("grpc.max_receive_message_length", MESSAGE_LIMIT),
        ("grpc.max_send_message_length", MESSAGE_LIMIT),
        ("grpc.http2.max_frame_size", CHUNK),
        # A registry that hangs, or a line that was cut, is noticed within half a minute.
        ("grpc.keepalive_time_ms", 15_000),
        ("grpc.keepalive_timeout_ms", 15_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 5_000),
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", int(not is_loopback(access.address.rpartition(":")[0]))),
    )
    if access.ca is None:
        return grpc.insecure_channel(access.address, options)
    ca, key, certificate = (_read(path) for path in (access.ca, access.key, access.certificate))
    return grpc.secure_channel(access.address, grpc.ssl_channel_credentials(ca, key, certificate), options)


class Patience:
    """Waits longer and longer between tries, and gives up when nothing has got on for `seconds` since the first failure."""

    def __init__(self, address: str, seconds: float) -> None:
        self._address = address
        self._seconds = seconds
        self._tries = 0
        self._since: float | None = None

    def progress(self) -> None:
        """Something has got on: begin to count anew."""
        self._tries, self._since = 0, None

    def wait(self, error: grpc.RpcError | str) -> None:
        """Back off after a failed try.

        Raises:
            SeedbedError: in place of a refusal, which another try would meet again.
            EnvironmentFailure: if patience is at its end.
        """
        reason = error if isinstance(error, str) else _reason(error, self._address)
        if self._since is None:
            self._since = time.monotonic()
        left = self._seconds - (time.monotonic() - self._since)
        # Full jitter: many that lost one registry do not all come back at once.
        pause = random.uniform(0, min(_LONGEST, _FIRST * 2 ** min(self._tries, 20)))
        if left <= 0:
            raise EnvironmentFailure(
                f"the registry {self._address} does not answer: {reason}",
                "Check that the coordinator runs, the address, and the network; with TLS, that the keys are still valid.",
            )
        self._tries += 1
        time.sleep(min(pause, left))


def patiently(call: Callable[[], T], patience: Patience) -> T:
    """The result of a call that is tried again while the network fails.

    Raises:
        SeedbedError: see `Patience.wait`.
    """
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            patience.wait(error)


class Watchdog:
    """Cancels a streaming call in which nothing has moved for some time.

    Args:
        seconds: of standstill.
    """

    def __init__(self, call: Any, seconds: float) -> None:
        self._call = call
        self._seconds = seconds
        self._moved = time.monotonic()
        self._over = threading.Event()

    def tick(self) -> None:
        """Something has moved."""
        self._moved = time.monotonic()

    def allow(self, seconds: float) -> None:
        """Let it stand still so long from now on."""
        self._seconds = max(self._seconds, seconds)

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._call.cancel()

    def _watch(self) -> None:
        while not self._over.wait(max(0.05, self._moved + self._seconds - time.monotonic())):
            if time.monotonic() - self._moved >= self._seconds:
                self._call.cancel()
                return


def _reason(error: grpc.RpcError, address: str) -> str:
    """Why another try may help.

    Raises:
        SeedbedError: if none will.
    """
    details = (error.details() or "").strip()
    metadata: dict[str, Any] = {entry.key: entry.value for entry in error.trailing_metadata() or ()}
    if ERROR_KEY in metadata:
        kind = _KINDS.get(metadata[ERROR_KEY].decode("utf-8", "replace"), EnvironmentFailure)
        raise kind(details, metadata.get(HINT_KEY, b"").decode("utf-8", "replace")) from None
    if any(sign in details for sign in _UNTRUSTED):
        raise EnvironmentFailure(
            f"no trusted connection to the registry {address}: {details.splitlines()[0][:200]}",
            "Check that the keys are this federation's, and that its certificate names this host.",
        ) from None
    if error.code() in _FINAL:
        raise EnvironmentFailure(f"the registry {address} refuses: {details}", _FINAL[error.code()]) from None
    return f"{error.code().name.lower()}: {details}" if details else error.code().name.lower()


def _tree(root: type[SeedbedError]) -> dict[str, type[SeedbedError]]:
    return {root.__name__: root} | {name: kind for sub in root.__subclasses__() for name, kind in _tree(sub).items()}


_KINDS = {name: kind for name, kind in _tree(SeedbedError).items() if kind.__module__ == SeedbedError.__module__}


def _read(path: Path | None) -> bytes | None:
    if path is None:
        return None
    with storing("read", path):
        return path.read_bytes()
