"""Balanced routing: in training every module gets its share of the rows, with no loss that asks for it.

Assignment: Lewis, Bhosale, Dettmers, Goyal and Zettlemoyer, "BASE Layers", 2021 (arXiv 2103.16716). Sinkhorn: Clark et
al., "Unified Scaling Laws for Routed Language Models", 2022 (arXiv 2202.01169).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..abstract import Context, Router, Routing, Site
from ..errors import CompositionError, listed
from ..ops import assignment, shares, sinkhorn, uncompiled
from ..types import System
from . import _reading
from ._columns import regrown, renamed

WAYS, GATES = ("assignment", "sinkhorn"), ("sigmoid", "softmax")


class Balanced(Router):
    """α = σ(w_a · x) of one module a: in training arg max Σ_t w_{a_t} · x_t with as many rows for each module, and
    arg max_i w_i · x outside.

    way: "assignment" gives every module rows/n of the call's rows, or one more, by an auction within rows · 1e-2 of the
    spread of the scores of the best; "sinkhorn" takes the largest entry of each row of diag(u) exp(W x/temperature)
    diag(v), whose columns sum to rows/n, so that modules get about as many. by: "token", x (b, t, d) or (b, d), or
    "example", x averaged over its positions. gate: the weight, "sigmoid" of the score or "softmax" over all scores; by
    default as the papers, the first under assignment and the second under Sinkhorn.

    The scores run in fp32; W (n, d) starts orthogonal, its rows 0.1 long. The choice has no gradient, the weight has.
    Padding has no module in training, and no share. In training rows depend on each other; assignment reads numbers
    back from the device, and breaks the graph of compiled code. Differs from the authors' code: rows that are no
    multiple of n; no shuffling between devices. Use WeightedSum: what a module adds is weighed, and x stays.
    """

    systems = (
        System(
            (86,),
            "mb.Balanced()",
            (
                "tests/test_experts.py::test_balanced_assignment_is_balanced_and_near_the_best",
                "tests/test_experts.py::test_base_assigns_in_training_and_takes_the_best_outside",
            ),
            "BASE layers",
        ),
        System(
            (87,),
            "mb.Balanced('sinkhorn')",
            (
                "tests/test_experts.py::test_sinkhorn_s_marginals_are_exact",
                "tests/test_experts.py::test_s_base_takes_the_largest_entry_of_the_plan",
            ),
            "S-BASE",
            "arg max_i P_ti, P = diag(u) exp(W x/τ) diag(v), rows summing to 1 and columns to rows/n",
        ),
    )

    def __init__(
        self,
        way: str = "assignment",
        by: str = "token",
        gate: str | None = None,
        temperature: float = 1.0,
        iterations: int = 20,
    ):
        super().__init__()
        self.way, self.by = way, _reading.by("Balanced", by)
        self.gate = gate or GATES[way == "sinkhorn"]
        self.temperature, self.iterations = temperature, iterations
        if way not in WAYS:
            raise CompositionError(f"Balanced(way={way!r}): the rows are balanced by one of {listed(WAYS)}.")
        if self.gate not in GATES:
            raise CompositionError(f"Balanced(gate={gate!r}): the weight is one of {listed(GATES)} of the scores.")
        if not temperature > 0 or iterations < 1:
            raise CompositionError(f"Balanced(temperature={temperature}, iterations={iterations}): both are above 0.")
        self.axis = -1
        self.centroids: Tensor

    def build(self, names: Sequence[str], site: Site) -> None:
        width = _reading.width(self, site, getattr(self, "centroids", None))
        self.axis = site.axis
        new = torch.empty(len(names), width, device=site.device, dtype=torch.float32)
        if not hasattr(self, "centroids"):
            nn.init.orthogonal_(new, gain=0.1)
        self.centroids = regrown(self, "centroids", self.names, names, new)
        self.names = tuple(names)

    def rename(self, old: str, new: str) -> None:
        self.names = renamed(self.names, old, new)

    def forward(self, x: Tensor, c: Context) -> Routing:
        rows, mask = _reading.rows(self, x, c, self.by, self.axis)
        with torch.autocast(x.device.type, enabled=False):
            scores = _reading.linear(_reading.full(rows), self.centroids)
            flat, real = scores.detach().flatten(0, -2), None if mask is None else mask.bool().flatten()
            if not self.training:
                at = flat.argmax(-1)
            elif self.way == "sinkhorn":
                at = sinkhorn(flat / self.temperature, real, self.iterations).argmax(-1)
                at = at if real is None else torch.where(real, at, -1)
            else:
                at = _assigned(flat, real)
            index = at.view(*scores.shape[:-1], 1)
            p = scores.sigmoid() if self.gate == "sigmoid" else scores.softmax(-1)
            return Routing(index=index, weights=p.gather(-1, index.clamp(min=0)))


@uncompiled
def _assigned(scores: Tensor, real: Tensor | None) -> Tensor:
    """The module of each row (rows,), −1 for padding."""
    if real is None:
        return assignment(scores, shares(scores.argmax(-1), scores.shape[-1]))
    at = torch.full_like(real, -1, dtype=torch.long)
    at[real] = _assigned(scores[real], None)
    return at
