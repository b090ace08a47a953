"""Files written tensor by tensor are what the safetensors library reads, hashed right, and the same bytes every time."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.adapter_file import AdapterFile
from seedbed.common.adapter_writer import file_order, new_adapter
from seedbed.common.errors import AdapterFormatError, AdapterMismatchError, NonFiniteError
from seedbed.common.manifest import BaseIdentity
from seedbed.common.storage import read_adapter, write_adapter
from seedbed.common.tensor_file import TensorFile
from seedbed.common.tensor_writer import KINDS, TensorWriter

BASE = BaseIdentity(name="tiny")


def tensors() -> dict[str, Tensor]:
    """Wider dtypes first, an odd number of halves, and a name that JSON must escape."""
    return {
        "wide": torch.arange(6, dtype=torch.float64).reshape(2, 3),
        "single": torch.arange(3, dtype=torch.float32),
        'half "ä"': torch.arange(3, dtype=torch.bfloat16),
        "last": torch.ones(1, 1, dtype=torch.float16),
    }


def write(path: Path, values: dict[str, Tensor], *, expected: dict[str, Tensor] | None = None) -> str:
    layout = None if expected is None else {n: (KINDS[t.dtype], tuple(t.shape)) for n, t in expected.items()}
    with TensorWriter(path, {name: tensor.dim() for name, tensor in values.items()}, layout) as new:
        for name, tensor in values.items():
            new.add(name, tensor)
        return new.finish()


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    digest = write(tmp_path / "file", tensors())
    loaded = load_file(tmp_path / "file")
    assert set(loaded) == set(tensors())
    for name, tensor in tensors().items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert digest == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()


def test_the_bytes_and_the_hash_do_not_depend_on_what_was_expected(tmp_path: Path) -> None:
    wrong = {name: torch.zeros(9, 9) for name in tensors()}
    digests = {
        write(tmp_path / "unknown", tensors()),
        write(tmp_path / "right", tensors(), expected=tensors()),
        write(tmp_path / "wrong", tensors(), expected=wrong),
    }
    assert digests == {hashlib.sha256((tmp_path / "right").read_bytes()).hexdigest()}
    assert (tmp_path / "unknown").read_bytes() == (tmp_path / "right").read_bytes()
    assert (tmp_path / "wrong").read_bytes() == (tmp_path / "right").read_bytes()


def test_a_tensor_out_of_turn_or_left_out_is_noticed(tmp_path: Path) -> None:
    with TensorWriter(tmp_path / "turn", {"a": 1, "b": 1}) as new, pytest.raises(ValueError, match="expected a"):
        new.add("b", torch.ones(1))
    with TensorWriter(tmp_path / "less", {"a": 1, "b": 1}) as new:
        new.add("a", torch.ones(1))
        with pytest.raises(ValueError, match="b is missing"):
            new.finish()


def test_parts_of_rows_make_a_tensor(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).reshape(4, 3)
    with TensorWriter(tmp_path / "file", {"m": 2}) as new:
        new.add_parts("m", "F32", (4, 3), iter(matrix.split(3)))
        new.finish()
    assert torch.equal(load_file(tmp_path / "file")["m"], matrix)
    file = TensorFile(tmp_path / "file")
    assert torch.equal(file.rows("m", 1, 3), matrix[1:3])
    assert torch.equal(torch.cat(list(file.chunks("m", size=10))), matrix.reshape(-1).view(torch.uint8))


def test_a_hash_made_behind_the_reading_is_that_of_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.randn(999), "b": torch.randn(500_000)}, tmp_path / "file")
    file = TensorFile(tmp_path / "file")
    file.hash_behind(file.span("a")[1])
    file.hash_behind(20)  # already done
    file.tensor("b")
    assert file.sha256() == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()


def test_integers_can_be_copied_but_are_no_adapter(tmp_path: Path) -> None:
    save_file({"ids": torch.arange(5)}, tmp_path / "file")
    with pytest.raises(AdapterFormatError, match="I64"):
        TensorFile(tmp_path / "file")
    assert next(iter(TensorFile(tmp_path / "file", any_dtype=True).chunks("ids"))).view(torch.int64).tolist() == [
        *range(5)
    ]


def test_a_file_that_becomes_shorter_is_noticed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "file")
    file = TensorFile(tmp_path / "file")
    with (tmp_path / "file").open("r+b") as handle:
        handle.truncate(200)
    with pytest.raises(AdapterFormatError, match="shorter"):
        file.tensor("a")


def test_an_adapter_written_module_by_module_has_the_bytes_of_one_written_whole(tmp_path: Path) -> None:
    adapter = Adapter(
        {
            "b": LoraFactors(torch.randn(3, 5), torch.randn(4, 3), 0.5),
            "a": LoraFactors(torch.randn(1, 3).bfloat16(), torch.randn(2, 1).bfloat16(), 2.0),
        }
    )
    write_adapter(tmp_path / "whole", adapter, kind="expert", base=BASE)
    order = file_order({name: factors.A.dtype for name, factors in adapter.items()})
    assert order == ["b", "a"]  # wider first, so that every tensor is aligned
    with new_adapter(tmp_path / "parts", order) as new:
        for name in order:
            new.add(name, adapter[name])
        new.finish(kind="expert", base=BASE)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes()
    again, _ = read_adapter(tmp_path / "parts")
    assert torch.equal(again["a"].A, adapter["a"].A)


@pytest.mark.parametrize("factor", [torch.nan, torch.inf, -torch.inf])
def test_a_module_that_is_not_finite_leaves_no_directory(tmp_path: Path, factor: float) -> None:
    def attempt() -> None:
        with new_adapter(tmp_path / "out", ["good", "bad"]) as new:
            new.add("good", LoraFactors(torch.ones(1, 2), torch.ones(2, 1), 1.0))
            new.add("bad", LoraFactors(torch.full((1, 2), factor), torch.ones(2, 1), 1.0))

    with pytest.raises(NonFiniteError, match="lora_A holds 2 values"):
        attempt()
    assert list(tmp_path.iterdir()) == []


def test_a_hash_left_for_later_is_verified_when_the_manifest_is_asked_for(tmp_path: Path) -> None:
    adapter = Adapter({"a": LoraFactors(torch.ones(1, 2), torch.ones(2, 1), 1.0)})
    write_adapter(tmp_path / "one", adapter, kind="expert", base=BASE)
    path = tmp_path / "one" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    file = AdapterFile(tmp_path / "one", verify_later=True)
    assert file.unverified.base == BASE
    file.factors("a")
    with pytest.raises(AdapterMismatchError, match="tensors_sha256"):
        _ = file.manifest
