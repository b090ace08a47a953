"""Taking part without Flower, against a real registry: fetch the seed, train with PEFT, hand the expert in, take it back."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from seedbed.client.exchange import contribute, fetch, withdraw
from seedbed.client.registry import RegistryClient
from seedbed.common import basemodel
from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.config import BaseModelConfig, LoraSettings
from seedbed.common.errors import (
    AdapterError,
    AdapterFormatError,
    AdapterMismatchError,
    ConfigError,
    EnvironmentFailure,
    NonFiniteError,
    StorageError,
)
from seedbed.common.registry import RegistryAccess
from seedbed.common.storage import DirectoryStore, read_adapter, read_manifest, write_adapter
from seedbed.common.targets import target_shapes
from seedbed.server.ledger import Entry, Ledger

BASE = BaseModelConfig(model="embedded")
DIRECTORY = basemodel.resolve(BASE)
IDENTITY = basemodel.identify(DIRECTORY, "embedded")
RANK = 4


class Coordinator:
    """A run directory that has a seed, its registry as a process, and what the gateway says of it."""

    def __init__(self, root: Path) -> None:
        self.run = root / "run"
        self.run.mkdir()
        seed = seed_adapter()
        self.seed = write_adapter(root / "made", seed, kind="seed", base=IDENTITY).digest
        DirectoryStore(self.run / "store").put(root / "made")
        config = {
            "name": "valley",
            "base": {"model": "embedded"},
            "tasks": {"experts": ["addition", "antonym"], "held_out": ["oldest"]},
            "lora": {"rank": RANK, "alpha": 8},
            "seed": {"mode": "given", "adapter": str(root / "made")},
        }
        (self.run / "config.yaml").write_text(yaml.safe_dump(config))
        Ledger(self.run / "ledger.jsonl").append(Entry(event="combined", name="seed", digest=self.seed))
        command = [sys.executable, "-m", "seedbed.server.registry", "--run", str(self.run), "--listen", "127.0.0.1:0"]
        self.child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.child.stdout is not None
        self.access = RegistryAccess(address=f"127.0.0.1:{json.loads(self.child.stdout.readline())['port']}")
        with RegistryClient(self.access) as client:
            said = client.info().model_dump_json().encode()

        class Gateway(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200 if self.path == "/seedbed.json" else 404)
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, *_: Any) -> None: ...

        self.gateway = ThreadingHTTPServer(("127.0.0.1", 0), Gateway)
        threading.Thread(target=self.gateway.serve_forever, daemon=True).start()
        self.host = f"127.0.0.1:{self.gateway.server_port}"

    def close(self) -> None:
        self.gateway.shutdown()
        self.gateway.server_close()
        self.child.kill()
        self.child.wait()

    def contributions(self) -> list[dict[str, Any]]:
        path = self.run / "contributions.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def seed_adapter() -> Adapter:
    generator = torch.Generator().manual_seed(1)
    shapes = target_shapes(DIRECTORY, LoraSettings(rank=RANK, alpha=8))
    return Adapter(
        {
            name: LoraFactors(torch.randn(RANK, columns, generator=generator) / 16, torch.zeros(rows, RANK), 2.0)
            for name, (rows, columns) in shapes.items()
        }
    )


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    opened = Coordinator(tmp_path_factory.mktemp("coordinator"))
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEEDBED_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=80)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def train(start: Path, out: Path, steps: int = 2) -> dict[str, torch.Tensor]:
    """Train with PEFT as anybody would, and return the trained tensors by PEFT's names."""
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(DIRECTORY), start, is_trainable=True)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    tokens = torch.arange(12).reshape(2, 6)
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    return {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}


def test_the_seed_is_fetched_trained_with_peft_handed_in_and_found_again_with_the_same_numbers(
    coordinator: Coordinator, tmp_path: Path, console: Console
) -> None:
    seed = fetch("seed", coordinator.host, None, tmp_path / "seed", console)
    assert read_manifest(seed).digest == coordinator.seed
    assert "rank 4" in said(console)
    assert "base model embedded" in said(console)
    assert f'PeftModel.from_pretrained(model, "{seed}", is_trainable=True)' in said(console)

    trained = train(seed, tmp_path / "mine")
    mine = contribute(tmp_path / "mine", "addition", coordinator.host, None, "mine", console, from_seed=True)
    assert (mine.task, mine.name) == ("addition", "mine")
    assert f"seedbed withdraw {mine.digest[:12]} --host {coordinator.host}" in said(console)

    again = fetch(mine.digest[:10], coordinator.host, None, tmp_path / "again", console)
    adapter, manifest = read_adapter(again)
    assert (manifest.kind, manifest.base, manifest.parents) == ("external", IDENTITY, (coordinator.seed,))
    assert manifest.task == "addition"
    assert len(trained) == 2 * len(adapter)
    for name, factors in adapter.items():
        assert torch.equal(factors.A, trained[f"base_model.model.{name}.lora_A.weight"])
        assert torch.equal(factors.B, trained[f"base_model.model.{name}.lora_B.weight"])
        assert factors.scaling == 2.0
    assert any(factors.B.abs().sum() > 0 for factors in adapter.values())

    # Handing the same in again changes nothing; taking it back is said once more.
    assert contribute(tmp_path / "mine", "addition", coordinator.host, None, "mine", console, from_seed=True) == mine
    gone = withdraw(mine.digest[:8], coordinator.host, None, console)
    assert gone.withdrawn
    assert [line.get("withdrawn", False) for line in coordinator.contributions()][-2:] == [False, True]


