"""What routers drew in a call, for methods that learn from a reward; and a running mean of rewards.

Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning", 1992 (Machine
Learning 8).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..abstract import Router, Routing
from ..attach import Bay
from ..core import recomputing
from ..errors import CallError


class Drawn(list[Routing]):
    """The routings of calls, in the order in which they were made: of each site, of each step of a recursion."""

    @property
    def log_prob(self) -> Tensor:
        """log π of all choices of a row together, (b,): the sum over routings, and over tokens."""
        return torch.stack([_by_row(r.log_prob, r) for r in self._said("log_prob")]).sum(0)

    def _said(self, key: str) -> list[Routing]:
        said = [routing for routing in self if getattr(routing, key) is not None]
        if not said:
            raise CallError(
                f"drawn: no router gave a {key} ({len(self)} routings): it draws in training, as mb.Policy(), and "
                f"its model must be called within the block."
            )
        return said

    def choices(self) -> list[Tensor | None]:
        """What was chosen, routing by routing, as `Policy.given` takes it."""
        return [None if routing.index is None else routing.index[..., 0].detach() for routing in self]


def _by_row(log_prob: Tensor | None, routing: Routing) -> Tensor:
    assert log_prob is not None
    return log_prob.flatten(1).sum(1) if log_prob.ndim > 1 else log_prob


@contextmanager
def drawn(where: Bay | nn.Module) -> Iterator[Drawn]:
    """Keep every routing that the routers of a bay, or of any module, give within the block.

        with methods.drawn(bay) as routings:
            loss = F.cross_entropy(model(x), y, reduction="none")
        (loss.mean() + losses.reinforce(routings.log_prob, -loss, baseline(-loss))).backward()

    A block that gradient checkpointing recomputes is kept once.
    """
    said, root = Drawn(), where.model if isinstance(where, Bay) else where
    if isinstance(where, Bay):
        routers = [r for r in (where.state.router, *[m.router for m in where.modulars.values()]) if r is not None]
    else:
        routers = [module for module in root.modules() if isinstance(module, Router)]
        inner = {id(child) for router in routers for child in router.modules() if child is not router}
        routers = [router for router in routers if id(router) not in inner]

    def keep(router: Any, inputs: Any, routing: Routing) -> None:
        if not recomputing():
            said.append(routing)

    handles = [router.register_forward_hook(keep) for router in {id(r): r for r in routers}.values()]
    try:
        yield said
    finally:
        for handle in handles:
            handle.remove()


class RunningMean:
    """b ← b + η (mean R − b): what rewards were so far, the baseline of `losses.reinforce`.

    Called with rewards (b,), it returns b from before them, so that a draw is not compared with itself. The first call
    returns their own mean.
    """

    def __init__(self, rate: float = 0.1):
        self.rate = rate
        self.mean: Tensor | None = None

    def __call__(self, reward: Tensor) -> Tensor:
        now = reward.detach().mean()
        before = now if self.mean is None else self.mean
        self.mean = before + self.rate * (now - before)
        return before
