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
    estimate = getattr(results.candidates[name].mean, scope)
    tasks = f"{estimate.tasks} {_SCOPES[scope]} task{'s' if estimate.tasks > 1 else ''}"
    where = f"{tasks}, which no expert was trained on," if scope == "held_out" else f"{tasks}"
    opening = f"On the {where} the best combined model is the {results.candidates[name].label}"
    if results.candidates[name].kind != "merge":
        opening = f"On the {where} the best model is the {results.candidates[name].label}"
    sentences = [f"{opening}, with {percent(estimate.value)} accuracy on average."]
    sentences += _comparison(results, name, scope)
    sentences += _seeding(results, name, scope)
    return " ".join(sentences)


def clause(effect: Effect) -> str:
    """Such as `6.1 points above the base model (95 % interval 3.2 to 9.0)`."""
    reference = _CLAUSE.get(effect.reference, effect.reference)
    interval = f"95 % interval {points(effect.low)} to {points(effect.high)}"
    if round(100 * abs(effect.difference), 1) == 0:
        return f"level with {reference} ({interval})"
    side = "above" if effect.difference > 0 else "below"
    doubt = "" if effect.is_clear else ", which includes zero, so this may be chance"
    return f"{abs(100 * effect.difference):.1f} points {side} {reference} ({interval}{doubt})"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    """Percentage points with a true minus sign; never `−0.0`."""
    rounded = round(100 * value, 1) + 0.0
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"


def _comparison(results: Results, name: str, scope: Scope) -> list[str]:
    effects = [results.effect(name, reference, scope) for reference in _COMPARED]
    clauses = [clause(effect) for effect in effects if effect is not None]
    if not clauses:
        return []
    listed = clauses[0] if len(clauses) == 1 else f"{'; '.join(clauses[:-1])}; and {clauses[-1]}"
    return [f"That is {listed}."]


def _seeding(results: Results, name: str, scope: Scope) -> list[str]:
    """The question of the method itself, where the best candidate does not already answer it."""
    if name == "average":
        return []
    effect = results.effect("average", "unseeded", scope)
    return [f"The seeded average is {clause(effect)}."] if effect is not None else []
