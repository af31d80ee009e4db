"""Sparse fine-tuning: a few entries of a weight learn.

Ansell, Ponti, Korhonen and Vulić, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", 2022 (arXiv 2110.07560);
a fixed mask of random entries: Xu, Luo, Zhang, Tan, Chang, Huang and Huang, 2021 (arXiv 2109.05687).
"""

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..abstract import Delta, ParameterComposition, Site
from ..deltas import Bias, Sparse, Sum
from ..errors import CompositionError, listed
from ..types import Params
from ._common import at_random, weighted


@dataclass(frozen=True)
class SparseDelta(ParameterComposition):
    """W + ΔW, where ΔW is zero but at flat indices (k,), which stay; its values there (k,) learn, from zero.

        mb.SparseDelta(density=0.01)                          # random entries
        mb.SparseDelta(mask={"encoder.0.query": mask})        # your own, as LT-SFT's second phase has them

    density: the share of entries. seed: which ones; the same for all modules of one seed, so that they can be averaged.
    mask: by site, True where the weight may change, shaped like it; or flat indices. It is no part of the config, since
    the indices are stored with the values; density is None then. Finding one (LT-SFT's first phase) is training's.
    bias: all of the bias changes, too, by Δb (outputs,). At a Linear, Conv1D, Conv or Embedding; raises
    CompositionError elsewhere, or for a mask that does not fit.
    """

    batched: ClassVar[bool] = True
    density: float | None = 0.01
    seed: int = 0
    mask: InitVar[Mapping[str, Tensor] | None] = None
    bias: bool = False

    def __post_init__(self, mask: Mapping[str, Tensor] | None):
        object.__setattr__(self, "given", mask)
        if mask is not None:
            object.__setattr__(self, "density", None)
        elif self.density is not None and not 0 < self.density <= 1:
            raise CompositionError(
                f"SparseDelta(density={self.density!r}): a share of the entries, above 0 and at most 1."
            )

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        made = {}
        for site in sites:
            weighted(site, "SparseDelta")
            indices = self._chosen(site).to(site.device)
            made[site.name] = {"indices": indices, "values": site.zeros(len(indices)), **self._shift(site)}
        return made

    def _shift(self, site: Site) -> dict[str, Tensor]:
        return {"bias": site.zeros(site.features("outputs"))} if self.bias else {}

    def restore(self, sites: Sequence[Site], tensors: Mapping[str, Params]) -> dict[str, dict[str, Tensor]]:
        sizes = {site.name: tensors[site.name]["indices"].shape for site in sites}
        return {
            site.name: {
                "indices": torch.zeros(sizes[site.name], dtype=torch.int64, device=site.device),
                "values": site.zeros(*sizes[site.name]),
                **self._shift(site),
            }
            for site in sites
        }

    def _chosen(self, site: Site) -> Tensor:
        mask: Mapping[str, Tensor] | None = self.given  # type: ignore[attr-defined]
        if mask is not None:
            return self._masked(site, mask)
        if self.density is None:
            raise CompositionError(
                "SparseDelta(density=None): a module with a mask of its own can't be made anew without it; pass mask=…."
            )
        return at_random(site, self.density, self.seed)

    def _masked(self, site: Site, mask: Mapping[str, Tensor]) -> Tensor:
        if site.name not in mask:
            raise CompositionError(
                f"SparseDelta(mask=…): there is no mask for site {site.name!r}; there are {listed(mask)}."
            )
        given, shape = mask[site.name], site.weight.shape
        if given.dtype == torch.bool and given.shape == shape:
            return given.flatten().nonzero().squeeze(1)
        distinct = given.dtype == torch.int64 and given.ndim == 1 and len(given.unique()) == len(given)
        if distinct and bool(((given >= 0) & (given < shape.numel())).all()):
            return given.sort().values
        raise CompositionError(
            f"SparseDelta(mask=…) for site {site.name!r}: {given.dtype} of shape {tuple(given.shape)} is neither a "
            f"boolean mask of shape {tuple(shape)} nor distinct flat int64 indices below {shape.numel()}."
        )

    def delta(self, params: Params, site: Site) -> Delta:
        own = Sparse(params["indices"], params["values"])
        return Sum([own, Bias(params["bias"])]) if self.bias else own
