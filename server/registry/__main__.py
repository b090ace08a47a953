"""``python -m seedbed.server.registry``: serve a run directory's adapters until SIGTERM.

Prints ``{"event": "listening", "port": …}`` on standard output when it serves; its log goes to standard error.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import signal
import sys
import threading
from pathlib import Path

from seedbed.common.errors import SeedbedError
from seedbed.common.registry import DEFAULT_PORT
from seedbed.server.listening import listen_at, positive
from seedbed.server.registry.quotas import Limits
from seedbed.server.registry.server import RegistryServer, Settings

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def main(arguments: list[str] | None = None) -> int:
    """Serve; the exit code is 0 after SIGTERM or SIGINT, else the error's."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    _keep_memory_small()
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    try:
        server = RegistryServer(_settings(options))
    except SeedbedError as error:
        print(f"{error.message}\n{error.hint}".strip(), file=sys.stderr)
        return error.exit_code
    server.start()
    found = {"event": "listening", "port": server.port, "health_port": server.health_port}
    print(json.dumps(found), flush=True)
    ended.wait()
    server.stop(options.grace)
    return 0


def _settings(options: argparse.Namespace) -> Settings:
    host, port = options.listen
    return Settings(
        run=options.run.resolve(),
        host=host,
        port=port,
        keys=options.keys,
        insecure=options.insecure,
        limits=Limits(options.max_upload, options.quota_participant, options.quota_total),
        threads=options.threads,
        health_port=options.health_port,
    )


def _parser() -> argparse.ArgumentParser:
    defaults = Limits()
    parser = argparse.ArgumentParser(prog="python -m seedbed.server.registry", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument(
        "--listen",
        type=listen_at,
        default=f"127.0.0.1:{DEFAULT_PORT}",
        metavar="HOST:PORT",
        help="port 0 is any free one",
    )
    trust = parser.add_mutually_exclusive_group()
    trust.add_argument("--keys", type=Path, help="directory made by `seedbed keys`")
    trust.add_argument("--insecure", action="store_true", help="plaintext beyond loopback is meant")
    parser.add_argument("--quota-participant", type=positive, default=defaults.participant, metavar="BYTES")
    parser.add_argument("--quota-total", type=positive, default=defaults.total, metavar="BYTES")
    parser.add_argument("--max-upload", type=positive, default=defaults.upload, metavar="BYTES")
    parser.add_argument("--threads", type=positive, default=64, help="calls that are answered at the same time")
    parser.add_argument("--health-port", type=int, help="also answer health checks there, in plaintext on loopback")
    parser.add_argument("--grace", type=float, default=5.0, help="seconds that calls have at the end")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    return parser


def _keep_memory_small() -> None:
    """Have glibc give chunks back: by itself it keeps a heap for every thread and learns to hold large blocks."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another libc
        return
    for option, value in ((_M_ARENA_MAX, 2), (_M_MMAP_THRESHOLD, 256 << 10), (_M_TRIM_THRESHOLD, 4 << 20)):
        mallopt(option, value)


if __name__ == "__main__":
    sys.exit(main())