def test_a_training_that_wrote_over_what_was_fetched_still_knows_its_parent(
    coordinator: Coordinator, tmp_path: Path, console: Console
) -> None:
    seed = fetch("seed", coordinator.host, None, tmp_path / "here", console)
    train(seed, seed, steps=1)
    mine = contribute(seed, "antonym", coordinator.host, None, "", console)
    again = fetch(mine.digest, coordinator.host, None, tmp_path / "again", console)
    assert read_manifest(again).parents == (coordinator.seed,)
    assert f"trained from {coordinator.seed[:12]}" in said(console)


def test_fetching_takes_the_place_of_nothing(coordinator: Coordinator, tmp_path: Path, console: Console) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(StorageError, match="already there"):
        fetch("seed", coordinator.host, None, tmp_path / "there", console)
    with pytest.raises(StorageError, match="no 'best' yet"):
        fetch("best", coordinator.host, None, tmp_path / "best", console)
    with pytest.raises(StorageError):
        fetch("abcdef" * 2, coordinator.host, None, tmp_path / "unknown", console)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_the_name_of_what_is_fetched_says_where_it_is_from(
    coordinator: Coordinator, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fetch("seed", coordinator.host, None, None, console) == Path("valley-seed")
    assert fetch(coordinator.seed, coordinator.host, None, None, console) == Path(f"valley-{coordinator.seed[:12]}")


def write(directory: Path, adapter: Adapter, name: str = "embedded") -> Path:
    """As a trainer that knows nothing of Seedbed."""
    write_adapter(directory, adapter, kind="external", base=IDENTITY, base_model_name_or_path=name)
    (directory / "seedbed.json").unlink()
    return directory


@pytest.mark.parametrize("kind", ["nan", "missing", "shape", "base", "pickle", "none"])
def test_what_does_not_fit_is_refused_here_in_one_sentence_before_anything_is_sent(
    coordinator: Coordinator, tmp_path: Path, console: Console, kind: str
) -> None:
    modules = dict(seed_adapter().items())
    first = next(iter(modules))
    factors = modules[first]
    expected: type[AdapterError] = AdapterMismatchError
    named, words = "embedded", first
    if kind == "nan":
        modules[first] = LoraFactors(factors.A * float("nan"), factors.B, 2.0)
        expected = NonFiniteError
    elif kind == "missing":
        del modules[first]
    elif kind == "shape":
        modules[first] = LoraFactors(factors.A[:, :-1].clone(), factors.B, 2.0)
    elif kind == "base":
        named, words = "mistral", "mistral"
    directory = tmp_path / "mine"
    if kind != "nan":
        write(directory, Adapter(modules), named)
    else:
        from safetensors.torch import load_file, save_file

        write(directory, seed_adapter())
        tensors = load_file(directory / "adapter_model.safetensors")
        tensors = {key: value * float("nan") if first in key else value for key, value in tensors.items()}
        save_file(tensors, directory / "adapter_model.safetensors")
    if kind == "pickle":
        (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
        expected, words = AdapterFormatError, "pickle"
    if kind == "none":
        shutil.rmtree(directory)
        expected, words = AdapterFormatError, "does not exist"
    before = coordinator.contributions()
    with pytest.raises(expected) as refused:
        contribute(directory, "addition", coordinator.host, None, "", console)
    assert words in refused.value.message
    assert "/seedbed-" not in refused.value.message, "names what the user knows, not a temporary copy"
    assert "\n" not in refused.value.message
    assert coordinator.contributions() == before


def test_a_base_model_in_another_folder_is_known_by_its_hash(
    coordinator: Coordinator, tmp_path: Path, console: Console
) -> None:
    shutil.copytree(DIRECTORY, tmp_path / "my-model")
    directory = write(tmp_path / "mine", seed_adapter(), str(tmp_path / "my-model"))
    mine = contribute(directory, "addition", coordinator.host, None, "renamed", console)
    assert mine.name == "renamed"
    assert "without a recorded parent" in said(console)


def test_no_expert_is_taken_for_a_task_that_is_held_out(
    coordinator: Coordinator, tmp_path: Path, console: Console
) -> None:
    with pytest.raises(ConfigError, match="held out"):
        contribute(tmp_path / "mine", "oldest", coordinator.host, None, "", console)


def test_another_machine_is_not_spoken_to_without_keys(tmp_path: Path, console: Console) -> None:
    with pytest.raises(ConfigError) as refused:
        fetch("seed", "192.0.2.1:7400", None, tmp_path / "seed", console)
    assert "--keys" in refused.value.hint


def test_a_coordinator_that_is_away_is_one_sentence(tmp_path: Path, console: Console) -> None:
    with pytest.raises(EnvironmentFailure):
        fetch("seed", "127.0.0.1:9", None, tmp_path / "seed", console)
