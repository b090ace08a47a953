"""The command line: a table of verbs. Heavy imports happen inside a verb, so `--help` answers at once."""

from __future__ import annotations

import os
from collections.abc import Callable

import typer

from seedbed.common.errors import SeedbedError, StorageError
from seedbed.server.cli import adapters, federation, keys, models, studies
from seedbed.server.cli.console import fail

app = typer.Typer(
    name="seedbed",
    help="Collaborative fine-tuning of language models from a shared seed adapter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_ON_ONE_MACHINE: tuple[Callable[..., None], ...] = (
    studies.simulate,
    adapters.merge,
    adapters.inspect,
    studies.evaluate,
    studies.ablate,
    studies.report,
)

_ACROSS_MACHINES: tuple[Callable[..., None], ...] = (
    federation.coordinator,
    federation.join,
    federation.preflight,
    federation.status,
    federation.watch,
    federation.fetch,
    federation.contribute,
    federation.withdraw,
)

for _verb in _ON_ONE_MACHINE:
    app.command(rich_help_panel="On one machine")(_verb)
for _verb in _ACROSS_MACHINES:
    app.command(rich_help_panel="Across machines")(_verb)

keys_app = typer.Typer(help="Certificates of a federation across machines.", no_args_is_help=True)
_KEYS: dict[str, Callable[..., None]] = {
    "init": keys.init,
    "add": keys.add,
    "list": keys.list_,
    "rotate": keys.rotate,
    "revoke": keys.revoke,
}
for _name, _verb in _KEYS.items():
    keys_app.command(_name)(_verb)
app.add_typer(keys_app, name="keys", rich_help_panel="Across machines")

model_app = typer.Typer(help="Base models that Seedbed knows by name.", no_args_is_help=True)
model_app.command()(models.fetch)
app.add_typer(model_app, name="model")


def main() -> None:
    """Run the command line; every refusal is one sentence and a next step, with the exit code of its kind."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its own words about a failed handshake: ours are a sentence
    try:
        app(standalone_mode=True)
    except SeedbedError as error:
        fail(error.message, error.hint, error.exit_code)
    except OSError as error:
        translated = StorageError(
            f"{error.filename or 'a file'}: {error.strerror or error}", "See the path and the space left."
        )
        fail(translated.message, translated.hint, translated.exit_code)
    except KeyboardInterrupt:
        fail("Interrupted.", "", 130)
