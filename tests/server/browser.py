"""A headless Chromium, driven over the DevTools protocol through a pipe with the standard library alone.

with Browser(executable()) as browser:
    seen = browser.look(path, width=390)
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell")
_PATIENCE = 120.0


def executable() -> str | None:
    """A browser of this machine: `SEEDBED_BROWSER`, the first of `NAMES` that is installed, or one that Playwright fetched."""
    named = [os.environ.get("SEEDBED_BROWSER"), *map(shutil.which, NAMES)]
    caches = sorted((Path.home() / ".cache" / "ms-playwright").glob("chrom*/chrome-*/*"), reverse=True)
    fetched = [str(path) for path in caches if path.name in ("chrome", "headless_shell", "chrome-headless-shell")]
    return next((found for found in (*named, *fetched) if found), None)


@dataclass(slots=True)
class Sight:
    """What a page was like when it had been loaded."""

    errors: list[str] = field(default_factory=list)
    """From the console, from scripts, and of requests that failed."""
    requests: list[str] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    """Of every plot: id of its title, width and height in pixels, and the number of its marks that are drawn."""
    overflow: int = 0
    """Pixels by which the page is wider than the window."""
    small: list[str] = field(default_factory=list)
    """Texts of plots that measure less than 6 pixels in height."""
    image: bytes = b""


_MEASURE = """
(() => {
  const plots = [...document.querySelectorAll('svg.plot')].map(svg => {
    const box = svg.getBoundingClientRect();
    const marks = [...svg.querySelectorAll('path, use, text')].filter(one => {
      const size = one.getBoundingClientRect(); return size.width > 0 || size.height > 0; });
    return {title: svg.getAttribute('aria-labelledby'), width: box.width, height: box.height, marks: marks.length};
  });
  const texts = [...document.querySelectorAll('svg.plot text')];
  const small = texts.filter(one => one.getBoundingClientRect().height < 6).map(one => one.textContent);
  const root = document.documentElement;
  return {plots, small, overflow: Math.max(root.scrollWidth, document.body.scrollWidth) - root.clientWidth};
})()
"""


# The protocol is spoken on the descriptors 3 and 4, which may be in use for something else: ours go out of the way first.
_LAUNCH = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for end, place in zip(ends, (3, 4)):
    os.dup2(end, place)
os.execvp(sys.argv[3], sys.argv[3:])
"""


class Browser:
    def __init__(self, program: str) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        self._read, theirs_out = os.pipe()
        theirs_in, self._write = os.pipe()
        # A browser that is root's refuses its sandbox.
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        command = [
            *(program, "--headless=new", "--remote-debugging-pipe", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", "--hide-scrollbars", "--disable-background-networking", "--disable-extensions"),
            *(f"--user-data-dir={self._profile.name}", *sandbox, "about:blank"),
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, str(theirs_in), str(theirs_out), *command],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer = b""
        self._events: list[dict[str, Any]] = []
        self._next = 0
        self._session: str | None = None
        try:
            self._attach()
        except BaseException:
            self.close()
            raise

    def _attach(self) -> None:
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._write)
        os.close(self._read)
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._profile.cleanup()

    def look(self, page: Path, width: int, *, dark: bool = False) -> Sight:
        """Load a file in a window of so many pixels, and tell what there is."""
        self._events.clear()
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", {"features": [scheme]})
        phone = width < 600
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": phone}
        self._call("Emulation.setDeviceMetricsOverride", size)
        self._call("Page.navigate", {"url": page.resolve().as_uri()})
        self._wait("Page.loadEventFired")
        found = self._call("Runtime.evaluate", {"expression": _MEASURE, "returnByValue": True})["result"]["value"]
        image = self._call("Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png"})["data"]
        sight = Sight(figures=found["plots"], small=found["small"], overflow=found["overflow"])
        sight.image = base64.b64decode(image)
        for event in self._events:
            self._note(sight, event["method"], event["params"])
        return sight

    def _note(self, sight: Sight, method: str, values: dict[str, Any]) -> None:
        if method == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            sight.errors.append(values["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            sight.errors.append(values["exceptionDetails"]["text"])
        elif method == "Runtime.consoleAPICalled":
            sight.errors.append(f"console.{values['type']}")
        elif method == "Network.loadingFailed":
            sight.errors.append(f"request failed: {values['errorText']}")
        elif method == "Network.requestWillBeSent":
            sight.requests.append(values["request"]["url"])

    def _call(self, method: str, values: dict[str, Any] | None = None) -> dict[str, Any]:
        self._next += 1
        number = self._next
        message: dict[str, Any] = {"id": number, "method": method, "params": values or {}}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _wait(self, method: str) -> None:
        while not any(event["method"] == method for event in self._events):
            self._receive()

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + _PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(self._read, 1 << 20) if ready else b""
            if not chunk:
                raise RuntimeError("the browser does not answer")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self._events.append(message)
        return message
