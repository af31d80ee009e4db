"""Modules that were trained apart, made ready to be routed, or to be learned on from their average.

Arrow: Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs", 2024 (arXiv 2405.11157).
Average: Caccia et al., "Multi-Head Adapter Routing for Cross-Task Generalization", 2023 (arXiv 2211.03831).
"""

from typing import Any

import torch
from torch import Tensor

from ..abstract import ParameterComposition
from ..attach import Bay
from ..deltas import LowRank
from ..errors import CompositionError
from ..routing import Prototypes
from ..types import System, systems


@systems(
    System(
        (),
        "methods.arrow(bay)",
        ("tests/test_tasks.py::test_arrow_points_where_a_module_acts_most", "tests/test_tasks.py::test_arrow_in_peft"),
        "Arrow's prototypes",
        "v_i = the top right singular vector of ΔW_i",
        section="4.2.3",
    )
)
def arrow(bay: Bay) -> Bay:
    """v_i = argmax_{‖v‖ = 1} ‖ΔW_i v‖ at each site: the prototypes by which `mb.Prototypes("arrow")` routes.

    To be called again after a module came or has learned; v's sign is arbitrary. Raises CompositionError for a site
    without such a router of its own, or for a module that does not change the site's weight.
    """
    for name, modular in bay.modulars.items():
        router: Any = modular.router
        if not isinstance(router, Prototypes) or router.way != "arrow":
            raise CompositionError(
                f"arrow: site {name!r} has no prototypes of its own: attach(…, router=lambda: mb.Prototypes('arrow'))."
            )
        with torch.no_grad():
            for i, part in enumerate(modular.order):
                if part is not None:
                    router.prototypes[i] = _top(part, modular.site).to(router.prototypes)
    return bay


def _top(part: Any, site: Any) -> Tensor:
    """The input direction in which a module changes the output most."""
    if not isinstance(part.kind, ParameterComposition):
        raise CompositionError(f"arrow at site {site.name!r}: {type(part.kind).__name__} changes no weight.")
    delta = part.kind.delta(part.tensors(), site)
    if isinstance(delta, LowRank) and delta.a.ndim == 2 and site.form in ("linear", "transposed"):
        matrix = torch.linalg.qr(delta.b.float()).R @ delta.a.float()  # as long as BA in every direction
    else:
        weight = delta.dense(site)[0]
        if weight is None or weight.ndim != 2:
            raise CompositionError(f"arrow at site {site.name!r}: the module's change is no matrix.")
        matrix = weight.float().mT if site.form == "transposed" else weight.float()
    return torch.linalg.svd(matrix, full_matrices=False).Vh[0]


def average(bay: Bay, name: str, *names: str) -> Bay:
    """φ_name = 1/n Σ_i φ_i: adds a module, the mean of the parameters of others (all, if none is named), at each site.

    MHR-μ: the skills are averaged, and few-shot training goes on from there, by `bay.use(name)`. Raises
    CompositionError for modules of different kinds.
    """
    several = [bay.names().index(one) for one in names or bay.names()]
    kinds = {site: m.modules_at().alike(several) for site, m in bay.modulars.items()}
    bay.add(name, kinds)  # type: ignore[arg-type]
    for modular in bay.modulars.values():
        with torch.no_grad():
            for key, tensor in modular.order[-1].tensors().items():  # type: ignore[union-attr]
                if tensor.is_floating_point():
                    tensor.copy_(torch.stack([modular.order[i].tensors()[key] for i in several]).mean(0))  # type: ignore
    return bay
