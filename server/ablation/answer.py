"""The result of an ablation in plain sentences: which part earned how much, and which is not shown to have earned anything."""

from __future__ import annotations

from collections.abc import Sequence

from seedbed.server.ablation.effects import LOWER_IS_BETTER, MEASURES, Measure, PartEffect
from seedbed.server.ablation.results import AblationResults
from seedbed.server.ablation.values import Cell, Row

_LISTED = 5
"""So many effects that are not clear are told one by one."""


def answer(results: AblationResults) -> str:
    """A paragraph for each measure: its largest clear effect, then the others; of the first also what is not clear.

    A part earned something where the full method is better with it than without it, after Holm's correction.
    """
    told = [measure for measure in MEASURES if _compared(results, measure)]
    if not told:
        return "Nothing could be compared with the full method, so no part of it is known to have earned anything."
    return "\n".join(" ".join(_sentences(results, measure, first=measure == told[0])) for measure in told)


def _compared(results: AblationResults, measure: Measure) -> list[PartEffect]:
    return [effect for effect in results.of_measure(measure) if not effect.same]


def _sentences(results: AblationResults, measure: Measure, *, first: bool) -> list[str]:
    effects = _compared(results, measure)
    clear = sorted((effect for effect in effects if effect.is_clear), key=lambda one: (-gain(one), one.cell))
    gains, losses = [one for one in clear if gain(one) > 0], [one for one in clear if gain(one) < 0]
    sentences = [_opening(results, effects, gains)]
    if gains[1:]:
        sentences.append(
            f"The full method is also better than {_listed([_variant(results, one) for one in gains[1:]])}."
        )
    if losses:
        sentences.append(
            f"The full method is worse than {_listed([_variant(results, one) for one in reversed(losses)])}."
        )
    unclear = [effect for effect in effects if not effect.is_clear and (clear or effect != _nearest(effects))]
    return [*sentences, *_doubts(results, unclear)] if first else sentences


def gain(effect: PartEffect) -> float:
    """How much better the full method is than the cell: positive where the part earned something."""
    return -effect.difference if effect.measure in LOWER_IS_BETTER else effect.difference


def _opening(results: AblationResults, effects: Sequence[PartEffect], gains: Sequence[PartEffect]) -> str:
    subject, count = subject_of(effects), len(effects)
    comparisons = f"{count} comparisons" if count > 1 else "one comparison"
    if not gains and any(effect.is_clear for effect in effects):
        return f"No part is shown to have earned anything in {subject}."
    if all(effect.difference == effect.low == effect.high == 0 for effect in effects):
        return f"In {subject} nothing differs from the full method."
    if not gains:
        nearest = _nearest(effects)
        even = "not even the clearest difference" if count > 1 else "the difference"
        stands = "stands" if count > 1 else "does not stand"
        return (
            f"No part is shown to have earned or cost anything in {subject}: {even}, {_amount(nearest)} "
            f"{variant(results, nearest)}, {stands} after Holm's correction for {comparisons}."
        )
    first = gains[0]
    part = f"The {_part(results, first)} earned {'most' if count > 1 else 'its place'}"
    kept = f", after Holm's correction for {comparisons}" if count > 1 else ""
    return f"{part}: {_without(results, first)}, {subject} is {_amount(first)}{kept}."


def _nearest(effects: Sequence[PartEffect]) -> PartEffect:
    """The one that is least likely to be chance."""
    return min(effects, key=lambda one: (one.p, -abs(one.difference), one.cell))


def _doubts(results: AblationResults, effects: Sequence[PartEffect]) -> list[str]:
    """Effects that do not stand, those with intervals that leave out zero first."""
    alone = sorted((one for one in effects if one.excludes_zero), key=lambda one: (-abs(one.difference), one.cell))
    nothing = sorted(
        (one for one in effects if not one.excludes_zero), key=lambda one: (-abs(one.difference), one.cell)
    )
    sentences = []
    if alone:
        parts = _listed(_some([f"{variant(results, one)} it is {_amount(one)}" for one in alone]))
        sentences.append(f"Clear alone, but not after that correction: {parts}.")
    if nothing:
        parts = _listed(_some([f"{variant(results, one)} ({signed(one.measure, one.difference)}, {interval(one)})"
                               for one in nothing]))  # fmt: skip
        sentences.append(f"May be chance, as the interval includes zero: {parts}.")
    return sentences


def _some(parts: Sequence[str]) -> list[str]:
    more = len(parts) - _LISTED
    return [*parts[:_LISTED], f"{more} more"] if more > 0 else list(parts)


def subject_of(effects: Sequence[PartEffect]) -> str:
    """What is measured, such as `mean accuracy on 4 held-out tasks`."""
    most = max(len(effect.tasks) for effect in effects)
    tasks = f"{most} {{}} task{'s' if most > 1 else ''}"
    mean = "mean accuracy" if most > 1 else "accuracy"
    return {
        "held_out": f"{mean} on {tasks.format('held-out')}",
        "held_in": f"{mean} on {tasks.format('held-in')}",
        "retention": f"retention of {tasks.format('held-in')}",
        "kl": "divergence from the base model on general text",
        "perplexity": "perplexity on general text",
    }[effects[0].measure]


def _part(results: AblationResults, effect: PartEffect) -> str:
    return readable(effect.row) if row_of(results, results.cells[effect.cell].cell) else effect.cell


def _amount(effect: PartEffect) -> str:
    """How the cell differs from the full method, such as `6.1 points lower (95 % interval 3.2 to 9.0)`."""
    side = "lower" if effect.difference > 0 else "higher"
    low, high = (effect.low, effect.high) if effect.difference > 0 else (-effect.high, -effect.low)
    size = plain(effect.measure, abs(effect.difference))
    if float(size) == 0:
        side = "apart"
    doubt = "" if effect.excludes_zero else ", which includes zero"
    told = f"95 % interval {plain(effect.measure, low)} to {plain(effect.measure, high)}{doubt}"
    return f"{size}{unit(effect.measure)} {side} ({told})"


def _variant(results: AblationResults, effect: PartEffect) -> str:
    """Such as `without the seed (by 6.1 points, 95 % interval 3.2 to 9.0)`: the distance from the full method."""
    low, high = sorted((effect.low, effect.high), key=abs)
    told = f"95 % interval {plain(effect.measure, abs(low))} to {plain(effect.measure, abs(high))}"
    size = f"{plain(effect.measure, abs(effect.difference))}{unit(effect.measure)}"
    return f"{variant(results, effect)} (by {size}, {told})"


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


def _without(results: AblationResults, effect: PartEffect) -> str:
    """The same, of a part that was named just before: `without it`, `with uniform in its place`."""
    cell = results.cells[effect.cell].cell
    row = row_of(results, cell)
    if row is not None and row.action == "remove" and is_alone(results, cell):
        return "without it"
    return f"with {cell.value or cell.name} in its place"


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
    scaled = value if measure in LOWER_IS_BETTER else 100 * value
    digits = {"kl": 4 if abs(value) >= 0.001 else 6, "perplexity": 3}.get(measure, 1)
    rounded = round(scaled, digits) + 0.0
    return f"{rounded:.{digits}f}".replace("-", "−") if rounded else f"{0:.{min(digits, 4)}f}"


def signed(measure: Measure, value: float) -> str:
    text = plain(measure, value)
    return text if text.startswith("−") or float(text) == 0 else f"+{text}"


def interval(effect: PartEffect) -> str:
    return f"{signed(effect.measure, effect.low)} to {signed(effect.measure, effect.high)}"
