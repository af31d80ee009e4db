"""LoRA: a low-rank update of a weight.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang and Chen, "LoRA: Low-Rank Adaptation of Large Language Models", 2021
(arXiv 2106.09685); rank-stabilised scaling: Kalajdzievski, 2023 (arXiv 2312.03732). Started from the weight: PiSSA,
Meng, Wang and Zhang, 2024 (arXiv 2404.02948); OLoRA, Büyükakyüz, 2024 (arXiv 2406.01775).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..abstract import Delta, ParameterComposition, Site
from ..deltas import Bias, LowRank, Sum
from ..errors import CompositionError
from ..types import Params, System
from ._common import factors, matrix, positive, uniform

STARTED = (
    "tests/test_lowrank.py::test_pissa_and_olora_are_the_weights_own",
    "tests/test_lowrank.py::test_pissa_and_olora_in_peft",
)


@dataclass(frozen=True)
class LoRA(ParameterComposition):
    """W + (α/r) B A, with A (r, i) drawn as a Linear's weight and B (o, r) zero.

        mb.LoRA(8, alpha=16)
        mb.LoRA(16, start="pissa")          # W + B A − B₀ A₀ from the largest singular values of W
        {"*.query": mb.LoRA(4), "*.ffn.*": mb.LoRA(16)}     # a module's rank and alpha by pattern

    rank: r. alpha: α; the rank if None, so that the factor is one. stable: the factor is α/√r instead. bias: B has one,
    + (α/r) b, zero at first. start: "zero"; or B and A are taken out of W: "pissa", its r largest singular values,
    halved between them, or "olora", r columns of Q and rows of R. What was taken, B₀ A₀, is kept as constants and
    subtracted, so that a new module is the base bit for bit, and the base need not be changed; twice the size.
    No dropout: a kind is a pure function. At a Linear, Conv1D, Conv or Embedding, and without start or bias at fused
    experts; raises CompositionError elsewhere, or where W has no rank r to start from.
    """

    batched: ClassVar[bool] = True
    constants: ClassVar[tuple[str, ...]] = ("A0", "B0")
    systems: ClassVar[tuple[System, ...]] = (
        System(
            (22,),
            "mb.LoRA(8, alpha=16)",
            ("tests/test_kinds.py::test_lora_is_w_plus_scaled_ba", "tests/test_peft.py::test_lora"),
        ),
        System(
            (24,), 'mb.LoRA(16, start="pissa")', STARTED, "PiSSA", "W + B A − B₀ A₀, with B₀ A₀ = U_r S_r V_rᵀ of W"
        ),
        System((24,), 'mb.LoRA(16, start="olora")', STARTED, "OLoRA", "W + B A − B₀ A₀, with B₀ A₀ = Q_r R_r of W"),
    )
    rank: int = 8
    alpha: float | None = None
    stable: bool = False
    bias: bool = False
    start: Literal["zero", "pissa", "olora"] = "zero"

    def __post_init__(self):
        positive("LoRA", rank=self.rank)
        if self.start not in ("zero", "pissa", "olora"):
            raise CompositionError(f'LoRA(start={self.start!r}): it is "zero", "pissa" or "olora".')

    @property
    def factor(self) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.stable else self.rank)

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        return {site.name: self._one(site) | self._taken(site) for site in sites}

    def restore(self, sites: Sequence[Site], tensors: Mapping[str, Params]) -> dict[str, dict[str, Tensor]]:
        made = {site.name: self._one(site) for site in sites}  # W need not be taken apart for what a file has
        if self.start != "zero":
            for own in made.values():
                own |= {"A0": torch.zeros_like(own["A"]), "B0": torch.zeros_like(own["B"])}
        return made

    def _one(self, site: Site) -> dict[str, Tensor]:
        if site.form == "experts" and self.start == "zero" and not self.bias:
            experts, o, i = site.weight.shape[0], site.features("outputs"), site.features("inputs")
            return {"A": uniform(site, (experts, self.rank, i)), "B": site.zeros(experts, o, self.rank)}
        a, b = factors(site, self.rank, "LoRA")
        made = {"A": uniform(site, a), "B": site.zeros(*b)}
        if site.form == "embedding":  # as the paper's code: A zero, B normal, since A is looked up
            made = {"A": site.zeros(*a), "B": nn.init.normal_(site.empty(*b))}
        return made | ({"bias": site.zeros(site.features("outputs"))} if self.bias else {})

    def _taken(self, site: Site) -> dict[str, Tensor]:
        """A and B of W itself, and both again as constants."""
        if self.start == "zero":
            return {}
        weight = matrix(site, f"LoRA(start={self.start!r})")
        if self.rank > min(weight.shape):
            raise CompositionError(
                f"LoRA({self.rank}, start={self.start!r}) at site {site.name!r}: a weight {tuple(weight.shape)} has "
                f"rank {min(weight.shape)} at most. Lower the rank."
            )
        if self.start == "pissa":
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            root = (s[: self.rank] / self.factor).sqrt()
            b, a = u[:, : self.rank] * root, root.unsqueeze(-1) * v[: self.rank]
        else:
            q, r = torch.linalg.qr(weight)
            b, a = q[:, : self.rank], r[: self.rank]
        shape, _ = factors(site, self.rank, "LoRA")
        a, b = (t.contiguous().to(site.dtype) for t in (a.reshape(shape), b))
        return {"A": a, "B": b, "A0": a.clone(), "B0": b.clone()}

    def delta(self, params: Params, site: Site) -> Delta:
        a, b = params["A"], params["B"]
        parts: list[Delta] = [LowRank(a, b, self.factor)]
        if self.start != "zero":
            parts.append(LowRank(params["A0"].to(a.dtype), params["B0"].to(b.dtype), -self.factor))
        if self.bias:
            parts.append(Bias(self.factor * params["bias"]))
        return parts[0] if len(parts) == 1 else Sum(parts)
