"""The first contact with a coordinator: what it says of itself at its gateway, and from that the way to its registry.

Without keys nothing is encrypted and nobody knows whom they talk to: then only loopback is spoken to, unless the user says
that this is wanted.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from pydantic import ValidationError

from seedbed.client.join.address import Address, parse_address
from seedbed.client.join.keys import Keys, load_keys
from seedbed.common.errors import ConfigError, EnvironmentFailure
from seedbed.common.registry import FederationInfo, RegistryAccess

_TIMEOUT = 15.0
_LIMIT = 4_000_000
"""Bytes that a gateway's answer may have."""


@dataclass(frozen=True, slots=True)
class Gateway:
    """A coordinator's gateway, and the keys to talk to it with.

    Args:
        address: where it is.
        keys: of the participant; none talks plain HTTP.
    """

    address: Address
    keys: Keys | None = None

    @classmethod
    def of(cls, host: str, keys: Path | None, *, insecure: bool = False) -> Gateway:
        """Read what a user says.

        Raises:
            ConfigError: if the address or the keys make no sense, or there are no keys and the address is not loopback.
        """
        address = parse_address(host)
        if keys is None and not address.loopback and not insecure:
            raise ConfigError(
                f"{address} is another machine and no keys were given: nothing would be encrypted",
                "Give --keys FOLDER, as the coordinator handed it out, or say --insecure.",
            )
        return cls(address, load_keys(keys) if keys is not None else None)

    @property
    def url(self) -> str:
        return f"{'https' if self.keys else 'http'}://{self.address}"

    def client(self) -> httpx.Client:
        """An HTTP client that trusts the keys' authority alone; to be closed."""
        verify: ssl.SSLContext | bool = _context(self.keys) if self.keys else True
        # Proxies of the environment are not for a coordinator, whose address the user has named.
        return httpx.Client(base_url=self.url, verify=verify, timeout=_TIMEOUT, trust_env=False)

    def get(self, path: str, client: httpx.Client | None = None) -> Any:
        """The JSON value at a path of the gateway.

        Raises:
            EnvironmentFailure: if nobody answers there, or with something else.
        """
        if client is None:
            with self.client() as client:
                return self.get(path, client)
        try:
            with client.stream("GET", path) as answer:
                answer.raise_for_status()
                return _json(answer, f"{self.url}{path}")
        except httpx.HTTPStatusError as error:
            raise EnvironmentFailure(
                f"{self.url}{path} answered {error.response.status_code}", "Is it the gateway of `seedbed coordinator`?"
            ) from None
        except httpx.HTTPError as error:
            raise EnvironmentFailure(f"{self.url} does not answer: {_why(error)}", _advice(error)) from None

    def describe(self) -> FederationInfo:
        """What the coordinator says of its federation.

        Raises:
            EnvironmentFailure: see `get`; also if what it says is not understood.
        """
        try:
            return FederationInfo.model_validate(self.get("/seedbed.json"))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise EnvironmentFailure(
                f"{self.url}/seedbed.json is not understood: {where}: {first['msg']}",
                "Use the same version of Seedbed as the coordinator.",
            ) from None

    def registry(self, info: FederationInfo) -> RegistryAccess:
        """How to reach the federation's registry with these keys.

        Raises:
            ConfigError: if it wants keys and there are none.
        """
        address = self.address.beside(info.registry_port)
        if self.keys is None:
            if info.secure:
                raise ConfigError("the registry asks for keys and none were given", "Give --keys FOLDER.")
            return RegistryAccess(address=address)
        return RegistryAccess(
            address=address,
            ca=self.keys.ca,
            certificate=self.keys.certificate,
            key=self.keys.key,
            name=self.keys.name,
        )


def connect(host: str, keys: Path | None, *, insecure: bool = False) -> tuple[FederationInfo, RegistryAccess]:
    """Ask a coordinator what it is doing, and where its registry is.

    Args:
        host: HOST or HOST:PORT of the gateway.
        keys: the participant's folder; none for a coordinator without keys.
        insecure: talk to another machine without keys.

    Raises:
        ConfigError, EnvironmentFailure: see `Gateway`.
    """
    gateway = Gateway.of(host, keys, insecure=insecure)
    info = gateway.describe()
    return info, gateway.registry(info)


def _context(keys: Keys) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=str(keys.ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(keys.certificate, keys.key)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"the keys beside {keys.ca} cannot be used: {error.strerror or error}", _KEYS) from None
    return context


def _json(answer: httpx.Response, source: str) -> Any:
    data = b""
    for part in answer.iter_bytes():
        data += part
        if len(data) > _LIMIT:
            raise EnvironmentFailure(f"{source} is larger than {_LIMIT:,} bytes", "Is it a coordinator of Seedbed?")
    try:
        return httpx.Response(200, content=data).json()
    except (ValueError, RecursionError):
        raise EnvironmentFailure(f"{source} is not JSON", "Is it the gateway of `seedbed coordinator`?") from None


_KEYS = "Name the folder participants/NAME that `seedbed keys` made, whole as it was handed out."


def _why(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.TimeoutException):
        return f"no answer within {_TIMEOUT:.0f} s"
    return str(error) or type(error).__name__


def _advice(error: httpx.HTTPError) -> str:
    if "CERTIFICATE" in str(error).upper() or "SSL" in str(error).upper():
        return "Check that --keys names a folder made by this coordinator's authority, and whether it uses keys at all."
    return "Check the address, and that the coordinator runs and can be reached from here."
