"""What a coordinator says of itself: `GET /seedbed.json` at its gateway, over TLS with the authority of one's keys."""

from __future__ import annotations

import ssl
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpx
from pydantic import ValidationError

from seedbed.client.join.address import Address
from seedbed.client.join.keys import Keys
from seedbed.common.errors import ConfigError, EnvironmentFailure
from seedbed.common.registry import FederationInfo, RegistryAccess

PATH = "/seedbed.json"
_LONGEST = 1_000_000
"""Bytes of an answer that are read."""


class UnreachableError(EnvironmentFailure):
    """Nobody answers there, now; it may be different later."""


@dataclass(frozen=True, slots=True)
class Greeting:
    """One answer of a gateway."""

    info: FederationInfo
    clock: float | None
    """Seconds that the coordinator's clock is ahead of ours, to about one second; none where it tells no time."""


class Contact:
    """A coordinator's gateway, seen by one participant.

    Args:
        keys: the participant's; with them the connection is TLS, and both sides show who they are.
        insecure: go without, even where the traffic leaves this machine.

    Raises:
        ConfigError: if there are no keys where they are needed, or they cannot be used.
    """

    def __init__(self, address: Address, keys: Keys | None, *, insecure: bool = False) -> None:
        if keys is None and not insecure and not address.loopback:
            raise ConfigError(
                f"nothing is sent to {address} without keys",
                "Give --keys FOLDER, which the coordinator hands out, or say --insecure in a network that you trust.",
            )
        self.address, self.keys = address, keys
        self._context = tls_context(keys) if keys is not None else None

    @property
    def url(self) -> str:
        scheme = "http" if self.keys is None else "https"
        return f"{scheme}://{self.address}{PATH}"

    def registry(self, info: FederationInfo, name: str) -> RegistryAccess:
        """How to reach the registry of the same coordinator."""
        where = self.address.beside(info.registry_port)
        if self.keys is None:
            return RegistryAccess(address=where, name=name)
        keys = self.keys
        return RegistryAccess(address=where, ca=keys.ca, certificate=keys.certificate, key=keys.key, name=name)

    def greet(self, timeout: float = 10.0) -> Greeting:
        """Ask who the coordinator is.

        Raises:
            UnreachableError: if nobody answers in time.
            EnvironmentFailure: if TLS is refused on either side, or what answers is no coordinator.
            ConfigError: if it speaks another version of Seedbed.
        """
        try:
            # Not through a proxy of the environment: loopback and private addresses are what this is for.
            # Without keys there is no TLS at all, and False only spares reading the authorities of the system.
            with (
                httpx.Client(verify=self._context or False, timeout=timeout, trust_env=False) as client,
                client.stream("GET", self.url) as answer,
            ):
                content = _beginning(answer)
        except httpx.HTTPError as error:
            raise self._trouble(error) from None
        if answer.status_code in (502, 503, 504):
            raise UnreachableError(f"{self.url} answers {answer.status_code}: the coordinator is not ready", _LATER)
        if answer.status_code != 200 or len(content) > _LONGEST:
            raise EnvironmentFailure(f"{self.url} answers {answer.status_code}, no federation is there", _WHERE)
        return Greeting(_info(content, self.url), _clock(answer.headers.get("date")))

    def _trouble(self, error: httpx.HTTPError) -> EnvironmentFailure:
        reason = str(error) or type(error).__name__
        if self.keys is not None and _broke_off(error):
            return UnreachableError(f"the connection to {self.address} broke off while it was made", _LATER)
        if isinstance(error.__cause__, ssl.SSLError) or "SSL" in reason or "CERTIFICATE" in reason.upper():
            said = reason.partition("] ")[2].partition(" (_ssl")[0] or reason
            return EnvironmentFailure(
                f"the TLS connection to {self.address} was refused: {said}",
                "Use the keys that this coordinator handed out, and the host name that its certificate names.",
            )
        if self.keys is None and isinstance(error, httpx.RemoteProtocolError | httpx.ReadError):
            return UnreachableError(f"{self.address} does not answer without TLS: {reason}", "Give --keys FOLDER.")
        return UnreachableError(f"nobody answers at {self.address}: {reason}", _LATER)


_LATER = "See that the coordinator runs and that a firewall lets its port through."
_WHERE = "Check host and port: they are in the `seedbed join` line that the coordinator printed."


def _beginning(answer: httpx.Response) -> bytes:
    """The content, and of one that is too long as much as shows it."""
    content = b""
    for piece in answer.iter_bytes(1 << 16):
        content += piece
        if len(content) > _LONGEST:
            break
    return content


def _broke_off(error: httpx.HTTPError) -> bool:
    """Whether TLS ended without a word: a relay whose coordinator is away does that, or one that is just being killed."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLEOFError | ConnectionResetError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def tls_context(keys: Keys) -> ssl.SSLContext:
    """TLS that trusts the authority of these keys alone, and shows their certificate.

    Raises:
        ConfigError: if certificate and key do not fit or cannot be read.
    """
    try:
        context = ssl.create_default_context(cafile=str(keys.ca))
        context.load_cert_chain(keys.certificate, keys.key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"the keys beside {keys.certificate} cannot be used: {error.strerror or error}",
            "Check that client.crt and client.key belong together and that you may read them.",
        ) from None
    return context


def _info(content: bytes, url: str) -> FederationInfo:
    from importlib.metadata import version

    try:
        return FederationInfo.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the beginning"
        raise ConfigError(
            f"{url} does not say what Seedbed {version('seedbed')} understands: '{where}': {first['msg']}",
            "Use the coordinator's version of Seedbed, and check that the address is a coordinator's.",
        ) from None


def _clock(date: str | None) -> float | None:
    try:
        # The header has whole seconds: on average the time is half a second later.
        return parsedate_to_datetime(date).timestamp() + 0.5 - time.time() if date else None
    except ValueError:
        return None
