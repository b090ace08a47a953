"""Routers and mixtures written, read, and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from seedbed.common.adapter import Adapter
from seedbed.common.errors import (
    AdapterError,
    AdapterFormatError,
    AdapterMismatchError,
    ConfigError,
    NonFiniteError,
    StorageError,
)
from seedbed.common.manifest import BaseIdentity
from seedbed.common.routing import (
    KINDS,
    ROUTER_FILES,
    Mixture,
    MixtureSlot,
    Router,
    RouterSettings,
    load_mixture,
    read_mixture,
    read_router,
    write_mixture,
    write_router,
)
from seedbed.common.storage import write_adapter

Make = Callable[..., Any]
BASE = BaseIdentity(name="embedded", digest="ab" * 32)
NAMES = ("ada", "b/o b", "cy")


def put_experts(root: Path, experts: tuple[Adapter, ...]) -> tuple[list[Path], list[str]]:
    paths = [root / f"expert{index}" for index in range(len(experts))]
    manifests = [write_adapter(path, own, kind="expert", base=BASE) for path, own in zip(paths, experts, strict=True)]
    return paths, [manifest.digest for manifest in manifests]


def put_router(path: Path, router: Router, parents: list[str], **options: Any) -> Any:
    return write_router(path, router, **{"kind": "router", "base": BASE, "names": NAMES, "parents": parents, **options})


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_comes_back_as_it_was(kind: str, tmp_path: Path, experts: Any, router: Make) -> None:
    made = router(kind, experts)
    parents = ["0" * 64, "1" * 64, "2" * 64]
    manifest = put_router(tmp_path / "r", made, parents, recipe="x", metrics={"loss": 1.5}, settings={"steps": 3})
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == sorted(ROUTER_FILES)
    back, names, read = read_router(tmp_path / "r", base=BASE)
    assert (back.settings, names, read) == (made.settings, NAMES, manifest)
    assert read.parents == tuple(parents)
    assert read.kind == "router"
    assert read.rank == 3
    assert read.modules == len(made.tensors)
    assert back.tensors.keys() == made.tensors.keys()
    for name, module in made.tensors.items():
        assert back.tensors[name].keys() == module.keys()
        for key, tensor in module.items():
            assert torch.equal(back.tensors[name][key], tensor)


def test_the_same_router_gives_the_same_bytes(tmp_path: Path, experts: Any, router: Make) -> None:
    for name in ("a", "b"):
        put_router(tmp_path / name, router("learned", experts), ["0" * 64] * 3)
    for file in ROUTER_FILES:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_gate_is_a_router_of_one_expert(tmp_path: Path) -> None:
    gate = Router(RouterSettings(kind="phatgoose", top_k=1), {"a.b": {"gates": torch.ones(1, 3)}})
    put_router(tmp_path / "g", gate, ["0" * 64], kind="gate", names=("ada",), task="sums")
    back, names, manifest = read_router(tmp_path / "g")
    assert (names, manifest.kind, manifest.task) == (("ada",), "gate", "sums")
    assert back.tensors["a.b"]["gates"].tolist() == [[1, 1, 1]]


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"parents": []}, ConfigError, "digests of 3 experts as the router's parents, got 0"),
        ({"names": ("a",), "parents": ["0" * 64]}, ConfigError, r"\[1, in\]"),
        ({"metrics": {"loss": float("nan")}}, NonFiniteError, "metric loss is nan"),
    ],
)
def test_a_router_that_makes_no_sense_is_not_written(
    change: dict[str, Any], error: type[Exception], said: str, tmp_path: Path, experts: Any, router: Make
) -> None:
    with pytest.raises(error, match=said):
        put_router(tmp_path / "r", router("learned", experts), **{"parents": ["0" * 64] * 3, **change})
    assert not (tmp_path / "r").exists()


def test_numbers_that_are_not_finite_are_neither_written_nor_read(tmp_path: Path, experts: Any, router: Make) -> None:
    bad = Router(RouterSettings(kind="arrow"), {"a": {"prototypes": torch.full((3, 2), torch.nan)}})
    with pytest.raises(NonFiniteError, match="module a: the router's prototypes"):
        put_router(tmp_path / "r", bad, ["0" * 64] * 3)


def test_what_is_there_is_not_overwritten(tmp_path: Path, experts: Any, router: Make) -> None:
    put_router(tmp_path / "r", router("uniform", experts), ["0" * 64] * 3)
    with pytest.raises(StorageError, match="already there"):
        put_router(tmp_path / "r", router("uniform", experts), ["0" * 64] * 3)


@pytest.mark.parametrize("name", ROUTER_FILES)
def test_a_missing_file_is_named(name: str, tmp_path: Path, experts: Any, router: Make) -> None:
    put_router(tmp_path / "r", router("learned", experts), ["0" * 64] * 3)
    (tmp_path / "r" / name).unlink()
    with pytest.raises(AdapterFormatError, match=f"has no {name}"):
        read_router(tmp_path / "r")


@pytest.mark.parametrize("name", ROUTER_FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_file_is_refused(name: str, damage: str, tmp_path: Path, experts: Any, router: Make) -> None:
    put_router(tmp_path / "r", router("learned", experts), ["0" * 64] * 3)
    data = bytearray((tmp_path / "r" / name).read_bytes())
    if damage == "flip":
        data[-3] ^= 0x10
    (tmp_path / "r" / name).write_bytes({"flip": data, "truncate": data[:-5], "empty": b""}[damage])
    with pytest.raises(AdapterError) as refused:
        read_router(tmp_path / "r")
    assert refused.value.hint


def rewrite(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change router_config.json and have the manifest vouch for it, as a forger would."""
    import hashlib

    from seedbed.common.adapter_file import read_manifest

    config = json.loads((directory / "router_config.json").read_text())
    change(config)
    data = json.dumps(config).encode()
    (directory / "router_config.json").write_bytes(data)
    manifest = read_manifest(directory).model_copy(update={"config_sha256": hashlib.sha256(data).hexdigest()})
    (directory / "seedbed.json").write_bytes(manifest.canonical())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config: config["settings"].update(kind="lerned"), "there is no router 'lerned'"),
        (lambda config: config["settings"].update(top_k=0), "top_k 0"),
        (lambda config: config["settings"].update(top_k=9), "top_k 9 of the router is larger"),
        (lambda config: config["settings"].update(kind="arrow"), "expected tensors prototypes"),
        (lambda config: config.update(names=["a"]), "expected rank 3 from seedbed.json, got 1"),
        (lambda config: config.update(code="rm"), "code Extra inputs"),
        (lambda config: config.pop("names"), "names Field required"),
    ],
)
def test_a_configuration_that_lies_is_refused(
    change: Callable[[dict[str, Any]], None], said: str, tmp_path: Path, experts: Any, router: Make
) -> None:
    put_router(tmp_path / "r", router("learned", experts), ["0" * 64] * 3)
    rewrite(tmp_path / "r", change)
    with pytest.raises(AdapterError, match=said):
        read_router(tmp_path / "r")


