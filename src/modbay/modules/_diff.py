"""DiffPruning: an update of all weights, each entry of which has a gate that learns to close.

Guo, Rush and Kim, "Parameter-Efficient Transfer Learning with Diff Pruning", 2021 (arXiv 2012.07463).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..abstract import ParameterComposition, Site
from ..deltas import Dense
from ..errors import CompositionError
from ..ops import hard_concrete, logistic, open_probability
from ..types import Params, System
from ._common import drawing, weighted


@dataclass(frozen=True)
class DiffPruning(ParameterComposition):
    """W + z ⊙ w, with z = min(1, max(0, σ(α + noise) (r − l) + l)) an entry, and z z_g, z_g one a site, if structured.

        mb.DiffPruning(structured=True)

    w starts at zero, α at `start`, where gates are open. regularise: λ of the penalty λ Σ σ(α − log(−l/r)), the number
    of open gates to be expected; structured, λ Σ σ(α − log(−l/r)) σ(α_g − log(−l/r)), as both must be open (the
    official code adds the two). low, high: l and r. Logistic noise is drawn in training mode, with gradients on, while
    α learns, and with noise=False never; without it, it is zero. `sparsity.project` makes a SparseDelta of the share of
    z ⊙ w that is largest, which is what the paper keeps (0.5 %).
    Differs: weights alone, and each of them is a group; attach BitFit for biases. At a Linear, Conv1D, Conv or
    Embedding; raises CompositionError elsewhere, or for bounds that do not hold 0 and 1 between them.
    """

    batched: ClassVar[bool] = True
    systems: ClassVar[tuple[System, ...]] = (
        System(
            (7,),
            "mb.DiffPruning(structured=True)",
            (
                "tests/test_sparse.py::test_diff_pruning_is_its_formula",
                "tests/test_sparse.py::test_what_diff_pruning_leaves_is_a_sparse_delta",
            ),
        ),
    )
    structured: bool = False
    regularise: int | float = 1.25e-7
    start: int | float = 5.0
    low: int | float = -1.5
    high: int | float = 1.5
    noise: bool = True

    def __post_init__(self):
        if not self.low < 0 < 1 < self.high:
            raise CompositionError(
                f"DiffPruning(low={self.low!r}, high={self.high!r}): a gate is cut off at 0 and 1, which must lie "
                f"between them."
            )

    @property
    def bounds(self) -> tuple[float, float, float]:
        return float(self.low), float(self.high), 1.0

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        made = {}
        for site in sites:
            weighted(site, "DiffPruning")
            shape = site.weight.shape
            made[site.name] = {"w": site.zeros(*shape), "alpha": site.zeros(*shape) + self.start}
            if self.structured:
                made[site.name]["group"] = site.zeros(1) + self.start
        return made

    def penalty(self, params: Params) -> Tensor | None:
        if not self.regularise:
            return None
        opened = open_probability(params["alpha"], *self.bounds).sum()
        both = open_probability(params["group"], *self.bounds).sum() if self.structured else 1.0
        return self.regularise * opened * both

    def delta(self, params: Params, site: Site) -> Dense:
        w = params["w"] * self._gate(params["alpha"], site)
        if self.structured:
            group = self._gate(params["group"], site)
            w = w * group.view(*group.shape[:-1], *[1] * site.weight.ndim)
        return Dense(w)

    def _gate(self, alpha: Tensor, site: Site) -> Tensor:
        return hard_concrete(alpha, logistic(alpha) if self.noise and drawing(site, alpha) else None, *self.bounds)
