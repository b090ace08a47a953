"""Coverage-guided fuzzing of the safetensors header path: ``python tests/fuzz/atheris_tensor_header.py [-runs=N] [CORPUS]``.

Atheris (libFuzzer) mutates whole files; anything but a refusal of ours, a hang or a memory limit ends it with an error.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["seedbed.common.tensor_file", "seedbed.common.adapter_file", "json"]):
    from seedbed.common.errors import SeedbedError
    from seedbed.common.tensor_file import TensorFile

_FILE = os.memfd_create("x.safetensors")  # libFuzzer ends the process itself: a file in a directory would stay
_PLACE = Path(f"/proc/self/fd/{_FILE}")


def one_input(data: bytes) -> None:
    """A file whose header length is right half of the time: else nothing behind the first check is ever reached."""
    if data[:1] == b"\x00":
        data = len(data[1:]).to_bytes(8, "little") + data[1:]
    _PLACE.write_bytes(data)
    try:
        file = TensorFile(_PLACE)
        for name in file.names:
            file.tensor(name)
    except SeedbedError:
        pass


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
