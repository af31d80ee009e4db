"""Competition: the module whose output scores best takes the row, and alone learns from it.

Parascandolo, Kilbertus, Rojas-Carulla and Schölkopf, "Learning Independent Causal Mechanisms", 2018 (arXiv 1712.00961).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..abstract import Aggregator, Context, Kind, Routing, Site
from ..errors import CompositionError
from ..types import System

TESTS = "tests/test_hard.py::"


class Competition(Aggregator):
    """y = m_j(x), j = argmax_i s(m_i(x)), over the modules that a row is routed to: the winner takes all.

        experts = mb.Modular(None, networks, mb.Uniform(), mb.Competition(discriminator), features=64)
        y = experts(x)                           # gradients reach the winners alone

    score: s, a function or network of outputs (k, b, …) that gives (k, b). It gets no gradient here; train it apart, on
    `mb.Stack`'s outputs, say. The number of the winner, among the modules that were routed, is in
    c.state["winner"] (b,). All that are routed run; weights do not scale. A score can't be saved with a bay.
    Raises CompositionError for a score of another shape, for an input composition, and under a routing by token.
    """

    systems = (
        System(
            (95,),
            "mb.Competition(lambda outputs: -outputs.square().mean(-1))",
            (
                TESTS + "test_the_winner_takes_the_row_and_alone_learns",
                TESTS + "test_competing_experts_take_a_mechanism_each",
                "tests/test_recipes.py::test_rims_only_active_cells_change",
            ),
            "Competition of experts",
        ),
    )

    def __init__(self, score: Callable[[Tensor], Tensor]):
        super().__init__()
        self.score = score

    def arguments(self) -> dict[str, Any]:
        raise CompositionError("Competition: its score is code, which no file holds. Save the modules by themselves.")

    def admit(self, kind: Kind, site: Site) -> None:
        if kind.place:
            raise CompositionError(f"Competition at site {site.name!r}: {type(kind).__name__} has no output to score.")

    def forward(self, f: Callable | None, x: Tensor, modules: Any, routing: Routing, c: Context) -> Tensor:
        if routing.axes > 1:
            raise CompositionError("Competition: tokens can't compete apart; route by example, or all alike.")
        outputs = modules.outputs(f, x, routing, c)[0]  # (k, b, …)
        with torch.no_grad():
            scores = self.score(outputs.detach())
            if scores.shape != outputs.shape[:2]:
                raise CompositionError(
                    f"Competition: the score of outputs {tuple(outputs.shape)} is {tuple(scores.shape)}, and must be "
                    f"{tuple(outputs.shape[:2])}: one a module and example."
                )
            winner = scores.masked_fill(~_running(routing, scores, modules), float("-inf")).argmax(0)
        c.state["winner"] = winner
        pick = winner.view(1, -1, *[1] * (outputs.ndim - 2)).expand(1, *outputs.shape[1:])
        return outputs.gather(0, pick)[0]


def _running(routing: Routing, scores: Tensor, modules: Any) -> Tensor:
    """(k, b): which outputs are of a module that the row is routed to; all of a row that has none."""
    if routing.index is not None and routing.axes:
        there = (routing.index >= 0).mT
    elif routing.index is None:
        ids = modules.active(routing)
        there = (routing.weights[..., ids] != 0).mT if routing.axes else (routing.weights[ids] != 0).unsqueeze(-1)  # type: ignore[index]
    else:
        return torch.ones_like(scores, dtype=torch.bool)
    there = there.expand_as(scores).to(scores.device)
    return there | ~there.any(0)
