"""Every `seedbed …` command line that deploy/ ships is one that the command line takes."""

from __future__ import annotations

import click
import pytest
import typer.main
from shipped import Command, commands

from seedbed.server.cli import app

COMMANDS = list(commands())


def test_there_are_commands_of_the_coordinator_and_of_clients() -> None:
    assert {"coordinator", "join", "keys"} <= {command.words[0] for command in COMMANDS}
    assert len(COMMANDS) >= 12


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_shipped_command_line_is_understood(command: Command) -> None:
    found: click.Command = typer.main.get_command(app)
    words = list(command.words)
    while isinstance(found, click.Group):
        verb = words.pop(0)
        assert verb in found.commands, f"{command}: no verb {verb}"
        found = found.commands[verb]
    context = click.Context(found)
    try:
        values, rest, _ = found.make_parser(context).parse_args(words)
    except click.UsageError as error:
        pytest.fail(f"{command}: {error.format_message()}")
    assert not rest, f"{command}: {rest} are too many"
    for parameter in found.get_params(context):
        if parameter.required:
            assert parameter.name in values, f"{command}: {parameter.name} is missing"
            assert values[parameter.name] is not None, f"{command}: {parameter.name} is missing"
