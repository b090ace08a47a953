"""Peak resident memory of a piece of work, for benchmarks."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import psutil


class PeakMemory:
    """Peak resident bytes (`peak`) and those above the bytes before (`extra`).

    By the kernel's high-water mark where it can be reset (Linux), else sampled every half millisecond.
    """

    extra = peak = 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self._process = psutil.Process()
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._exact = True
        except OSError:
            self._exact = False
        self._before = self.peak = self._process.memory_info().rss
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        if not self._exact:
            self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._exact:
            status = Path("/proc/self/status").read_text()
            line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
            self.peak = int(line.split()[1]) * 1024
        else:
            self._sampler.join()
        self.extra = max(0, self.peak - self._before)

    def _sample(self) -> None:
        while not self._done.wait(0.0005):
            self.peak = max(self.peak, self._process.memory_info().rss)
