"""LoKr and KronA: an update that is a Kronecker product.

Edalati, Tahaei, Kobyzev, Nia, Clark and Rezagholizadeh, "KronA: Parameter Efficient Tuning with Kronecker Adapter",
2022 (arXiv 2212.10650); one factor of low rank: Yeh, Hsieh, Gao, Yang, Oh and Gong, LyCORIS, 2024 (arXiv 2309.14859).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..abstract import ParameterComposition, Site
from ..deltas import Kronecker
from ..types import Params, System
from ._common import factors, positive, uniform

TESTS = ("tests/test_lowrank.py::test_lokr_is_a_kronecker_product", "tests/test_lowrank.py::test_lokr_in_peft")


@dataclass(frozen=True)
class LoKr(ParameterComposition):
    """W + (α/r) C ⊗ D, with C (o₁, i₁) zero at first, and D (o₂, i₂) = D_left D_right of rank r; o = o₁o₂, i = i₁i₂.

        mb.LoKr(8)          # LyCORIS; D is whole where r ≥ max(o₂, i₂)/2
        mb.LoKr(None)       # KronA: W + s C ⊗ D, both whole, with s = alpha

    rank: r, or None: both factors are whole. alpha: α, or s; if None, the factor is one. split: o₁ and i₁, where they
    divide o and i, or the largest divisor below; None: the most square. both: C has rank r, too, where r is less than
    max(o₁, i₁)/2. D is (o₂, i₂, *kernel) at a convolution. Differs: peft's `use_effective_conv2d` is not here. At a
    Linear, Conv1D, Conv or Embedding; raises CompositionError elsewhere.
    """

    batched: ClassVar[bool] = True
    systems: ClassVar[tuple[System, ...]] = (
        System((23,), "mb.LoKr(None)", TESTS, "KronA", "W + s C ⊗ D"),
        System((24,), "mb.LoKr(8)", TESTS),
    )
    rank: int | None = 8
    alpha: float | None = None
    split: int | None = None
    both: bool = False

    def __post_init__(self):
        positive("LoKr", rank=self.rank, split=self.split)

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        return {site.name: self._one(site) for site in sites}

    def _one(self, site: Site) -> dict[str, Tensor]:
        (_, inputs, *kernel), (outputs, _) = factors(site, 1, "LoKr")
        (o1, o2), (i1, i2) = divided(outputs, self.split), divided(inputs, self.split)
        r = self.rank or max(outputs, inputs)
        made: dict[str, Tensor] = {}
        if self.both and r < max(o1, i1) / 2:
            made |= {"C_left": site.zeros(o1, r), "C_right": uniform(site, (r, i1))}
        else:
            made["C"] = site.zeros(o1, i1)
        if r < max(o2, i2) / 2:
            made |= {"D_left": uniform(site, (o2, r)), "D_right": uniform(site, (r, i2, *kernel))}
        else:
            made["D"] = uniform(site, (o2, i2, *kernel))
        return made

    def delta(self, params: Params, site: Site) -> Kronecker:
        c, d = (_whole(params, name) for name in "CD")
        return Kronecker(c if self.alpha is None else c * (self.alpha / (self.rank or 1)), d)


def _whole(params: Params, name: str) -> Tensor:
    """A factor, from its own factors if it has any."""
    if name in params:
        return params[name]
    left, right = params[f"{name}_left"], params[f"{name}_right"]
    flat = left @ right.flatten(left.ndim - 1)  # the kernel beside the inputs
    return flat.unflatten(-1, right.shape[left.ndim - 1 :])


def divided(n: int, split: int | None) -> tuple[int, int]:
    """n as a product: of `split` and the rest where it divides, else of the largest divisor up to it and √n."""
    if split is not None and n % split == 0:
        return split, n // split
    first = next(m for m in range(min(split or n, math.isqrt(n)), 0, -1) if n % m == 0)
    return first, n // first
