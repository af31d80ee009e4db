"""A change of a whole weight: full fine-tuning of it, as a difference from the base that can be added to others.

Ilharco et al., "Editing Models with Task Arithmetic", 2023 (arXiv 2212.04089), whose task vectors are such differences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..abstract import ParameterComposition, Site
from ..deltas import Bias, Dense, Sum
from ..errors import CompositionError
from ..types import Params
from ._common import UPDATED


@dataclass(frozen=True)
class DenseDelta(ParameterComposition):
    """W + ΔW, with ΔW shaped like W and zero at first; with bias, b + Δb as well, Δb (outputs,).

        mb.DenseDelta()                         # full fine-tuning of the weights of a bay's sites, removable

    As large as the base's weight: what other kinds say with fewer numbers. `bay.merge` keeps in it what has no smaller
    form, a sum of LoRA and LoKr, or TIES of several. Against mb.Full, which is a copy of W, it adds up with others, and
    a weight's decay pulls it to the base. At a Linear, Conv1D, Conv, Embedding, and without bias at fused experts;
    raises CompositionError elsewhere.
    """

    batched: ClassVar[bool] = True
    bias: bool = False

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        return {site.name: self._one(site) for site in sites}

    def _one(self, site: Site) -> dict[str, Tensor]:
        if site.form not in UPDATED and (site.form != "experts" or self.bias):
            raise CompositionError(
                f"DenseDelta({'bias=True' if self.bias else ''}) at site {site.name!r} ({type(site.module).__name__}): "
                f"there is no weight to update. Attach at the Linear, Conv1D, Conv or Embedding inside it."
            )
        made = {"weight": site.zeros(*_shape(site))}
        return made | ({"bias": site.zeros(site.features("outputs"))} if self.bias else {})

    def delta(self, params: Params, site: Site) -> Dense | Sum:
        dense = Dense(params["weight"])
        return Sum([dense, Bias(params["bias"])]) if self.bias else dense


def _shape(site: Site) -> tuple[int, ...]:
    """The weight's, where the site is a slice of its outputs, that slice's."""
    shape = site.shape
    if site.form in ("transposed", "embedding"):
        return (*shape[:-1], site.features("outputs"))
    return tuple(shape) if site.form == "experts" else (site.features("outputs"), *shape[1:])
