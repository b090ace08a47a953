"""A few thousand rounds of coverage-guided fuzzing, where atheris is installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

TARGET = Path(__file__).with_name("atheris_tensor_header.py")


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
def test_no_tensor_header_makes_the_reader_fall_over(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (corpus / "good").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    (corpus / "empty").write_bytes(b"\x00{}")
    command = [sys.executable, str(TARGET), "-runs=3000", "-timeout=60", "-rss_limit_mb=4096", "-seed=1", str(corpus)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=500)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "Done 3000 runs" in ended.stderr
