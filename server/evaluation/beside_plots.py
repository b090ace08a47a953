"""Figures beside accuracy: drift against accuracy, and what each router does with each task and layer."""

from __future__ import annotations

from seedbed.server.evaluation.answer import percent
from seedbed.server.evaluation.beside import used
from seedbed.server.evaluation.plots import FIRST, INK, SECOND, figure, grid_of_numbers
from seedbed.server.evaluation.results import Results, Scope


def drift_scatter(results: Results) -> str:
    """Divergence from the base model on general text against mean accuracy: up and to the left is better."""
    scope: Scope = "held_in" if all(results.tasks.values()) else "held_out"
    shown = [
        (candidate.label, candidate.general.kl, 100 * mean.value)
        for candidate in results.candidates.values()
        if candidate.general is not None
        and candidate.general.kl > 0  # the base itself is infinitely far to the left
        and candidate.kind not in ("expert", "base")
        and (mean := getattr(candidate.mean, scope)) is not None
    ]
    if not shown:
        return ""
    with figure(4.4) as (_, axes, svg):
        middle = sorted(kl for _, kl, _ in shown)[len(shown) // 2]
        for label, kl, accuracy in shown:
            axes.plot([kl], [accuracy], marker="o", markersize=7, color=FIRST)
            left = kl > middle  # names stand towards the middle, where there is room
            axes.annotate(
                label,
                (kl, accuracy),
                xytext=(-7 if left else 7, -3),
                textcoords="offset points",
                ha="right" if left else "left",
                fontsize=8.5,
            )
        axes.set_xscale("log")
        axes.set_xlabel("KL to the base on general text, nats a token")
        axes.set_ylabel(f"{scope.replace('_', '-')} accuracy, %")
        axes.margins(x=0.28, y=0.12)
        axes.grid(linewidth=0.8)
    told = ", ".join(f"{label} {kl:.3f} and {accuracy:.1f} %" for label, kl, accuracy in shown)
    return svg("drift", "Divergence from the base model against accuracy", told)


def router_loads(results: Results, name: str) -> str:
    """Mean probability of each expert (columns) on each task (rows)."""
    use = used(results)[name]
    label = results.candidates[name].label
    rows = [[100 * share for share in layer.load] for layer in use.tasks.values()]
    title = f"{label}: mean probability in % of each expert (columns) on each task (rows)"
    largest = max(max(row) for row in rows)
    return grid_of_numbers(f"loads-{name}", title, list(use.tasks), list(use.names), rows, top=largest)


def router_depth(results: Results, name: str) -> str:
    """Mean probability of each expert (rows) in every adapted module (columns), over all tasks."""
    use = used(results)[name]
    grid = list(zip(*([100 * share for share in layer.load] for layer in use.layers.values()), strict=True))
    label = results.candidates[name].label
    with figure(0.24 * len(use.names) + 1.5) as (whole, axes, svg):
        drawn = axes.pcolormesh(grid, cmap="viridis", vmin=0, vmax=max(1e-9, *(max(row) for row in grid)))
        axes.invert_yaxis()
        axes.set_yticks([index + 0.5 for index in range(len(use.names))], use.names)
        axes.set_xlabel("adapted module, by name")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        whole.colorbar(drawn, ax=axes, label="%", pad=0.02)
    told = ", ".join(f"{expert} {percent(share)}" for expert, share in zip(use.names, use.overall.load, strict=True))
    return svg(f"depth-{name}", f"{label}: mean probability of each expert by module", f"Over all modules: {told}")


def router_layers(results: Results) -> str:
    """Relative entropy of each router in every layer: where it chooses, and where it does not."""
    found = used(results)
    with figure(2.6) as (whole, axes, svg):
        for index, (name, use) in enumerate(found.items()):
            values = [100 * layer.relative_entropy for layer in use.layers.values()]
            axes.plot(
                range(len(values)),
                values,
                color=(FIRST, SECOND, INK)[index % 3],
                linestyle=("-", "--", ":", "-.")[index // 3 % 4],
                linewidth=1.5,
                label=results.candidates[name].label,
            )
        axes.set_ylim(0, 104)
        axes.set_xlabel("adapted module, by name")
        axes.set_ylabel("entropy, % of log N")
        axes.grid(linewidth=0.8)
        whole.legend(loc="outside upper left", ncols=2, frameon=False)
    told = ", ".join(
        f"{results.candidates[name].label} {percent(use.overall.relative_entropy)} over all layers"
        for name, use in found.items()
    )
    return svg("router-layers", "Entropy of each router by layer, in % of an even spread", told)
