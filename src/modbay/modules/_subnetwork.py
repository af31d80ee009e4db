"""A sub-network: weights that are kept, and weights that are not, at one bit each.

Mallya, Davis and Lazebnik, "Piggyback", 2018 (arXiv 1801.06519); as what is left of pruning: Frankle and Carbin, "The
Lottery Ticket Hypothesis", 2019 (arXiv 1803.03635).
"""

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..abstract import ParameterComposition, Site
from ..deltas import Mask
from ..errors import CompositionError, listed
from ..ops import pack_bits, unpack_bits
from ..types import Params
from ._common import at_random, weighted


@dataclass(frozen=True)
class SubNetwork(ParameterComposition):
    """f by W ⊙ m instead of W, with a mask m that is given: bits (n/8,), eight weights a byte, in memory and in files.

        mb.SubNetwork(mask={"encoder.0.query": mask})           # True where the weight is kept, shaped like it
        mb.SubNetwork(density=0.2)                              # random entries: what a criterion must beat

    Nothing in it learns; the base's weights do if it was attached with freeze=False, and those that are kept get their
    gradients. density: the share kept; seed: which. mask: by site; no part of the config, since the bits are stored;
    density is None then. `sparsity` tells masks from criteria, and from what a Masked has learned.
    At a Linear, Conv1D, Conv or Embedding; raises CompositionError elsewhere, or for a mask that does not fit.
    """

    batched: ClassVar[bool] = True
    neutral: ClassVar[bool] = False
    density: float | None = 0.5
    seed: int = 0
    mask: InitVar[Mapping[str, Tensor] | None] = None

    def __post_init__(self, mask: Mapping[str, Tensor] | None):
        object.__setattr__(self, "given", mask)
        if mask is not None:
            object.__setattr__(self, "density", None)
        elif self.density is not None and not 0 < self.density <= 1:
            raise CompositionError(
                f"SubNetwork(density={self.density!r}): a share of the entries, above 0 and at most 1."
            )

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        for site in sites:
            weighted(site, "SubNetwork")
        return {site.name: {"bits": pack_bits(self._kept(site)).to(site.device)} for site in sites}

    def restore(self, sites: Sequence[Site], tensors: Mapping[str, Params]) -> dict[str, dict[str, Tensor]]:
        return {site.name: {"bits": torch.zeros_like(tensors[site.name]["bits"], device=site.device)} for site in sites}

    def _kept(self, site: Site) -> Tensor:
        n, given = site.weight.numel(), self.given  # type: ignore[attr-defined]
        if given is None and self.density is not None:
            return torch.zeros(n, dtype=torch.bool).index_fill(0, at_random(site, self.density, self.seed), True)
        if given is None or site.name not in given:
            raise CompositionError(
                f"SubNetwork(mask=…): there is no mask for site {site.name!r}; there are {listed(given or ())}."
            )
        mask = given[site.name]
        if mask.dtype != torch.bool or mask.shape != site.weight.shape:
            raise CompositionError(
                f"SubNetwork(mask=…) for site {site.name!r}: {mask.dtype} of shape {tuple(mask.shape)} is no boolean "
                f"mask of shape {tuple(site.weight.shape)}."
            )
        return mask.flatten()

    def delta(self, params: Params, site: Site) -> Mask:
        bits = unpack_bits(params["bits"], site.weight.numel())
        return Mask(bits.view(*bits.shape[:-1], *site.weight.shape))
