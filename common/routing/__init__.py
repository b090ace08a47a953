"""Routing among frozen experts: values, the routed layer, mixtures on a model, and routers on disk.

mixture = Mixture(names, experts, arrow_router(experts))
slot = MixtureSlot(model)
slot.put(mixture)                       # from now on the model generates and scores with the mixture

routed = RoutedModel.learned(model, experts, RouterSettings(kind="learned"))
…                                       # train routed.parameters() that require gradients
mixture = Mixture(names, experts, routed.router())
"""

from seedbed.common.routing.diagnostics import LayerDiagnostics, RoutingDiagnostics
from seedbed.common.routing.mixture import Mixture, Router
from seedbed.common.routing.mixture_file import load_mixture, read_mixture, write_mixture
from seedbed.common.routing.model import RoutedModel
from seedbed.common.routing.router_file import ROUTER_FILES, read_router, write_router
from seedbed.common.routing.routers import (
    arrow_prototypes,
    arrow_router,
    average_routers,
    by_sequence,
    gates_of,
    phatgoose_router,
    untrained_router,
)
from seedbed.common.routing.settings import KINDS, RouterKind, RouterSettings
from seedbed.common.routing.slot import MixtureSlot
from seedbed.common.routing.update import RoutedUpdate

__all__ = [
    "KINDS",
    "ROUTER_FILES",
    "LayerDiagnostics",
    "Mixture",
    "MixtureSlot",
    "RoutedModel",
    "RoutedUpdate",
    "Router",
    "RouterKind",
    "RouterSettings",
    "RoutingDiagnostics",
    "arrow_prototypes",
    "arrow_router",
    "average_routers",
    "by_sequence",
    "gates_of",
    "load_mixture",
    "phatgoose_router",
    "read_mixture",
    "read_router",
    "untrained_router",
    "write_mixture",
    "write_router",
]
