"""Compacter: a bottleneck whose weights are sums of Kronecker products, the small factors shared by all layers.

Mahabadi, Henderson and Ruder, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", 2021 (arXiv 2106.04647).
PHM layers: Zhang, Tay, Zhang, Chan, Luu, Hui and Fu, 2021 (arXiv 2102.08597).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..abstract import Context, Factors, FunctionComposition, Site
from ..errors import CompositionError
from ..ops import linear, shared_linear
from ..types import Params, System
from ._common import ACTIVATIONS, known, positive

FORMULA = "tests/test_lowrank.py::test_compacter_is_a_bottleneck_of_kronecker_products"
SAME = "tests/test_adapters.py::test_the_same_weights_give_the_same_hidden_states"
SHARED = "tests/test_lowrank.py::test_the_layers_of_compacter_share_a"


@dataclass(frozen=True)
class Compacter(FunctionComposition):
    """y + W_up σ(W_down y + b_down) + b_up, with W = Σ_i A_i ⊗ (s_i t_iᵀ), i = 1 … n; A (n, n, n) of all W is one.

        mb.attach(model, [mb.role.output, mb.role.ffn_out], {"task": mb.Compacter()})         # Compacter
        mb.attach(model, mb.role.ffn_out, {"task": mb.Compacter()})                           # Compacter++
        mb.Compacter(rank=None)                                                               # PHM: B_i for s_i t_iᵀ

    n: of A, which must divide the width. size: rows of W_down, a multiple of n; or reduction: the width divided by it,
    down to a multiple of n (32 if None). rank: columns of s (n, o/n, rank) and rows of t (n, rank, i/n); None: whole.
    std: of A's normal; s and t are drawn as Glorot's with gain √2, as the authors' code does, so that the start is near
    the base, not at it; biases start at 0. Differs: the norms of the block are not trained; attach another module to
    them. Raises CompositionError where y has no features on the last axis, or what is given does not fit its width.
    """

    batched: ClassVar[bool] = True
    neutral: ClassVar[bool] = False
    systems: ClassVar[tuple[System, ...]] = (
        System((43,), "mb.Compacter()", (FORMULA, SHARED, SAME)),
        System((43,), "modules={mb.role.ffn_out: mb.Compacter()}", (FORMULA, SHARED), "Compacter++"),
        System((43,), "mb.Compacter(rank=None)", (FORMULA,), "PHM adapter", "a bottleneck with W = Σ_i A_i ⊗ B_i"),
    )
    n: int = 4
    size: int | None = None
    reduction: int | float | None = None
    rank: int | None = 1
    activation: str = "gelu_tanh"
    std: float = 1e-4

    def __post_init__(self):
        known(self.activation, "Compacter")
        positive("Compacter", n=self.n, size=self.size, reduction=self.reduction, rank=self.rank, std=self.std)
        if self.size is not None and (self.reduction is not None or self.size % self.n):
            raise CompositionError(
                f"Compacter(n={self.n}, size={self.size}, reduction={self.reduction}): a size is a multiple of n, and "
                f"is given without a reduction."
            )

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        rule = nn.init.normal_(sites[0].empty(self.n, self.n, self.n), std=self.std)
        return {site.name: {"A": rule, **self._one(site)} for site in sites}

    def _one(self, site: Site) -> dict[str, Tensor]:
        width, n = site.features("outputs"), self.n
        if site.axis != -1 or width % n:
            raise CompositionError(
                f"Compacter(n={n}) at site {site.name!r} ({type(site.module).__name__}): its output must have features "
                f"on the last axis, and {n} must divide them; the width is {width}. Choose another n, or mb.Bottleneck."
            )
        size = self.size or max(n, int(width / (self.reduction or 32)) // n * n)
        made: dict[str, Tensor] = {}
        for name, outputs, inputs in (("down", size, width), ("up", width, size)):
            if self.rank is None:
                made[name] = _glorot(site, n, outputs // n, inputs // n)
            else:
                made[f"{name}_s"] = _glorot(site, n, outputs // n, self.rank)
                made[f"{name}_t"] = _glorot(site, n, self.rank, inputs // n)
            made[f"{name}_bias"] = site.zeros(outputs)
        return made

    def change(self, params: Params, x: Tensor, y: Tensor, c: Context) -> Tensor:
        hidden = linear(y, self._weight(params, "down"), params["down_bias"])
        return linear(ACTIVATIONS[self.activation](hidden), self._weight(params, "up"), params["up_bias"])

    def factors(self, params: Params, x: Tensor, y: Tensor, c: Context) -> Factors:
        hidden = shared_linear(y, self._weight(params, "down"), params["down_bias"])
        return Factors(ACTIVATIONS[self.activation](hidden), self._weight(params, "up"), params["up_bias"])

    def _weight(self, params: Params, name: str) -> Tensor:
        """Σ_i A_i ⊗ B_i, (outputs, inputs)."""
        b = params[name] if self.rank is None else params[f"{name}_s"] @ params[f"{name}_t"]
        return torch.einsum("...nac,...nbd->...abcd", params["A"], b).flatten(-4, -3).flatten(-2, -1)


def _glorot(site: Site, n: int, rows: int, columns: int) -> Tensor:
    """n matrices, each drawn alone."""
    bound = math.sqrt(2) * math.sqrt(6 / (rows + columns))
    return nn.init.uniform_(site.empty(n, rows, columns), -bound, bound)
