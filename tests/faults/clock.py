"""Wall clocks that go wrong: a small library (`clock.c`, made with the machine's C compiler) is preloaded into every process.

It shifts what the processes of one kind read as the time of day, also inside OpenSSL and Flower; nobody else's.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

PLACES = {"client": 0, "training": 1, "coordinator": 2, "superlink": 3, "registry": 4}
"""Of the numbers in the file; the sixth is of whoever is never shifted."""


def reason_not_to() -> str:
    """Why clocks cannot be shifted here; empty where they can."""
    return "" if shutil.which("cc") or shutil.which("gcc") else "no C compiler"


class Clocks:
    """The clocks of one world.

    Args:
        directory: for the library and the file of offsets.
    """

    def __init__(self, directory: Path) -> None:
        self._file, self._library = directory / "clocks", directory / "clock.so"
        self._file.write_bytes(bytes(4096))
        compiler = shutil.which("cc") or shutil.which("gcc") or "cc"
        source = str(Path(__file__).with_name("clock.c"))
        command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(self._library), source, "-ldl"]
        subprocess.run(command, check=True, capture_output=True)

    def environment(self, kind: str) -> Mapping[str, str]:
        """Of the processes of a kind; `bystander` is a participant whose clock is right."""
        place = str(PLACES.get(kind, 5))
        return {"LD_PRELOAD": str(self._library), "SEEDBED_CLOCKS": str(self._file), "SEEDBED_CLOCK": place}

    def shift(self, kind: str, seconds: int) -> None:
        """Move the clocks of a kind of process; 0 puts them right."""
        with self._file.open("r+b") as file:
            file.seek(8 * PLACES[kind])
            file.write(struct.pack("<q", seconds))
