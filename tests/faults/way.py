"""What stands between participants and their coordinator: a relay of bytes that can be slow, or flip some of them.

It listens on a loopback address of its own and passes every connection on to the same port of 127.0.0.1. TLS runs through
it from end to end: it sees nothing and can only do what a bad network does.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

_CHUNK = 16 << 10


@dataclass
class Weather:
    """How a way behaves now."""

    rate: float | None = None
    """Bytes in a second, in each direction of each connection; none is as fast as can be."""
    delay: float = 0.0
    """Seconds that every chunk is late."""
    flips: int = 0
    """So many of the chunks that come back from the coordinator get one bit changed."""
    flipped: int = 0


class Way:
    """Relays from one loopback address, one `Weather` for each port.

    Args:
        address: such as 127.0.0.2.
        ports: of 127.0.0.1, and the same here.
    """

    def __init__(self, address: str, ports: tuple[int, ...]) -> None:
        self.weather = {port: Weather() for port in ports}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._servers = [self._run(asyncio.start_server(self._handler(port), address, port)) for port in ports]

    def close(self) -> None:
        """Break all connections, and listen no more."""

        async def stop() -> None:
            for server in self._servers:
                server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self._run(stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def _handler(self, port: int) -> Any:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.closing(writer):
                try:
                    back, there = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    return
                with contextlib.closing(there):
                    weather = self.weather[port]
                    ways = (_pass(reader, there, weather, False), _pass(back, writer, weather, True))
                    tasks = [asyncio.ensure_future(way) for way in ways]
                    with contextlib.suppress(asyncio.CancelledError):
                        # Either end that is gone ends both: nobody here half-closes.
                        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)

        return handle


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, weather: Weather, back: bool) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(_CHUNK):
            if weather.delay or weather.rate:
                began, pause = time.monotonic(), weather.delay + len(data) / (weather.rate or float("inf"))
                while time.monotonic() - began < pause and (weather.delay or weather.rate):  # or the weather clears up
                    await asyncio.sleep(0.05)
            if back and weather.flips > 0 and len(data) > 40:  # not a mere greeting
                weather.flips, weather.flipped = weather.flips - 1, weather.flipped + 1
                data = data[:30] + bytes([data[30] ^ 1]) + data[31:]
            writer.write(data)
            await writer.drain()
