"""AdaLoRA: a low-rank update as its own singular values, of which only the important ones stay.

Zhang, Chen, Bukharin, Karampatziakis, He, Cheng, Chen and Zhao, "AdaLoRA: Adaptive Budget Allocation for
Parameter-Efficient Fine-Tuning", 2023 (arXiv 2303.10512).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..abstract import ParameterComposition, Site
from ..deltas import LowRank
from ..types import Params, System
from ._common import factors, positive


@dataclass(frozen=True)
class AdaLoRA(ParameterComposition):
    """W + (α/r) P Λ Q, with P (o, r), Q (r, i) normal, Λ (r,) zero; and γ (‖PᵀP − I‖_F + ‖QQᵀ − I‖_F) in the loss.

    rank: r at first; `modbay.methods.RankBudget` then sets entries of Λ to zero in a training loop. alpha: α; the rank
    if None, so that the factor is one. orthogonality: γ. As in the authors' code the lengths are not squared, and the
    penalty is the mean over P and Q of all sites, of which each has its `share`, a constant. Differs: peft divides by
    r + 1e-5. At a Linear, Conv1D, Conv or Embedding; raises CompositionError elsewhere.
    """

    batched: ClassVar[bool] = True
    constants: ClassVar[tuple[str, ...]] = ("share",)
    systems: ClassVar[tuple[System, ...]] = (
        System(
            (24,),
            "mb.AdaLoRA(12)",
            (
                "tests/test_lowrank.py::test_adalora_is_a_product_of_three",
                "tests/test_lowrank.py::test_adalora_in_peft",
                "tests/test_lowrank.py::test_the_budget_of_ranks_in_peft",
            ),
        ),
    )
    rank: int = 12
    alpha: float | None = None
    orthogonality: float = 0.5

    def __post_init__(self):
        positive("AdaLoRA", rank=self.rank)

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        return {site.name: self._one(site, len(sites)) for site in sites}

    def _one(self, site: Site, sites: int) -> dict[str, Tensor]:
        q, p = factors(site, self.rank, "AdaLoRA")
        drawn = {"P": nn.init.normal_(site.empty(*p), std=0.02), "Q": nn.init.normal_(site.empty(*q), std=0.02)}
        return drawn | {"values": site.zeros(self.rank), "share": site.zeros(1) + 1 / (2 * sites)}

    def delta(self, params: Params, site: Site) -> LowRank:
        values, q = params["values"], params["Q"]
        q = q * values.view(*values.shape, *[1] * (q.ndim - values.ndim))
        return LowRank(q, params["P"], 1.0 if self.alpha is None else self.alpha / self.rank)

    def penalty(self, params: Params) -> Tensor:
        p, q = params["P"], params["Q"].flatten(1)
        one = torch.eye(self.rank, device=p.device, dtype=p.dtype)
        lengths = (p.mT @ p - one).norm() + (q @ q.mT - one).norm()
        return self.orthogonality * params["share"].squeeze() * lengths
