"""``python -m seedbed.server.gateway``: let SuperNodes reach a SuperLink on loopback, and nothing else of it.

Prints ``{"event": "listening", "port": …}`` on standard output when it serves; its log goes to standard error.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from seedbed.common.errors import SeedbedError
from seedbed.server.gateway.relay import BODY_LIMIT
from seedbed.server.gateway.serve import DEFAULT_PORT, Settings, serve
from seedbed.server.listening import listen_at, positive


def main(arguments: list[str] | None = None) -> int:
    """Serve; the exit code is 0 after SIGTERM or SIGINT, else the error's."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    host, port = options.listen
    try:
        serve(
            Settings(
                run=options.run.resolve(),
                host=host,
                port=port,
                upstream=options.upstream,
                registry_port=options.registry_port,
                advertised_registry=options.advertise_registry,
                keys=options.keys,
                insecure=options.insecure,
                body_limit=options.max_body,
                connections=options.connections,
            )
        )
    except SeedbedError as error:
        print(f"{error.message}\n{error.hint}".strip(), file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m seedbed.server.gateway", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument(
        "--listen",
        type=listen_at,
        default=f"127.0.0.1:{DEFAULT_PORT}",
        metavar="HOST:PORT",
        help="port 0 is any free one",
    )
    parser.add_argument(
        "--upstream", required=True, metavar="URL", help="the SuperLink, such as https://127.0.0.1:8000"
    )
    parser.add_argument("--registry-port", type=int, required=True, help="where the registry listens on this machine")
    parser.add_argument(
        "--advertise-registry",
        type=int,
        default=0,
        metavar="PORT",
        help="what participants are told instead",
    )
    trust = parser.add_mutually_exclusive_group()
    trust.add_argument("--keys", type=Path, help="directory made by `seedbed keys`")
    trust.add_argument("--insecure", action="store_true", help="plaintext beyond loopback is meant")
    parser.add_argument(
        "--max-body", type=positive, default=BODY_LIMIT, metavar="BYTES", help="of one call of a SuperNode"
    )
    parser.add_argument("--connections", type=positive, default=1000, help="at the same time; more are answered 503")
    return parser


if __name__ == "__main__":
    sys.exit(main())
