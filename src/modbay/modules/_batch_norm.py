"""Batch normalisation of a domain's own, its running statistics among its parameters.

Li, Wang, Shi, Hou and Liu, "Adaptive Batch Normalization", 2018 (arXiv 1603.04779); Chang, You, Seo, Kwak and Han,
"Domain-Specific Batch Normalization", 2019 (arXiv 1906.03950); beside adapters: Rebuffi, Bilen and Vedaldi, 2017 (arXiv
1705.08045).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..abstract import Context, Replacement, Site
from ..core import base_type
from ..errors import CompositionError
from ..types import Params, System

LAYERS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class BatchNorm(Replacement):
    """γ ⊙ (x − μ) / √(σ² + ε) + β instead of a BatchNorm1d … 3d; γ, β, μ and σ² (channels,) start as the site's.

    In training μ and σ² are those of the module's own rows, and move its running ones by the site's momentum, but not
    again when a block is recomputed; in evaluation, and where it is frozen, they are the running ones. A new module
    changes nothing in evaluation; in training, the rows of a mixed batch are
    normalised apart. What averages parameters or generates them by example can't take it, nor can a compiled network
    train modules that are chosen by example.
    Raises CompositionError elsewhere, and where the site has no γ, β, running statistics or momentum.
    """

    batched: ClassVar[bool] = True
    tokenwise: ClassVar[bool] = False
    tied: ClassVar[bool] = True
    neutral: ClassVar[bool] = True
    constants: ClassVar[tuple[str, ...]] = ("mean", "variance")
    systems: ClassVar[tuple[System, ...]] = (
        System(
            (46,),
            "mb.BatchNorm()",
            ("tests/test_function.py::test_batch_norm_keeps_statistics_of_its_own",),
            "domain-specific batch normalisation",
        ),
    )

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        return {site.name: self._one(site) for site in sites}

    def _one(self, site: Site) -> dict[str, Tensor]:
        norm: Any = site.module
        wanted = ("weight", "running_mean", "momentum")
        if base_type(norm) not in LAYERS or any(getattr(norm, name) is None for name in wanted):
            raise CompositionError(
                f"BatchNorm at site {site.name!r} ({base_type(norm).__name__}): it "
                f"stands in for a BatchNorm1d … BatchNorm3d with affine=True, running statistics and a momentum. Use "
                f"mb.Norm() at other norms."
            )
        own = {"weight": norm.weight, "bias": norm.bias, "mean": norm.running_mean, "variance": norm.running_var}
        return {name: tensor.detach().clone() for name, tensor in own.items()}

    def forward(self, params: Params, x: Tensor, f: Callable | None, c: Context) -> Tensor:
        norm: Any = f.module  # type: ignore[union-attr]
        learns = norm.training and params["weight"].requires_grad
        grouped = params["weight"].ndim > 1
        v = x.movedim(0, 1).flatten(1, 2) if grouped else x  # (m, g·channels, …): a group is so many channels more
        flat = {name: tensor.flatten() for name, tensor in params.items()}
        kept = [flat[name].clone() if c.recomputing() else flat[name] for name in self.constants]  # moved in place
        y = F.batch_norm(v, kept[0], kept[1], flat["weight"], flat["bias"], learns, norm.momentum, norm.eps)
        return y.unflatten(1, (len(x), -1)).movedim(1, 0) if grouped else y
