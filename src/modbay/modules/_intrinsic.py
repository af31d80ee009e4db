"""Intrinsic dimension: all sites' parameters are moved together, in one random subspace.

Li, Farkhoor, Liu and Yosinski, "Measuring the Intrinsic Dimension of Objective Landscapes", 2018 (arXiv 1804.08838);
Fastfood: Le, Sarlós and Smola, 2013 (arXiv 1408.3060); SAID: Aghajanyan, Gupta and Zettlemoyer, "Intrinsic
Dimensionality Explains the Effectiveness of Language Model Fine-Tuning", 2021 (arXiv 2012.13255).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..abstract import Delta, ParameterComposition, Site
from ..deltas import Bias, Dense, Sum
from ..errors import CompositionError
from ..ops import generator, hadamard, normals
from ..types import Params, System
from ._common import UPDATED, positive

BUILT = ("tests/test_lowrank.py::test_intrinsic_moves_all_sites_by_one_vector",)
FAST = ("tests/test_lowrank.py::test_fastfood_is_a_product_of_simple_matrices",)
SAID = ("tests/test_lowrank.py::test_said_has_a_scale_for_each_site",)


@dataclass(frozen=True)
class Intrinsic(ParameterComposition):
    """θ + P z, with θ (D,) the weights and biases of all sites, z (d,) one vector, zero at first, and P (D, d) random.

        mb.Intrinsic(750, "dense")          # Li et al.: P normal, each column of length one
        mb.Intrinsic(750)                   # Fastfood: P = H G Π H B, in O(D log D) and O(D) numbers
        mb.Intrinsic(750, scaled=True)      # SAID: θ_l + λ_l P_l z, with λ_l (1,) at first one, for each site l

    dimension: d; with `scaled` the λ_l are part of it, and z has d − (number of sites) entries. seed: of P, whose rows
    at a site follow from the site's name; P is made again from it, on any machine, and never stored. At each site B is
    ±1, Π a permutation, G normal, H the Walsh–Hadamard matrix of the next power of two that holds both the site and z;
    scaled so that ‖P z‖ ≈ ‖z‖. Differs: no S, as in the code of SAID's authors; theirs has a block for each tensor.
    At a Linear, Conv1D, Conv or Embedding; raises CompositionError elsewhere, at a slice of an output, or for a bad d.
    """

    batched: ClassVar[bool] = True
    constants: ClassVar[tuple[str, ...]] = ("P", "G", "B", "permutation")
    remade: ClassVar[tuple[str, ...]] = ("P", "G", "B", "permutation")
    systems: ClassVar[tuple[System, ...]] = (
        System((19,), 'mb.Intrinsic(750, "dense")', BUILT),
        System((20,), "mb.Intrinsic(750)", FAST, "Fastfood projection", "θ + P z with P = H G Π H B"),
        System((21,), "mb.Intrinsic(750, scaled=True)", SAID, "SAID", "θ_l + λ_l P_l z"),
    )
    dimension: int = 500
    projection: Literal["fastfood", "dense"] = "fastfood"
    scaled: bool = False
    seed: int = 0

    def __post_init__(self):
        positive("Intrinsic", dimension=self.dimension)
        if self.projection not in ("fastfood", "dense"):
            raise CompositionError(f'Intrinsic(projection={self.projection!r}): it is "fastfood" or "dense".')

    def init(self, sites: Sequence[Site]) -> dict[str, dict[str, Tensor]]:
        d = self.dimension - len(sites) * self.scaled
        if d < 1:
            raise CompositionError(
                f"Intrinsic({self.dimension}, scaled=True): there are {len(sites)} sites with a scale each, which "
                f"leaves nothing for z. Take a dimension above it."
            )
        sizes = [math.prod(weight) + (bias or 0) for weight, bias in map(_shapes, sites)]
        z, total = sites[0].zeros(d), sum(sizes)
        make = self._dense if self.projection == "dense" else self._fastfood
        made = [make(site, size, total, d) for site, size in zip(sites, sizes, strict=True)]
        if self.projection == "dense":
            length = sum(own["P"].square().sum(0) for own in made).sqrt()  # type: ignore[union-attr]
            for own in made:
                own["P"] /= length
        out = {}
        for site, own in zip(sites, made, strict=True):
            learned = {"z": z} | ({"scale": site.zeros(1) + 1} if self.scaled else {})
            cast = {name: t.to(site.device, site.dtype if t.is_floating_point() else None) for name, t in own.items()}
            out[site.name] = learned | cast
        return out

    def _dense(self, site: Site, size: int, total: int, d: int) -> dict[str, Tensor]:
        return {"P": normals(generator("dense", self.seed, site.name), size, d)}

    def _fastfood(self, site: Site, size: int, total: int, d: int) -> dict[str, Tensor]:
        random, n = generator("fastfood", self.seed, site.name), 1 << (max(size, d) - 1).bit_length()
        sign = torch.from_numpy(random.randint(0, 2, n)).to(torch.int8) * 2 - 1
        permutation, g = torch.from_numpy(random.permutation(n)), normals(random, n)
        g /= g.square().mean().sqrt() * math.sqrt(n * total)  # H twice is of length n; its first rows have their share
        return {"B": sign, "permutation": permutation, "G": g}

    def delta(self, params: Params, site: Site) -> Delta:
        moved = self._moved(params)
        if self.scaled:
            moved = moved * params["scale"]
        shape, bias = _shapes(site)
        weight = moved[..., : math.prod(shape)].unflatten(-1, shape)
        if bias is None:
            return Dense(weight)
        return Sum([Dense(weight), Bias(moved[..., math.prod(shape) : math.prod(shape) + bias])])

    def _moved(self, params: Params) -> Tensor:
        """P z at a site, (D_l,) or longer."""
        z = params["z"]
        if self.projection == "dense":
            return (params["P"].to(z.dtype) @ z.unsqueeze(-1)).squeeze(-1)
        g = params["G"].to(z.dtype)
        padded = F.pad(z, (0, g.shape[-1] - z.shape[-1]))
        return hadamard(hadamard(padded * params["B"]).gather(-1, params["permutation"]) * g)


def _shapes(site: Site) -> tuple[tuple[int, ...], int | None]:
    """The shape of a site's weight and the length of its bias; raises CompositionError where there are none to move."""
    if site.form not in UPDATED:
        raise CompositionError(
            f"Intrinsic at site {site.name!r} ({type(site.module).__name__}): there is no weight to update. Attach at "
            f"the Linear, Conv1D, Conv or Embedding inside it."
        )
    shape = tuple(site.shape)
    if shape[-1 if site.form in ("transposed", "embedding") else 0] != site.outputs:
        raise CompositionError(
            f"Intrinsic at site {site.name!r}: a slice of an output has no weight of its own. Attach at the whole "
            f"{type(site.module).__name__}."
        )
    return shape, None if site.bias is None else len(site.bias)
