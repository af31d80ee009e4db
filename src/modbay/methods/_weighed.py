"""Modules of a bay at weights that are sought: which take part, what an objective says of them, and all as before."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..abstract import Routing
from ..attach import Bay
from ..errors import BayError, CompositionError, listed


def members(method: str, bay: Bay, names: Sequence[str] | None) -> dict[str, int]:
    """The modules that take part, all if none are named, with their places in the bay; raises BayError for others."""
    have = bay.names()
    taking = list(have if names is None else names)
    unknown = [name for name in taking if name not in have]
    if unknown or not taking or len(set(taking)) < len(taking):
        raise BayError(f"{method}(names={taking}): different modules of {listed(have)}.")
    return {name: have.index(name) for name in taking}


@contextmanager
def as_before(bay: Bay) -> Iterator[None]:
    """However the bay is routed inside, it is routed as before afterwards."""
    before = bay.state.chosen
    try:
        yield
    finally:
        bay.state.chosen = before


def slope(method: str, bay: Bay, objective: Callable[[], Tensor], w: Tensor, route: Callable[[Tensor], Routing]):
    """∇_w of the objective under the route that w gives; no parameter gets a gradient."""
    w = w.detach().requires_grad_()
    with torch.enable_grad():
        bay.state.chosen = route(w)
        value = objective()
        if not value.requires_grad:
            raise CompositionError(
                f"{method}: the objective has no gradient: it must run the model, without a label of this bay, and "
                f"without torch.no_grad or torch.inference_mode."
            )
        (found,) = torch.autograd.grad(value, w, allow_unused=True)
    if found is None:
        raise CompositionError(
            f"{method}: the objective does not depend on how bay {bay.state.name!r} is routed: it must run the model, "
            f"without a label of this bay, and with gradients."
        )
    return found
