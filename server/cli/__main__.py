"""`python -m seedbed.server.cli` is `seedbed`."""

from seedbed.server.cli import main

main()
