"""The run's store as the registry serves it: read in pieces."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from pathlib import Path

import grpc

from seedbed.common.errors import StorageError
from seedbed.common.files import storing
from seedbed.common.manifest import Manifest
from seedbed.common.storage import DirectoryStore, file_names, read_manifest
from seedbed.server.registry.refusals import Refusal


@dataclass(frozen=True, slots=True)
class Entry:
    """One adapter of the store, opened to be sent."""

    manifest: bytes
    config: bytes
    tensors: Path
    size: int
    """Bytes of the tensors."""


class ServedStore(DirectoryStore):
    """A `DirectoryStore` with what a server needs beside it."""

    def entry(self, digest: str) -> Entry:
        """One adapter, to be sent. Its hashes are not computed: whoever receives it does that.

        Raises:
            Refusal: if it is not here.
            AdapterError, StorageError: if it is damaged or cannot be read.
        """
        directory = self.place(digest)
        if not directory.is_dir():
            raise Refusal(
                grpc.StatusCode.NOT_FOUND,
                StorageError,
                f"adapter {digest} is not in the registry",
                "`seedbed fetch` takes a digest, its beginning, `seed` or `best`.",
            )
        manifest = read_manifest(directory)
        tensors, config = (directory / name for name in file_names(manifest.kind))
        with storing("read", Path(digest)):
            return Entry(manifest.canonical(), config.read_bytes(), tensors, tensors.stat().st_size)

    def page(self, after: str, size: int) -> tuple[list[Manifest], str]:
        """Manifests of the next adapters in the order of their digests.

        Args:
            after: the digest behind which the page begins; empty begins at the first.
            size: manifests at most.

        Returns:
            the manifests, without damaged ones, and the digest to go on behind; empty where there is no more.
        """
        digests = self.digests()
        first = bisect.bisect_right(digests, after)
        chosen = digests[first : first + size]
        return [*self.manifests(chosen)], chosen[-1] if first + size < len(digests) else ""
