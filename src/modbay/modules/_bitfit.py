"""BitFit: only biases learn.

Ben Zaken, Goldberg and Ravfogel, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models", 2022 (arXiv 2106.10199).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..abstract import ParameterComposition, Site
from ..deltas import Bias
from ..types import Params, System


@dataclass(frozen=True)
class BitFit(ParameterComposition):
    """f(x) + Δb, with Δb (outputs,) zero at first: what is learned is the change of the bias.

    At a Linear, Conv, LayerNorm or any site with a known width. Differs: a site that has no bias gets one, and weight
    decay pulls the bias back to the base's, not to zero. Raises CompositionError at a site whose width can't be told.
    """

    batched: ClassVar[bool] = True
    systems: ClassVar[tuple[System, ...]] = (
        System((10,), "mb.BitFit()", ("tests/test_kinds.py::test_bitfit_moves_the_bias",)),
    )

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        return {site.name: {"bias": site.zeros(site.features("outputs"))} for site in sites}

    def delta(self, params: Params, site: Site) -> Bias:
        return Bias(params["bias"])
