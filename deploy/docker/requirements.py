"""Print the dependencies that pyproject.toml names, so that they make a layer of their own that code does not spoil."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["project"]
extras = (project["optional-dependencies"][name] for name in sys.argv[2:])
print("\n".join([*project["dependencies"], *(one for extra in extras for one in extra)]))
