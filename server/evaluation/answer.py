"""The result of a run in plain sentences, honest where an interval includes zero."""

from __future__ import annotations

from seedbed.server.evaluation.results import Effect, Results, Scope

_COMPARED = ("base", "seed", "unseeded", "joint")
"""What the best candidate is compared with, in this order."""
_CLAUSE = {
    "base": "the base model",
    "seed": "the seed alone",
    "unseeded": "the average of unseeded experts",
    "joint": "joint training on all data",
    "average": "the seeded average",
    "experts:own": "each task's own expert",
    "experts:mean": "a single expert on average",
}
_SCOPES: dict[Scope, str] = {"held_out": "held-out", "held_in": "held-in", "all": ""}


def answer(results: Results) -> str:
    """Which candidate is best on held-out (zero-shot) tasks, by how much, and how sure that is.

    Without held-out tasks it speaks of the held-in ones.
    """
    from seedbed.server.evaluation.compare import best

    scope: Scope = "held_out" if any(not held_in for held_in in results.tasks.values()) else "held_in"
    name = best(results.candidates, scope)
    if name is None:
        return "No candidate was measured on every task, so there is no best one."
    label, mean = results.candidates[name].label, getattr(results.candidates[name].mean, scope)
    kind = "best combined model" if results.candidates[name].kind == "merge" else "best model"
    base, others = _compared(results, name, scope)
    average = " on average" if mean.tasks > 1 else ""
    opening = f"{_where(scope, mean.tasks)} the {kind} is the {label}: {percent(mean.value)} accuracy{average}"
    sentences = [f"{opening}, {clause(base)}." if base is not None else f"{opening}."]
    if others:
        sentences.append(f"It is {_listed([clause(effect) for effect in others])}.")
    seeding = results.effect("average", "unseeded", scope)
    if name != "average" and seeding is not None:  # the question of the method itself
        sentences.append(f"The seeded average is {clause(seeding)}.")
        others = [*others, seeding]
    if not all(effect.is_clear for effect in (base, *others) if effect is not None):
        sentences.append("A difference whose interval includes zero may be chance.")
    return " ".join(sentences)


def _where(scope: Scope, count: int) -> str:
    tasks = f"{count} {_SCOPES[scope]} task{'s' if count > 1 else ''}"
    return f"On the {tasks}, which no expert was trained on," if scope == "held_out" else f"On the {tasks}"


def _compared(results: Results, name: str, scope: Scope) -> tuple[Effect | None, list[Effect]]:
    """The differences to the base, and to the other references that there are."""
    effects = [results.effect(name, reference, scope) for reference in _COMPARED]
    return effects[0], [effect for effect in effects[1:] if effect is not None]


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{'; '.join(parts[:-1])}; and {parts[-1]}"


def clause(effect: Effect) -> str:
    """Such as `6.1 points above the base model (95 % interval 3.2 to 9.0)`."""
    reference = _CLAUSE.get(effect.reference, effect.reference)
    interval = f"95 % interval {points(effect.low)} to {points(effect.high)}"
    if round(100 * abs(effect.difference), 1) == 0:
        return f"level with {reference} ({interval})"
    side = "above" if effect.difference > 0 else "below"
    doubt = "" if effect.is_clear else ", which includes zero"
    return f"{abs(100 * effect.difference):.1f} points {side} {reference} ({interval}{doubt})"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    """Percentage points with a true minus sign; never `−0.0`."""
    rounded = round(100 * value, 1) + 0.0
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"
