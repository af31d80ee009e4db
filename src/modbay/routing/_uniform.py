"""Uniform routing: all modules count alike (survey section 3.1)."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..abstract import Context, Router, Routing, Site


class Uniform(Router):
    """α_i = 1/n: every module, for every input, at the same weight. Weights: (n,)."""

    reads_x: ClassVar[bool] = False

    def build(self, names: Sequence[str], site: Site) -> None:
        self.names = tuple(names)
        n = len(self.names)
        self.register_buffer("weights", torch.full((n,), 1 / max(n, 1), device=site.device), persistent=False)

    def forward(self, x: Tensor | None, c: Context) -> Routing:
        return Routing(weights=self.weights)  # type: ignore[arg-type]
