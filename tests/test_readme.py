"""The README promises nothing that the command line does not have."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from seedbed.common import errors
from seedbed.common.config_file import preset_names
from seedbed.server.cli import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line.partition(" #")[0])
    for block in re.findall(r"^```\w*\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if line.startswith("seedbed ")
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_of_the_readme_has_that_verb_and_those_options(command: list[str]) -> None:
    verb = command[1:3] if command[1] in {group.name for group in app.registered_groups} else command[1:2]
    outcome = CliRunner().invoke(app, [*verb, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert outcome.exit_code == 0, outcome.output
    text = re.sub(r"\x1b\[[0-9;]*m", "", outcome.output)
    for option in (word.partition("=")[0] for word in command if word.startswith("--")):
        assert re.search(rf"{option}\b", text), f"{option} is no option of {verb}"


def test_the_readme_shows_every_verb() -> None:
    verbs = {command.callback.__name__ for command in app.registered_commands if command.callback is not None}
    groups = {str(group.name) for group in app.registered_groups}
    assert {command[1] for command in COMMANDS} == verbs | groups


def test_the_exit_codes_are_those_of_the_errors() -> None:
    (told,) = re.findall(r"Exit codes: (.*?)\.", README, flags=re.DOTALL)
    codes = {int(code) for code in re.findall(r"\b(\d+) ", told)} - {2, 130}
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.SeedbedError)]
    assert codes == {kind.exit_code for kind in kinds} - {errors.SeedbedError.exit_code}


def test_files_and_presets_that_are_named_are_there() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
    for name in preset_names():
        assert f"`{name}`" in README


def test_nothing_is_left_to_fill_in() -> None:
    assert "<!--" not in README
