"""How the verbs that do not run Flower reach a coordinator: its gateway for what it says of itself, then its registry."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from seedbed.client.join.address import parse_address
from seedbed.client.join.contact import Contact, tls_context
from seedbed.client.join.keys import load_keys
from seedbed.client.join.place import own_name
from seedbed.common.errors import EnvironmentFailure
from seedbed.common.registry import FederationInfo, RegistryAccess

_TIMEOUT = 15.0
_LIMIT = 32_000_000
"""Bytes that a gateway's answer may have."""


def connect(host: str, keys: Path | None, *, insecure: bool = False) -> tuple[FederationInfo, RegistryAccess]:
    """Ask a coordinator what it is doing, and where its registry is.

    Args:
        host: HOST or HOST:PORT of the gateway.
        keys: the folder that the coordinator handed out; none for one without keys.
        insecure: talk to another machine without keys.

    Raises:
        ConfigError: if the address or the keys make no sense, or there are no keys and the address is not loopback.
        EnvironmentFailure: if nobody answers, or something else than a coordinator.
    """
    contact = _contact(host, keys, insecure=insecure)
    info = contact.greet().info
    return info, contact.registry(info, own_name(None, contact.keys))


def gateway(host: str, keys: Path | None, *, insecure: bool = False) -> Callable[[str], Any]:
    """A function that gets the JSON value at a path of a coordinator's gateway, such as ``/status.json``.

    Its connection is kept between calls. It raises EnvironmentFailure if nobody answers, or with something else.

    Raises:
        ConfigError: see `connect`.
    """
    contact = _contact(host, keys, insecure=insecure)
    verify = tls_context(contact.keys) if contact.keys else True
    base = contact.url.removesuffix("/seedbed.json")
    # Not through a proxy of the environment: the user has named the coordinator.
    client = httpx.Client(base_url=base, verify=verify, timeout=_TIMEOUT, trust_env=False)
    return lambda path: _get(client, base, path)


def _contact(host: str, keys: Path | None, *, insecure: bool) -> Contact:
    return Contact(parse_address(host), load_keys(keys) if keys is not None else None, insecure=insecure)


def _get(client: httpx.Client, base: str, path: str) -> Any:
    hint = "Check the address, and that the coordinator runs and can be reached from here."
    try:
        with client.stream("GET", path) as answer:
            data = b""
            for part in answer.iter_bytes():
                data += part
                if len(data) > _LIMIT:
                    raise EnvironmentFailure(f"{base}{path} is larger than {_LIMIT:,} bytes", "Is it a coordinator?")
    except httpx.HTTPError as error:
        raise EnvironmentFailure(f"{base} does not answer: {error or type(error).__name__}", hint) from None
    if answer.status_code != 200:
        raise EnvironmentFailure(f"{base}{path} answers {answer.status_code}", hint)
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise EnvironmentFailure(f"{base}{path} is not JSON", "Is it the gateway of `seedbed coordinator`?") from None
