"""LoRA: a low-rank update of a weight.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang and Chen, "LoRA: Low-Rank Adaptation of Large Language Models", 2021
(arXiv 2106.09685); rank-stabilised scaling: Kalajdzievski, 2023 (arXiv 2312.03732).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..abstract import ParameterComposition, Site
from ..deltas import LowRank
from ..errors import CompositionError
from ..types import Params, System


@dataclass(frozen=True)
class LoRA(ParameterComposition):
    """W + (α/r) B A, with A (r, i) drawn as a Linear's weight and B (o, r) zero.

    rank: r. alpha: α; the rank if None, so that the factor is one. stable: the factor is α/√r instead.
    At a Linear, Conv1D, Conv or Embedding; raises CompositionError elsewhere.
    """

    batched: ClassVar[bool] = True
    systems: ClassVar[tuple[System, ...]] = (
        System(
            (22,),
            "mb.LoRA(8, alpha=16)",
            ("tests/test_kinds.py::test_lora_is_w_plus_scaled_ba", "tests/test_peft.py::test_lora"),
        ),
    )
    rank: int = 8
    alpha: float | None = None
    stable: bool = False

    @property
    def factor(self) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.stable else self.rank)

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        return {site.name: self._one(site) for site in sites}

    def _one(self, site: Site) -> dict[str, Tensor]:
        r = self.rank
        if site.form in ("linear", "transposed"):
            a = nn.init.kaiming_uniform_(site.empty(r, site.features("inputs")), a=math.sqrt(5))
            return {"A": a, "B": site.zeros(site.features("outputs"), r)}
        if site.form == "convolution":
            a = nn.init.kaiming_uniform_(site.empty(r, *site.weight.shape[1:]), a=math.sqrt(5))
            return {"A": a, "B": site.zeros(site.features("outputs"), r)}
        if site.form == "embedding":  # as the paper's code: A zero, B normal, since A is looked up
            b = nn.init.normal_(site.empty(site.features("outputs"), r))
            return {"A": site.zeros(r, site.features("inputs")), "B": b}
        if site.form == "experts":
            a = nn.init.kaiming_uniform_(site.empty(site.weight.shape[0], r, site.features("inputs")), a=math.sqrt(5))
            return {"A": a, "B": site.zeros(site.weight.shape[0], site.features("outputs"), r)}
        raise CompositionError(
            f"LoRA at site {site.name!r} ({type(site.module).__name__}): there is no weight to update. Attach at the "
            f"Linear, Conv1D, Conv or Embedding inside it."
        )

    def delta(self, params: Params, site: Site) -> LowRank:
        return LowRank(params["A"], params["B"], self.factor)
