"""The modules of this folder are plain files beside each other, for `table.py` as for the tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
