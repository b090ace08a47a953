"""Checks as values: what was looked at, how it stands, what was found, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from seedbed.common.errors import EnvironmentFailure, SeedbedError

CheckState = Literal["ok", "warn", "fail"]
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: CheckState
    found: str
    remedy: str = ""
    """What to do; empty where nothing needs to be done."""


def failed(name: str, error: SeedbedError) -> Check:
    """The check that an error of ours makes."""
    return Check(name, "fail", error.message, error.hint)


@dataclass(frozen=True, slots=True)
class Report:
    """All checks, in the order in which they were made."""

    checks: tuple[Check, ...]

    @property
    def state(self) -> CheckState:
        """That of the worst check."""
        states = {check.state for check in self.checks}
        return "fail" if "fail" in states else "warn" if "warn" in states else "ok"

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.state == "fail")

    @property
    def warnings(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.state == "warn")

    def table(self) -> Table:
        """For a person."""
        table = Table("check", "", "found", "what to do")
        for check in self.checks:
            state = Text(check.state, style=_COLOURS[check.state])
            table.add_row(Text(check.name), state, Text(check.found), Text(check.remedy))
        return table

    def as_json(self) -> dict[str, Any]:
        """For a program."""
        return {"format": 1, "state": self.state, "checks": [asdict(check) for check in self.checks]}

    def require(self) -> None:
        """Go no further where a check has failed.

        Raises:
            EnvironmentFailure: naming the first failure with its remedy, and how many more there are.
        """
        if self.failures:
            first, *others = self.failures
            more = f" (and {len(others)} more)" if others else ""
            raise EnvironmentFailure(f"preflight: {first.name}: {first.found}{more}", first.remedy)
