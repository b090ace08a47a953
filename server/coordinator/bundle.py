"""The stub of a Flower app: it names our ServerApp and ClientApp, which come from the installed package, and holds no code.

What is installed runs, not what is in the bundle (hello compares versions), so there is nothing here to be kept up to date.
"""

from __future__ import annotations

from pathlib import Path

from seedbed.common.files import atomic_write

_PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "seedbed-federation"
version = "1.0.0"
description = "A Seedbed federation: names the apps of the installed package"
license = "Apache-2.0"
dependencies = ["flwr"]

[tool.flwr.app]
publisher = "seedbed"

[tool.flwr.app.components]
serverapp = "seedbed.server.app:app"
clientapp = "seedbed.client.app:app"

[tool.flwr.app.config]
seedbed-run = ""
seedbed-command = ""
seedbed-submission = ""
"""


def write_bundle(directory: Path) -> Path:
    """Write the stub into ``directory/app``, and return that.

    Raises:
        StorageError: if the file system refuses.
    """
    app = directory / "app"
    atomic_write(app / "pyproject.toml", _PYPROJECT.encode())
    return app
