"""Values: a router with its tensors, and a mixture of experts with their router. Pure: torch only.

    y  =  W0 x  +  Σ_i p_i(x) · s_i B_i A_i x

The mixture is of expert *outputs*. Experts may differ in rank and in the modules that they adapt: an expert without a
module adds nothing there, but still takes part in the routing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

from seedbed.common.adapter import Adapter, LoraFactors
from seedbed.common.algebra import require_same_shape
from seedbed.common.errors import AdapterMismatchError, ConfigError
from seedbed.common.routing.settings import TENSORS, RouterSettings

ModuleTensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Router:
    """Settings, and for every routed module the tensors that `settings.TENSORS` lists for its kind."""

    settings: RouterSettings
    tensors: Mapping[str, ModuleTensors] = field(default_factory=dict)

    def __post_init__(self) -> None:
        frozen = {name: MappingProxyType(dict(module)) for name, module in sorted(self.tensors.items())}
        object.__setattr__(self, "tensors", MappingProxyType(frozen))

    def require_count(self, count: int) -> None:
        """Refuse a router that is not one of `count` experts, as far as its own tensors show.

        Raises:
            ConfigError: naming the module, what was expected, and what was got.
        """
        self.settings.require(count)
        expected = TENSORS[self.settings.base]
        for name, module in self.tensors.items():
            if set(module) != set(expected):
                raise ConfigError(
                    f"router '{self.settings.kind}', module {name}: expected tensors {_listed(expected)}, "
                    f"got {_listed(module)}",
                    _OTHER,
                )
            for key, tensor in module.items():
                if tensor.ndim != expected[key] or tensor.shape[0] != count:
                    wanted = f"[{count}, in]" if expected[key] == 2 else f"[{count}]"
                    raise ConfigError(
                        f"router '{self.settings.kind}', module {name}: expected {key} {wanted}, "
                        f"got {list(tensor.shape)}",
                        _OTHER,
                    )

    def require_fits(self, shapes: Mapping[str, tuple[int, int]], count: int) -> None:
        """Refuse a router that does not route `count` experts on modules of these ``(out, in)``.

        Raises:
            ConfigError: naming the module, what was expected, and what was got.
        """
        self.require_count(count)
        if not TENSORS[self.settings.base]:
            return
        for name, (_, inputs) in shapes.items():
            if name not in self.tensors:
                raise ConfigError(f"router '{self.settings.kind}' does not route module {name}", _OTHER)
            for key, tensor in self.tensors[name].items():
                if tensor.ndim == 2 and tensor.shape[1] != inputs:
                    raise ConfigError(
                        f"router '{self.settings.kind}', module {name}: expected {key} [{count}, {inputs}], "
                        f"got {list(tensor.shape)}",
                        _OTHER,
                    )
        for name in self.tensors:
            if name not in shapes:
                raise ConfigError(f"router '{self.settings.kind}' routes module {name}, which no expert adapts", _OTHER)


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """Experts, their names, and the router among them.

    Raises:
        ConfigError: if there is no expert, a name too many or too few, or the router does not fit.
        AdapterMismatchError: if two experts have different shapes of one module.
    """

    names: tuple[str, ...]
    experts: tuple[Adapter, ...]
    router: Router

    def __post_init__(self) -> None:
        if not self.experts or len(self.names) != len(self.experts):
            raise ConfigError(f"expected one name for each expert, got {len(self.names)} for {len(self.experts)}")
        for name in self.names:
            if self.names.count(name) > 1:
                raise ConfigError(f"two experts of the mixture are named '{name}'", "Give each a name of its own.")
        self.router.require_fits(shapes_of(self.experts), len(self.experts))

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """``(out, in)`` of every module that an expert adapts."""
        return shapes_of(self.experts)

    def factors(self, module: str) -> list[LoraFactors | None]:
        """Each expert's update of a module; none where it has none."""
        return [expert.get(module) for expert in self.experts]


def shapes_of(experts: Sequence[Adapter]) -> dict[str, tuple[int, int]]:
    """``(out, in)`` of every module that an expert adapts, in the order of the names.

    Raises:
        ConfigError: if no expert adapts any.
        AdapterMismatchError: if two experts have different shapes.
    """
    shapes = {}
    for name in sorted({name for expert in experts for name in expert}):
        present = [expert[name] for expert in experts if name in expert]
        require_same_shape(name, present)
        shapes[name] = present[0].shape
    if not shapes:
        raise ConfigError("the experts adapt no module, there is nothing to route")
    return shapes


def require_module(shapes: Mapping[str, tuple[int, int]], name: str) -> tuple[int, int]:
    """``(out, in)`` of a module.

    Raises:
        AdapterMismatchError: if no expert adapts it.
    """
    if name not in shapes:
        raise AdapterMismatchError(f"module {name} is adapted by none of the experts", _OTHER)
    return shapes[name]


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(sorted(names)) or "none"


_OTHER = "Use the router that was made for these experts, in their order."
