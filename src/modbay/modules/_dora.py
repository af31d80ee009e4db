"""DoRA: a weight's magnitudes and directions are updated apart, the directions at low rank.

Liu, Wang, Yin, Molchanov, Wang, Cheng and Chen, "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024 (arXiv 2402.09353).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..abstract import ParameterComposition, Site
from ..deltas import Bias, LowRank, Scale, Sum
from ..errors import CompositionError
from ..types import Params, System
from ._common import factors, matrix, positive, uniform


@dataclass(frozen=True)
class DoRA(ParameterComposition):
    """m ⊙ V/‖V‖ with V = W + (α/r) B A and m = ‖W‖ + Δm; ‖·‖ is the length of each output's row; the bias stays.

    rank, alpha: as LoRA's, and A, B (r, i), (o, r) are drawn as LoRA's. Δm (o,) starts at zero, so that a new module is
    the base bit for bit in any dtype; ‖V‖ has no gradient (the paper's section 4.3). ‖V‖² = ‖W‖² + 2 ⟨W, ΔW⟩ + ‖ΔW‖²
    is had from the factors, without ΔW. Differs: m is learned as a change, so that weight decay pulls it to the base's.
    At a Linear, Conv1D, Conv or Embedding; raises CompositionError elsewhere, at a slice of an output, and where a row
    of W is zero and has no direction.
    """

    batched: ClassVar[bool] = True
    reads_weight: ClassVar[bool] = True
    systems: ClassVar[tuple[System, ...]] = (
        System(
            (24,),
            "mb.DoRA(8, alpha=16)",
            (
                "tests/test_lowrank.py::test_dora_learns_magnitudes_and_directions",
                "tests/test_lowrank.py::test_dora_in_peft",
            ),
        ),
    )
    rank: int = 8
    alpha: float | None = None

    def __post_init__(self):
        positive("DoRA", rank=self.rank)

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        return {site.name: self._one(site) for site in sites}

    def _one(self, site: Site) -> dict[str, Tensor]:
        a, b = factors(site, self.rank, "DoRA")
        weight = matrix(site, "DoRA")
        if not weight.is_meta and bool((weight == 0).all(1).any()):
            raise CompositionError(
                f"DoRA at site {site.name!r} ({type(site.module).__name__}): a row of its weight is zero, and has no "
                f"direction. Use mb.LoRA here."
            )
        made = {"A": uniform(site, a), "B": site.zeros(*b)}
        if site.form == "embedding":  # A is looked up
            made = {"A": site.zeros(*a), "B": torch.nn.init.normal_(site.empty(*b))}
        return made | {"magnitude": site.zeros(site.features("outputs"))}

    def delta(self, params: Params, site: Site) -> Sum:
        factor = 1.0 if self.alpha is None else self.alpha / self.rank
        a, b = params["A"], params["B"]
        with torch.no_grad():
            weight = matrix(site, "DoRA").to(torch.promote_types(a.dtype, torch.float32))
            flat, tall = a.flatten(b.ndim - 1).to(weight.dtype), factor * b.to(weight.dtype)
            own = weight.square().sum(-1)
            crossed = ((weight @ flat.mT) * tall).sum(-1)
            changed = ((tall @ (flat @ flat.mT)) * tall).sum(-1)
            norm, length = own.sqrt(), (own + 2 * crossed + changed).sqrt()
        gain = ((norm - length + params["magnitude"]) / length).to(b.dtype)
        parts = [Scale(gain), LowRank(a, b * (1 + gain).unsqueeze(-1), factor)]
        return Sum(parts if site.bias is None else [*parts, Bias(-gain * site.bias.to(gain.dtype))])
