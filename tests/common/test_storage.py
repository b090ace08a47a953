"""What is put comes back or is refused; nothing half-written is believed; two writers do not disturb each other."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.errors import AdapterFormatError, AdapterMismatchError, StorageError
from seedbed.common.files import storing
from seedbed.common.manifest import BaseIdentity
from seedbed.common.storage import (
    DirectoryStore,
    atomic_write,
    new_directory,
    read_adapter,
    read_manifest,
    write_adapter,
)

BASE = BaseIdentity(name="tiny", digest="b" * 64)
RECIPE = "5" * 64


def written(path: Path, value: float = 1.0, recipe: str = "") -> Path:
    adapter = Adapter({"m": LoraFactors(torch.full((1, 2), value), torch.ones(3, 1), 1.0)})
    write_adapter(path, adapter, kind="expert", base=BASE, recipe=recipe)
    return path


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


def test_what_is_put_is_opened_under_its_digest(tmp_path: Path, store: DirectoryStore) -> None:
    source = written(tmp_path / "a", 7.0)
    digest = store.put(source)
    shutil.rmtree(source)
    adapter, manifest = read_adapter(store.open(digest))
    assert adapter["m"].A.tolist() == [[7.0, 7.0]]
    assert digest == manifest.digest


def test_putting_twice_changes_nothing(tmp_path: Path, store: DirectoryStore) -> None:
    source = written(tmp_path / "a")
    digest = store.put(source)
    before = store.open(digest).stat().st_ino
    assert store.put(source) == digest
    assert store.open(digest).stat().st_ino == before
    assert sorted(path.name for path in (store.root / "adapters").iterdir()) == [digest]


def test_only_the_adapters_own_files_are_stored(tmp_path: Path, store: DirectoryStore) -> None:
    source = written(tmp_path / "a")
    (source / "README.md").write_text("private")
    names = {path.name for path in store.open(store.put(source)).iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json", "seedbed.json"}


def test_list_gives_every_manifest_and_ignores_leftovers(tmp_path: Path, store: DirectoryStore) -> None:
    assert store.list() == []
    digests = sorted(store.put(written(tmp_path / str(value), value)) for value in (1.0, 2.0))
    (store.root / "adapters/.tmp-1-abc").mkdir()
    (store.root / "adapters" / ("e" * 64)).mkdir()
    assert [manifest.digest for manifest in store.list()] == digests


def test_a_recipe_finds_what_it_made(tmp_path: Path, store: DirectoryStore) -> None:
    assert store.find(RECIPE) is None
    digest = store.put(written(tmp_path / "a", recipe=RECIPE))
    assert store.find(RECIPE) == digest
    shutil.rmtree(store.root / "adapters" / digest)
    assert store.find(RECIPE) is None


def test_a_recipe_that_is_a_path_is_not_followed(tmp_path: Path, store: DirectoryStore) -> None:
    digest = store.put(written(tmp_path / "a", recipe="../../outside"))
    assert not (tmp_path / "outside").exists()
    (store.root / "recipes").mkdir()
    (store.root / "other").write_text(digest)
    assert store.find("../other") is None


def test_an_absent_adapter_is_a_sentence(store: DirectoryStore) -> None:
    with pytest.raises(StorageError, match="not in the store"):
        store.open("a" * 64)


@pytest.mark.parametrize("digest", ["../../etc", "", "A" * 64, "a" * 63, "a" * 64 + "\n"])
def test_a_digest_that_is_none_is_refused(store: DirectoryStore, digest: str) -> None:
    with pytest.raises(AdapterMismatchError, match="64 hexadecimal digits"):
        store.open(digest)


def test_a_flipped_bit_is_noticed_and_mended_by_putting_again(tmp_path: Path, store: DirectoryStore) -> None:
    source = written(tmp_path / "a")
    digest = store.put(source)
    tensors = store.open(digest) / "adapter_model.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(AdapterMismatchError, match=f"adapter {digest} is damaged"):
        store.open(digest)
    assert store.put(source) == digest
    store.open(digest)


def test_another_adapter_under_this_digest_is_noticed(tmp_path: Path, store: DirectoryStore) -> None:
    digest, other = (store.put(written(tmp_path / str(value), value)) for value in (1.0, 2.0))
    shutil.rmtree(store.root / "adapters" / digest)
    shutil.copytree(store.root / "adapters" / other, store.root / "adapters" / digest)
    with pytest.raises(AdapterMismatchError, match=f"expected adapter {digest}, got {other}"):
        store.open(digest)
    assert [manifest.digest for manifest in store.list()] == [other]


def test_an_edited_manifest_is_refused(tmp_path: Path, store: DirectoryStore) -> None:
    source = written(tmp_path / "a")
    path = source / "seedbed.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(AdapterFormatError, match="not as Seedbed writes it"):
        store.put(source)
    path.unlink()
    with pytest.raises(AdapterFormatError, match=r"no seedbed\.json"):
        store.put(source)
    assert store.list() == []


def test_a_damaged_adapter_is_not_taken_and_leaves_nothing(tmp_path: Path, store: DirectoryStore) -> None:
    source = written(tmp_path / "a")
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterFormatError):
        store.put(source)
    assert list((store.root / "adapters").iterdir()) == []


PUT_MANY = """
import sys
from pathlib import Path
from seedbed.common.storage import DirectoryStore
store = DirectoryStore(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(10):
    for source in sys.argv[2:]:
        store.open(store.put(Path(source)))
"""


def test_two_processes_may_put_the_same_adapters_at_once(tmp_path: Path, store: DirectoryStore) -> None:
    sources = [written(tmp_path / str(value), value, recipe=RECIPE) for value in (1.0, 2.0, 3.0)]
    command = [sys.executable, "-c", PUT_MANY, str(store.root), *map(str, sources)]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert {m.digest for m in store.list()} == {read_manifest(source).digest for source in sources}
    assert not [path for path in store.root.rglob("*") if path.name.startswith(".tmp-")]
    assert store.find(RECIPE) in {m.digest for m in store.list()}


def test_a_file_is_replaced_whole_and_its_directory_is_made(tmp_path: Path) -> None:
    path = tmp_path / "deep/er/file"
    for text in (b"one", b"two"):
        atomic_write(path, text)
        assert path.read_bytes() == text
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write .*file: no space is left") as refusal:
        atomic_write(path, b"new")
    assert refusal.value.hint
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_directory_appears_when_it_is_whole_and_not_when_it_fails(tmp_path: Path) -> None:
    target = tmp_path / "new"

    def interrupted() -> None:
        with new_directory(target) as aside:
            (aside / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    with new_directory(target) as aside:
        (aside / "file").write_text("whole")
        assert not target.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    with pytest.raises(StorageError, match="already there"), new_directory(target):
        pass


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.EACCES, "permission is denied"),
        (errno.EROFS, "the file system is read-only"),
        (errno.ENOSPC, "no space is left"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_the_systems_refusals_are_sentences(code: int, words: str) -> None:
    with pytest.raises(StorageError, match=f"cannot write x: {words}"), storing("write", Path("x")):
        raise OSError(code, os.strerror(code))


def test_a_path_through_a_file_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for refused in (
        lambda: atomic_write(tmp_path / "file/x", b""),
        lambda: written(tmp_path / "file/x"),
        lambda: DirectoryStore(tmp_path / "file").put(written(tmp_path / "a")),
    ):
        with pytest.raises(StorageError, match="cannot write"):
            refused()
