"""Schedules of what routers explore, and learning rates of two speeds.

Temperatures: Jang, Gu and Poole, 2017 (arXiv 1611.01144). ε: Rosenbaum et al., 2019 (arXiv 1904.12774). Two speeds:
Ponti, Sordoni, Bengio and Reddy, 2022 (arXiv 2202.13914).
"""

import math

from torch import nn

from ..abstract import Router
from ..attach import Bay
from ..errors import CompositionError, listed
from ..types import System, systems

SHAPES = ("linear", "exponential", "cosine")
TESTS = "tests/test_hard.py::"


def annealed(step: int, steps: int, first: float, last: float, shape: str = "linear") -> float:
    """The value at a step: from first at 0 to last at `steps` and after, in a line, by a constant factor, or a cosine.

    Raises CompositionError for another shape, or a factor between values that are not both above zero.
    """
    t = min(max(step / max(steps, 1), 0.0), 1.0)
    if shape not in SHAPES or (shape == "exponential" and min(first, last) <= 0):
        raise CompositionError(
            f"annealed(first={first}, last={last}, shape={shape!r}): the shape is one of {listed(SHAPES)}, and "
            f"exponential goes between values above 0."
        )
    if shape == "exponential":
        return first * (last / first) ** t
    return last + (first - last) * ((1 - t) if shape == "linear" else (1 + math.cos(math.pi * t)) / 2)


class Anneal:
    """Sets a field of every router that has it, step by step, from a first value to a last.

        warm = methods.Anneal(bay, 1000, temperature=(5.0, 0.5), epsilon=(0.3, 0.0))
        optimiser.step(); warm.step()

    where: a bay, or a module that holds routers. steps: in which they reach the last value, and stay. fields: by name
    (temperature, epsilon, last, …), the first and last value; whole numbers stay whole. shape: "linear", "exponential"
    or "cosine". Raises CompositionError for a field that no router has.
    """

    def __init__(self, where: Bay | nn.Module, steps: int, shape: str = "linear", **fields: tuple[float, float]):
        root = where.model if isinstance(where, Bay) else where
        routers = [module for module in root.modules() if isinstance(module, Router)]
        if isinstance(where, Bay):
            own = [where.state.router, *[m.router for m in where.modulars.values()]]
            routers = [r for router in own if router is not None for r in router.modules() if isinstance(r, Router)]
        self.routers = list({id(router): router for router in routers}.values())
        lost = [name for name in fields if not any(hasattr(router, name) for router in self.routers)]
        if lost or not fields:
            raise CompositionError(
                f"Anneal({listed(fields) or 'nothing'}): no router has {listed(lost) or 'it'}; there are "
                f"{listed({type(router).__name__ for router in self.routers}) or 'no routers'}."
            )
        self.steps, self.shape, self.fields, self.t = steps, shape, fields, 0
        self._set()

    def step(self) -> None:
        """One step on."""
        self.t += 1
        self._set()

    def _set(self) -> None:
        for name, (first, last) in self.fields.items():
            value: float = annealed(self.t, self.steps, first, last, self.shape)
            value = round(value) if isinstance(first, int) and isinstance(last, int) else value
            for router in self.routers:
                if hasattr(router, name):
                    setattr(router, name, value)


@systems(
    System(
        (91,),
        "torch.optim.Adam(two_speeds(bay, lr=1e-3, ratio=10.0))",
        (TESTS + "test_routers_learn_at_a_rate_of_their_own",),
        "Two-speed learning rates",
        section="4.2.1",
    )
)
def two_speeds(bay: Bay, lr: float, ratio: float = 10.0) -> list[dict]:
    """Groups for an optimiser: modules at lr, routers at ratio · lr: above 1 they choose fast, below 1 they wait.

    Polytropon's routers are faster (1e-2 and 1e-3); slower ones wait until modules differ. As bay.parameter_groups(lr,
    router_lr=ratio * lr), which has a third rate for aggregators.
    """
    return bay.parameter_groups(lr, router_lr=ratio * lr)