def test_an_adapter_is_no_router_and_another_base_model_is_refused(tmp_path: Path, experts: Any, router: Make) -> None:
    put_router(tmp_path / "r", router("learned", experts), ["0" * 64] * 3)
    with pytest.raises(AdapterMismatchError, match="another base model"):
        read_router(tmp_path / "r", base=BaseIdentity(name="embedded", digest="cd" * 32))
    (path, *_), _ = put_experts(tmp_path, experts)
    with pytest.raises(AdapterFormatError, match=r"has no router\.safetensors"):
        read_router(path)


@pytest.fixture
def written(tmp_path: Path, experts: Any, router: Make) -> Path:
    paths, digests = put_experts(tmp_path, experts)
    put_router(tmp_path / "router", router("learned", experts), digests)
    write_mixture(tmp_path / "mixture", paths, tmp_path / "router")
    return tmp_path / "mixture"


def test_a_mixture_loads_onto_a_model_with_one_call(written: Path, model: Any, experts: Any, router: Make) -> None:
    assert sorted(path.name for path in (written / "experts").iterdir()) == ["0-ada", "1-b-o-b", "2-cy"]
    inputs = {"input_ids": torch.tensor([[5, 17, 42, 8]]), "use_cache": False}
    slot = MixtureSlot(model)
    slot.put(Mixture(NAMES, experts, router("learned", experts)))
    with torch.inference_mode():
        expected = model(**inputs).logits
        slot.put(None)
        loaded = load_mixture(model, written, base=BASE)
        got = model(**inputs).logits
        tokens = model.generate(**inputs | {"use_cache": True}, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert loaded.mixture is not None
    assert loaded.mixture.names == NAMES
    loaded.put(None)
    assert torch.equal(got, expected)
    assert tokens.shape[1] >= 5


def test_peft_loads_the_experts_inside(written: Path, experts: Any) -> None:
    from seedbed.common.storage import read_adapter

    back, manifest = read_adapter(written / "experts" / "0-ada")
    assert manifest.kind == "expert"
    assert all(torch.equal(back[name].A, factors.A) for name, factors in experts[0].items())


def test_experts_must_be_those_of_the_router(tmp_path: Path, experts: Any, router: Make) -> None:
    paths, digests = put_experts(tmp_path, experts)
    put_router(tmp_path / "router", router("learned", experts), digests)
    with pytest.raises(AdapterMismatchError, match="expert 'ada' of the router: expected"):
        write_mixture(tmp_path / "mixture", paths[::-1], tmp_path / "router")
    with pytest.raises(AdapterMismatchError, match=r"routes 3 experts .*, got 2"):
        write_mixture(tmp_path / "mixture", paths[:2], tmp_path / "router")
    assert not (tmp_path / "mixture").exists()


def test_a_mixture_with_an_expert_exchanged_missing_or_damaged_is_refused(written: Path) -> None:
    first, last = written / "experts" / "0-ada", written / "experts" / "2-cy"
    tensors = first / "adapter_model.safetensors"
    good = tensors.read_bytes()
    tensors.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(AdapterMismatchError, match="tensors_sha256"):
        read_mixture(written)
    tensors.write_bytes(good)
    read_mixture(written)
    first.rename(written / "experts" / "3-ada")
    with pytest.raises(AdapterMismatchError, match="expert 'ada' of the router"):
        read_mixture(written)
    (written / "experts" / "3-ada").rename(first)
    last.rename(written / "elsewhere")
    with pytest.raises(AdapterMismatchError, match=r"routes 3 experts"):
        read_mixture(written)


def test_a_router_without_its_experts_says_so(written: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match="has no directory 'experts'"):
        read_mixture(tmp_path / "router")
