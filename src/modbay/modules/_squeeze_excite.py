"""Gates on features: each scaled by how much of it there is, over all positions or at its own.

Hu, Shen and Sun, "Squeeze-and-Excitation Networks", 2018 (arXiv 1709.01507).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..abstract import Context, FunctionComposition, Site
from ..errors import CompositionError, SiteError
from ..ops import linear
from ..types import Params, System
from ._common import ACTIVATIONS, drawn, known, positive

SQUEEZE = "tests/test_function.py::test_a_gate_squeezes_and_excites"


@dataclass(frozen=True)
class SqueezeExcite(FunctionComposition):
    """y ⊙ s · sigmoid(W_up σ(W_down v + b_down) + b_up), with v the mean of y = f(x) over its positions, or y itself.

        mb.SqueezeExcite(factor=1.0)             # squeeze and excite
        mb.SqueezeExcite(pool=False)             # a mask of features for each position

    reduction: of the features to the rows of W_down. factor: s; with 2 a new gate is one, and changes nothing, since
    W_up and b_up start at zero; the paper's s is 1, and its W_up drawn. pool: whether v is the mean, without padding
    where the call has an attention mask.
    At a convolution, a BatchNorm or whatever has its features on a known axis; raises CompositionError elsewhere.
    """

    batched: ClassVar[bool] = True
    systems: ClassVar[tuple[System, ...]] = (
        System((48,), "mb.SqueezeExcite(factor=1.0)", (SQUEEZE,), "squeeze-and-excite gate"),
    )
    reduction: int | float = 16
    factor: int | float = 2.0
    pool: bool = True
    activation: str = "relu"

    def __post_init__(self):
        known(self.activation, "SqueezeExcite")
        positive("SqueezeExcite", reduction=self.reduction, factor=self.factor)

    @property
    def neutral(self) -> bool:  # type: ignore[override]
        return self.factor == 2

    @property
    def tokenwise(self) -> bool:  # type: ignore[override]
        return not self.pool

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        return {site.name: self._one(site) for site in sites}

    def _one(self, site: Site) -> dict[str, Tensor]:
        d = site.features("outputs")
        if site.axis >= 0:
            raise CompositionError(f"SqueezeExcite at site {site.name!r}: its features are on no known axis.")
        size = max(1, int(d / self.reduction))
        ones = [1] * (-1 - site.axis)  # (r, d, 1, 1) at a Conv2d: what tells its maps from those of a Linear
        return {
            "down": drawn(site, size, d).view(size, d, *ones),
            "down_bias": site.zeros(size),
            "up": site.zeros(d, size).view(d, size, *ones),
            "up_bias": site.zeros(d),
        }

    def change(self, params: Params, x: Tensor, y: Tensor, c: Context) -> Tensor:
        lead = params["down_bias"].ndim - 1  # leading group axes: 0 or 1
        spatial = params["down"].ndim - 2 - lead
        down, up = (params[name].flatten(1 + lead) if spatial else params[name] for name in ("down", "up"))
        v = y.movedim(-1 - spatial, -1)
        s = self._squeezed(v, lead, None if spatial else c.mask) if self.pool else v
        hidden = ACTIVATIONS[self.activation](linear(s, down, params["down_bias"]))
        gate = self.factor * torch.sigmoid(linear(hidden, up, params["up_bias"]))
        return ((gate - 1) * v).movedim(-1, -1 - spatial)

    def _squeezed(self, v: Tensor, lead: int, mask: Tensor | None) -> Tensor:
        """The mean of v (…, b, positions …, d) over its positions, each of these axes now of size one."""
        axes = list(range(lead + 1, v.ndim - 1))
        if mask is None or len(axes) != 1:
            return v.mean(axes, keepdim=True) if axes else v
        if mask.shape[1] < v.shape[-2] or len(mask) != v.shape[: lead + 1].numel():
            raise SiteError(
                f"SqueezeExcite: the site's output {tuple(v.shape)} has other rows or more positions than the call's "
                f"attention mask {tuple(mask.shape)}. Attach elsewhere, or use pool=False."
            )
        count = mask[:, -v.shape[-2] :].reshape(*v.shape[:-1], 1).to(v.dtype)
        return (v * count).sum(-2, keepdim=True) / count.sum(-2, keepdim=True).clamp(min=1)
