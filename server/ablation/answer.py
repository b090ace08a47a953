"""The result of an ablation in plain sentences: which part earned how much, and which is not shown to have earned anything."""

from __future__ import annotations

from collections.abc import Sequence

from seedbed.server.ablation.effects import LOWER_IS_BETTER, MEASURES, Measure, PartEffect
from seedbed.server.ablation.results import AblationResults
from seedbed.server.ablation.values import Cell, Row

_LISTED = 6
"""So many unclear differences are told one by one."""


def answer(results: AblationResults) -> str:
    """What the first measure says, its largest clear effect first; then the other measures, a sentence or two each."""
    told = [measure for measure in MEASURES if _compared(results, measure)]
    if not told:
        return "Nothing could be compared with the full method, so no part of it is known to have earned anything."
    return " ".join(sentence for measure in told for sentence in _sentences(results, measure))


def _compared(results: AblationResults, measure: Measure) -> list[PartEffect]:
    return [effect for effect in results.of_measure(measure) if not effect.same]


def _sentences(results: AblationResults, measure: Measure) -> list[str]:
    effects = _compared(results, measure)
    clear = sorted((effect for effect in effects if effect.is_clear), key=lambda one: (-gain(one), one.cell))
    gains, losses = [one for one in clear if gain(one) > 0], [one for one in clear if gain(one) < 0]
    unclear = [effect for effect in effects if not effect.is_clear]
    sentences = [_opening(results, measure, gains, effects)]
    if gains[1:]:
        sentences.append(f"It is also worse {_listed([_clause(results, one) for one in gains[1:]])}.")
    if losses:
        sentences.append(f"It is better {_listed([_clause(results, one) for one in reversed(losses)])}.")
    if unclear and clear:
        sentences.append(f"No effect is shown {_unclear(results, unclear)}.")
    return sentences


def gain(effect: PartEffect) -> float:
    """How much better the full method is than the cell: positive where the part earned something."""
    return -effect.difference if effect.measure in LOWER_IS_BETTER else effect.difference


def _opening(
    results: AblationResults, measure: Measure, gains: Sequence[PartEffect], effects: Sequence[PartEffect]
) -> str:
    subject, count = subject_of(measure, effects), len(effects)
    comparisons = f"{count} comparison{'s' if count > 1 else ''}"
    if gains:
        first = gains[0]
        most = "earned most" if count > 1 else "earned its place"
        return (
            f"{_capital(_part(results, first))} {most} on {subject}: {_clause(results, first)}, which stands after "
            f"Holm's correction for {comparisons}."
        )
    shown = any(effect.is_clear for effect in effects)
    if shown:
        return f"On {subject} no part is shown to have earned anything."
    largest = max(effects, key=lambda one: (abs(one.difference), one.cell))
    return (
        f"On {subject} no part is shown to have earned or cost anything: none of {comparisons} stands after Holm's "
        f"correction; the largest is {_clause(results, largest)}."
    )


def subject_of(measure: Measure, effects: Sequence[PartEffect]) -> str:
    """What is measured, such as `mean accuracy over 4 held-out tasks`."""
    most = max(len(effect.tasks) for effect in effects)
    tasks = f"{most} {{}} task{'s' if most > 1 else ''}"
    return {
        "held_out": f"mean accuracy over {tasks.format('held-out')}",
        "held_in": f"mean accuracy over {tasks.format('held-in')}",
        "retention": f"retention of {tasks.format('held-in')}",
        "kl": "divergence from the base model on general text",
        "perplexity": "perplexity on general text",
    }[measure]


def _part(results: AblationResults, effect: PartEffect) -> str:
    return f"the {readable(effect.row)}" if row_of(results, results.cells[effect.cell].cell) else effect.cell


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _clause(results: AblationResults, effect: PartEffect) -> str:
    """Such as `without the seed, 6.1 points lower (95 % interval 3.2 to 9.0)`: said of the cell."""
    side = "lower" if effect.difference > 0 else "higher"
    low, high = (effect.low, effect.high) if effect.difference > 0 else (-effect.high, -effect.low)
    interval = f"95 % interval {plain(effect.measure, low)} to {plain(effect.measure, high)}"
    doubt = "" if effect.excludes_zero else ", which includes zero"
    size = plain(effect.measure, abs(effect.difference))
    if float(size) == 0:
        return f"{variant(results, effect)} level ({interval}{doubt})"
    return f"{variant(results, effect)} {size}{unit(effect.measure)} {side} ({interval}{doubt})"


def _unclear(results: AblationResults, effects: Sequence[PartEffect]) -> str:
    parts = [f"{variant(results, one)} ({signed(one.measure, one.difference)}, {interval(one)})" for one in effects]
    shown = parts[:_LISTED]
    if len(parts) > len(shown):
        shown.append(f"in {len(parts) - _LISTED} more")
    return _listed(shown)


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{'; '.join(parts[:-1])}; and {parts[-1]}"


def row_of(results: AblationResults, cell: Cell) -> Row | None:
    return next((row for row in results.plan.rows if row.label == cell.row), None)


def variant(results: AblationResults, effect: PartEffect) -> str:
    """The cell as a phrase: `without the seed`, `with uniform for the routing`."""
    cell = results.cells[effect.cell].cell
    row = row_of(results, cell)
    if row is None:
        return f"in {cell.name}"
    if row.action == "remove" and is_alone(results, cell):
        return f"without the {readable(row.label)}"
    return f"with {cell.value or cell.name} for the {readable(row.label)}"


def is_alone(results: AblationResults, cell: Cell) -> bool:
    """Whether its row has no other cell."""
    return sum(other.cell.row == cell.row for other in results.cells.values()) == 1


def label(results: AblationResults, cell: Cell) -> str:
    """What people call a cell, in tables and plots."""
    row = row_of(results, cell)
    if row is None:
        return "full method" if not cell.row else cell.name
    if row.action == "remove" and is_alone(results, cell):
        return f"{readable(row.label)} removed"
    return f"{readable(row.label)}: {cell.value or cell.name}"


def readable(name: str) -> str:
    """A part's name as words."""
    return name.replace("_", " ")


def unit(measure: Measure) -> str:
    return {"kl": " nats a token", "perplexity": ""}.get(measure, " points")


def plain(measure: Measure, value: float) -> str:
    """A difference without unit; accuracies and retention in percentage points. Never `−0.0`."""
    digits = {"kl": 4, "perplexity": 3}.get(measure, 1)
    scaled = value if measure in LOWER_IS_BETTER else 100 * value
    rounded = round(scaled, digits) + 0.0
    return f"{rounded:.{digits}f}".replace("-", "−") if rounded else f"{0:.{digits}f}"


def signed(measure: Measure, value: float) -> str:
    text = plain(measure, value)
    return text if text.startswith("−") or float(text) == 0 else f"+{text}"


def interval(effect: PartEffect) -> str:
    return f"{signed(effect.measure, effect.low)} to {signed(effect.measure, effect.high)}"
