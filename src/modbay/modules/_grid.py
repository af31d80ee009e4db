"""Grids: the blocks of a weight, gated.

Tay, Zhao, Bahri, Metzler and Juan, "HyperGrid Transformers: Towards A Single Model for Multiple Tasks", 2021 (ICLR;
arXiv 2007.05891).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..abstract import ParameterComposition, Site
from ..deltas import Mask
from ..errors import CompositionError
from ..types import Params
from ._common import positive, weighted


@dataclass(frozen=True)
class Grid(ParameterComposition):
    """W ⊙ ψ(2 σ(r cᵀ)), with r (rows,) and c (columns,), ψ repeating each entry over its block of W (outputs, inputs).

    rows, columns: how many blocks W has along its outputs and its inputs, which must be multiples of them. r starts at
    zero and c is drawn, so that the start is the base: the paper trains W as well, and has no factor 2. A gate for each
    example, as a hypernetwork makes it, costs a weight an example. At a Linear or Conv1D; raises CompositionError
    elsewhere, or where the blocks do not fit.
    """

    batched: ClassVar[bool] = True
    rows: int = 8
    columns: int = 8

    def __post_init__(self):
        positive("Grid", rows=self.rows, columns=self.columns)

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        for site in sites:
            if site.form not in ("linear", "transposed"):
                raise CompositionError(
                    f"Grid at site {site.name!r} ({type(site.module).__name__}): only the weight of one linear map is "
                    f"gated. Attach at the Linear or Conv1D inside it."
                )
            weighted(site, "Grid")
            inputs, outputs = site.features("inputs"), site.features("outputs")
            if outputs % self.rows or inputs % self.columns:
                raise CompositionError(
                    f"Grid(rows={self.rows}, columns={self.columns}) at site {site.name!r}: its weight, ({outputs}, "
                    f"{inputs}), has no such blocks. Give divisors of its outputs and inputs."
                )
        return {
            site.name: {"row": site.zeros(self.rows), "column": nn.init.normal_(site.empty(self.columns))}
            for site in sites
        }

    def delta(self, params: Params, site: Site) -> Mask:
        grid = 2 * torch.sigmoid(params["row"].unsqueeze(-1) * params["column"].unsqueeze(-2))  # (…, rows, columns)
        outputs, inputs = site.features("outputs"), site.features("inputs")
        mask = grid.repeat_interleave(outputs // self.rows, -2).repeat_interleave(inputs // self.columns, -1)
        return Mask(mask.mT if site.form == "transposed" else mask)
