"""A registry as an `AdapterStore`: what was fetched or made here is kept here, so that it travels once."""

from __future__ import annotations

from pathlib import Path

from seedbed.client.registry import RegistryClient
from seedbed.common.errors import AdapterError, StorageError
from seedbed.common.manifest import Manifest
from seedbed.common.storage import DirectoryStore


class RegistryStore:
    """An `AdapterStore` on the other side of a network.

    Args:
        client: the registry.
        cache: where adapters are kept on this machine; several processes may share it.
    """

    def __init__(self, client: RegistryClient, cache: DirectoryStore) -> None:
        self.client = client
        self.cache = cache

    def put(self, directory: Path) -> str:
        """See `AdapterStore.put`: kept here first, then handed in, so that a network that fails loses nothing.

        Raises:
            SeedbedError: see `DirectoryStore.put` and `RegistryClient.submit`.
        """
        digest = self.cache.put(directory)
        return self.client.submit(self.cache.open(digest))

    def open(self, digest: str) -> Path:
        """See `AdapterStore.open`: from this machine, or fetched to it.

        Raises:
            SeedbedError: see `DirectoryStore.open` and `RegistryClient.fetch`.
        """
        try:
            return self.cache.open(digest)
        except StorageError:
            pass
        place = self.cache.place(digest)
        try:
            self.client.fetch(digest, place)
        except StorageError:
            if not place.is_dir():  # else another process was first
                raise
            return self.cache.open(digest)
        return place

    def list(self) -> list[Manifest]:
        """See `AdapterStore.list`: what the registry holds."""
        return self.client.manifests()

    def find(self, recipe: str) -> str | None:
        """See `AdapterStore.find`. What only this machine holds is handed in before it is believed."""
        own = self.cache.find(recipe)
        if own is None:
            return self.client.find(recipe)
        try:
            return self.client.submit(self.cache.open(own))
        except AdapterError:  # damaged here: the registry may have it whole
            return self.client.find(recipe)
