"""LoHa: the Hadamard product of two low-rank updates.

Hyeon-Woo, Ye-Bin and Oh, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", 2022
(arXiv 2108.06098); as an adapter: Yeh, Hsieh, Gao, Yang, Oh and Gong, LyCORIS, 2024 (arXiv 2309.14859).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..abstract import ParameterComposition, Site
from ..deltas import Dense, LowRank
from ..types import Params, System
from ._common import factors, positive, uniform


@dataclass(frozen=True)
class LoHa(ParameterComposition):
    """W + (α/r) (B₁ A₁) ⊙ (B₂ A₂), of a rank up to r²; A₁, A₂ (r, i), B₁, B₂ (o, r); A₂ zero, the others drawn.

    rank: r. alpha: α; the rank if None, so that the factor is one. The product is itself B A of rank r², with rows
    A₁[p] ⊙ A₂[q] and columns B₁[p] ⊙ B₂[q], and is never materialised: choose r well below √(width).
    At a convolution with groups the product is of the weight's shape, and dense.
    Differs: at a convolution, peft's `use_effective_conv2d` is not here. At a Linear, Conv1D, Conv or Embedding; raises
    CompositionError elsewhere.
    """

    batched: ClassVar[bool] = True
    systems: ClassVar[tuple[System, ...]] = (
        System(
            (24,),
            "mb.LoHa(8)",
            ("tests/test_lowrank.py::test_loha_is_a_hadamard_product", "tests/test_lowrank.py::test_loha_in_peft"),
        ),
    )
    rank: int = 8
    alpha: float | None = None

    def __post_init__(self):
        positive("LoHa", rank=self.rank)

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        return {site.name: self._one(site) for site in sites}

    def _one(self, site: Site) -> dict[str, Tensor]:
        a, b = factors(site, self.rank, "LoHa")
        return {"A1": uniform(site, a), "B1": uniform(site, b), "A2": site.zeros(*a), "B2": uniform(site, b)}

    def delta(self, params: Params, site: Site) -> LowRank | Dense:
        axis = params["B1"].ndim - 2  # that of the rank in A: 1 in a group
        a = (params["A1"].unsqueeze(axis + 1) * params["A2"].unsqueeze(axis)).flatten(axis, axis + 1)
        b = (params["B1"].unsqueeze(-1) * params["B2"].unsqueeze(-2)).flatten(-2)
        factor = 1.0 if self.alpha is None else self.alpha / self.rank
        if getattr(site.module, "groups", 1) > 1:  # where B after A is no change of the weight
            flat = factor * b @ a.flatten(axis + 1)
            return Dense(flat.unflatten(-1, a.shape[axis + 1 :]))
        return LowRank(a, b, factor)
